"""Summarise the answers of many runs in tables with paired intervals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from transformers.trainer import TRAINER_STATE_NAME

from dwakd.compare.plan import Variant, is_teacher
from dwakd.evaluation.evaluate import TEXT_METRIC
from dwakd.evaluation.metrics import RESAMPLES
from dwakd.training.run_folder import RUN_FILE


@dataclass(frozen=True)
class CellScores:
    """Scores and cost of a finished run, by test set."""

    rouge_l: dict[str, np.ndarray]  # sampled ROUGE-L of each row in percent, averaged over the generation seeds
    greedy: dict[str, float]  # mean greedy ROUGE-L in percent
    bits_per_byte: dict[str, float]
    ece: dict[str, float] = field(default_factory=dict)  # calibration error in percent
    other_temperatures: dict[str, list[float]] = field(default_factory=dict)  # mean ROUGE-L of each test set
    text_bits_per_byte: dict[str, float] = field(default_factory=dict)  # of sets of texts without a prompt
    seconds_per_step: float | None = None  # median; None for a model that was not trained here
    peak_bytes: int | None = None  # peak memory of the process, on the GPU if there is one
    dev: tuple[tuple[int, float], ...] = ()  # optimiser step and bits per byte of each evaluation on the dev set

    @property
    def mean(self) -> float:
        """Unweighted mean of the sampled ROUGE-L over the test sets."""
        return float(np.mean([rows.mean() for rows in self.rouge_l.values()]))


def num_evaluated(folder: Path) -> int:
    """Return the number of test sets whose scores are in the folder of a run."""
    return len(list((folder / "eval").glob("*.json")))


def read_cell(folder: Path) -> CellScores:
    """Read the scores from the folder of a run."""
    rouge, greedy, bits, ece, text = {}, {}, {}, {}, {}
    others: dict[str, list[float]] = {}
    for path in sorted((folder / "eval").glob("*.json")):
        numbers = json.loads(path.read_text(encoding="utf-8"))
        if numbers["signature"]["metric"] == TEXT_METRIC:
            text[path.stem] = numbers["bits_per_byte"]["value"]
            continue
        other_temperatures = numbers.get("other_temperatures", {})
        for temperature, scores in other_temperatures.items():
            others.setdefault(temperature, []).append(scores["rouge_l"]["mean"])
        rows: dict[int, list[float]] = {}
        for line in path.with_suffix(".answers.jsonl").read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)
            other = str(answer.get("temperature")) in other_temperatures
            if answer["seed"] is not None and answer["rouge_l"] is not None and not other:
                rows.setdefault(answer["row"], []).append(answer["rouge_l"])
        if rows:
            rouge[path.stem] = np.array([np.mean(rows[row]) for row in sorted(rows)])
        if numbers["greedy_rouge_l"]:
            greedy[path.stem] = numbers["greedy_rouge_l"]["mean"]
        if numbers["bits_per_byte"]:
            bits[path.stem] = numbers["bits_per_byte"]["value"]
            ece[path.stem] = numbers["bits_per_byte"]["ece"]
    record = folder / RUN_FILE
    run: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    state = folder / TRAINER_STATE_NAME
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.is_file() else []
    dev = tuple((entry["step"], entry["eval_bits_per_byte"]) for entry in history if "eval_bits_per_byte" in entry)
    cost = run.get("seconds_per_step"), run.get("peak_memory_bytes")
    return CellScores(rouge, greedy, bits, ece, others, text, *cost, dev)


def paired_interval(ours: Sequence[CellScores], other: Sequence[CellScores]) -> tuple[float, float, float]:
    """Compute the difference of two variants' mean scores and its 95 % bootstrap interval.

    Each resample draws rows of every test set with replacement, the same for both variants, and training seeds of
    each variant with replacement.
    """
    rng = np.random.default_rng(0)
    sets = [[np.stack([cell.rouge_l[name] for cell in cells]) for cells in (ours, other)] for name in ours[0].rouge_l]
    draws = []
    for _ in range(RESAMPLES):
        seeds = [rng.integers(len(cells), size=len(cells)) for cells in (ours, other)]
        gaps = []
        for one, two in sets:
            rows = rng.integers(one.shape[1], size=one.shape[1])
            gaps.append(one[seeds[0]][:, rows].mean() - two[seeds[1]][:, rows].mean())
        draws.append(np.mean(gaps))
    difference = np.mean([cell.mean for cell in ours]) - np.mean([cell.mean for cell in other])
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(difference), float(low), float(high)


def seconds_until(cells: Sequence[CellScores], bits_per_byte: float) -> float | None:
    """Compute after how many seconds of training a row reached a value of bits per byte on the dev set; None if never.

    The values are means over the training seeds, and the time is the number of steps times the mean over the seeds of the
    median time of a step. It does not include evaluations, the teacher's cache and the teacher's answers.
    """
    per_step = _mean(cell.seconds_per_step for cell in cells)
    for evaluations in zip(*(cell.dev for cell in cells), strict=False):
        if per_step is not None and np.mean([value for _, value in evaluations]) <= bits_per_byte:
            return per_step * evaluations[0][0]
    return None


def summarise_comparison(
    variants: Mapping[str, Sequence[CellScores]], failures: Mapping[str, str], sft: str | None = "sft"
) -> dict[str, Any]:
    """Return every number of the tables as JSON values; a variant without a finished run has only its reason.

    `sft` is the name of the row with which the others are compared.
    """
    means = {name: [cell.mean for cell in cells] for name, cells in variants.items() if cells}
    trained = [name for name in means if not is_teacher(name)]
    finals = [cell.dev[-1][1] for cell in variants.get(sft or "", ()) if cell.dev]
    best = max(trained, key=lambda name: np.mean(means[name]), default=None)
    rows: dict[str, Any] = {}
    for name, cells in variants.items():
        if not cells:
            folder = Variant(name, {}).folder_name  # failures have the name of a teacher or of a run, NAME-SEED
            reasons = [why for run, why in failures.items() if run == name or run.rpartition("-")[0] == folder]
            rows[name] = {"failed": "; ".join(dict.fromkeys(reasons)) or "not run"}
            continue
        rows[name] = {
            "training_seeds": len(cells),
            "rouge_l": _mean(means[name]),
            "rouge_l_std_over_training_seeds": float(np.std(means[name], ddof=1)) if len(cells) > 1 else None,
            "sets": {key: _mean(cell.rouge_l[key].mean() for cell in cells) for key in cells[0].rouge_l},
            "greedy_rouge_l": _mean(value for cell in cells for value in cell.greedy.values()),
            "other_temperatures": {
                key: _mean(value for cell in cells for value in cell.other_temperatures[key])
                for key in cells[0].other_temperatures
            },
            "bits_per_byte": _mean(value for cell in cells for value in cell.bits_per_byte.values()),
            "text_bits_per_byte": _mean(value for cell in cells for value in cell.text_bits_per_byte.values()),
            "ece": _mean(value for cell in cells for value in cell.ece.values()),
            "seconds_per_step": _mean(cell.seconds_per_step for cell in cells),
            "peak_memory_bytes": max((cell.peak_bytes for cell in cells if cell.peak_bytes is not None), default=None),
        }
        if finals and rows[name]["seconds_per_step"] is not None:
            rows[name]["seconds_until_sft"] = seconds_until(cells, float(np.mean(finals)))
        for label, reference in (("versus_sft", sft), ("versus_best", best)):
            if name in trained and reference != name and reference in means:
                rows[name][label] = paired_interval(cells, variants[reference])
    return {"best": best, "variants": rows, "failures": dict(failures)}


def comparison_tables(summary: Mapping[str, Any]) -> Group:
    """Show the summary as tables of 80 columns: scores by test set, differences, and the cost of each variant."""
    rows = {name: row for name, row in summary["variants"].items() if "failed" not in row}
    sets = list(next(iter(rows.values()))["sets"]) if rows else []
    scores = _table("ROUGE-L, sampled, in percent", *sets, "mean ± training seeds")
    gaps = _table("Differences of means [95 % paired bootstrap over rows and seeds]", "to SFT", "to the best")
    columns = [
        (f"ROUGE-L\nT = {key}", key, 2) for key in (next(iter(rows.values()))["other_temperatures"] if rows else ())
    ]
    columns += [("ROUGE-L\ngreedy", "greedy_rouge_l", 2), ("bits per\nbyte", "bits_per_byte", 3)]
    if any(row["text_bits_per_byte"] is not None for row in rows.values()):
        columns.append(("bits per\nbyte, text", "text_bits_per_byte", 3))
    columns += [("ECE\nin %", "ece", 2), ("seconds\nper step", "seconds_per_step", 3)]
    headings = [*(heading for heading, *_ in columns), "peak\nmemory\nin GB", "training\nseeds"]
    if timed := any("seconds_until_sft" in row for row in rows.values()):
        headings.append("seconds until\nSFT's final\nbits per byte")
    costs = _table("Other measures", *headings)
    for name, row in rows.items():
        spread, peak = row["rouge_l_std_over_training_seeds"], row["peak_memory_bytes"]
        mean = f"{row['rouge_l']:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
        scores.add_row(name, *(f"{row['sets'][key]:.2f}" for key in sets), mean)
        if not is_teacher(name):
            found = (row.get("versus_sft"), row.get("versus_best"))
            gaps.add_row(name, *("-" if gap is None else "{:+.2f} [{:.2f}, {:.2f}]".format(*gap) for gap in found))
        shown = [({**row, **row["other_temperatures"]}[key], digits) for _, key, digits in columns]
        shown += [(None if peak is None else peak / 1e9, 2), (row["training_seeds"], 0)]
        until = row.get("seconds_until_sft", "-")
        ends = [f"{until:.1f}" if isinstance(until, float) else until or "never"] if timed else []
        costs.add_row(name, *("-" if value is None else f"{value:.{digits}f}" for value, digits in shown), *ends)
    failures = [f"run {name} failed: {reason}" for name, reason in summary["failures"].items()]
    return Group(scores, "", gaps, "", costs, *failures)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.HORIZONTALS, show_edge=False)
    table.add_column("row", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
