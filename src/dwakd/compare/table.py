"""Summarise the answers of many runs in tables with paired intervals."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dwakd.compare.plan import Variant, is_teacher
from dwakd.compare.scores import METRICS, PAIRED, CellScores, Ratio, mean_of, set_score
from dwakd.evaluation.metrics import RESAMPLES


def common(cells: Sequence[CellScores], metric: str) -> list[dict[str, Ratio]]:
    """Return the scores of each cell by test set, without the rows and the sets that another cell lacks."""
    shared: list[dict[str, Ratio]] = [{} for _ in cells]
    for name in cells[0].scores[metric] if cells else ():
        given = [cell.scores[metric].get(name, np.zeros((2, 0))) for cell in cells]
        size = min(rows.shape[1] for rows in given)
        known = np.all([rows[-1, :size] > 0 for rows in given], axis=0)
        for scores, rows in zip(shared if known.any() else (), given, strict=False):
            scores[name] = rows[:, :size][:, known]
    return shared


def bootstrap(cells: Sequence[Mapping[str, Ratio]], seed: int) -> Float[np.ndarray, " resamples"]:
    """Resample the mean score of a row of the table, whose cells have these scores by test set.

    Each resample draws the rows of every test set with replacement, the same ones for every row of the table, and the
    training seeds with replacement, which depend on `seed`.
    """
    draws = np.random.default_rng(seed).integers(len(cells), size=(RESAMPLES, len(cells)))
    sets = []
    for number, name in enumerate(cells[0]):
        rows = np.stack([cell[name] for cell in cells])  # cells, parts, rows
        sums = rows @ _draws(number, rows.shape[2]).T
        ratios = np.abs(sums[:, :-1]).sum(1) / sums[:, -1]
        sets.append(np.take_along_axis(ratios.T, draws, axis=1).mean(1))
    return np.mean(sets, axis=0)


@lru_cache(maxsize=8)  # of 8 KB for each row of a test set
def _draws(number: int, size: int) -> Integer[np.ndarray, "resamples rows"]:
    """Return how often each resample draws each row of a test set."""
    return np.random.default_rng((number, size)).multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(np.int32)


def paired_intervals(
    rows: Mapping[str, Sequence[CellScores]], metric: str
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Compute the difference of each two rows of the table and its 95 % bootstrap interval, where both have the score.

    The test sets and the rows of them that some model could not score are left out for all.
    """
    known = {name: cells for name, cells in rows.items() if all(cell.scores.get(metric) for cell in cells)}
    shared = iter(common([cell for cells in known.values() for cell in cells], metric))
    paired = {name: [scores for _, scores in zip(cells, shared, strict=False)] for name, cells in known.items()}
    if not any(scores for cells in paired.values() for scores in cells):
        return {}
    drawn = {name: bootstrap(cells, seed) for seed, (name, cells) in enumerate(paired.items())}
    means = {
        name: float(np.mean([set_score(scores) for cell in cells for scores in cell.values()]))
        for name, cells in paired.items()
    }
    found = {}
    for name, other in itertools.permutations(known, 2):
        low, high = np.percentile(drawn[name] - drawn[other], [2.5, 97.5])
        found[name, other] = means[name] - means[other], float(low), float(high)
    return found


def seconds_until(cells: Sequence[CellScores], bits_per_byte: float) -> float | None:
    """Compute after how many seconds of training a row reached a value of bits per byte on the dev set; None if never.

    The values are means over the training seeds, and the time is the number of steps times the mean over the seeds of the
    median time of a step. It does not include evaluations, the teacher's cache and the teacher's answers.
    """
    per_step = mean_of(cell.seconds_per_step for cell in cells)
    for evaluations in zip(*(cell.dev for cell in cells), strict=False):
        if per_step is not None and np.mean([value for _, value in evaluations]) <= bits_per_byte:
            return per_step * evaluations[0][0]
    return None


def summarise_comparison(
    variants: Mapping[str, Sequence[CellScores]], failures: Mapping[str, str], sft: str | None = "sft"
) -> dict[str, Any]:
    """Return every number of the tables as JSON values; a variant without a finished run has only its reason.

    `sft` is the name of the row whose final bits per byte the others have to reach. `versus` contains the difference of a row
    to each other one, by metric, with its 95 % interval (`paired_intervals`).
    """
    trained = {name: cells for name, cells in variants.items() if cells and not is_teacher(name)}
    finals = [cell.dev[-1][1] for cell in variants.get(sft or "", ()) if cell.dev]
    intervals = {metric: paired_intervals(trained, metric) for metric in PAIRED}
    rows: dict[str, Any] = {}
    for name, cells in variants.items():
        if not cells:
            folder = Variant(name, {}).folder_name  # failures have the name of a teacher or of a run, NAME-SEED
            reasons = [why for run, why in failures.items() if run == name or run.rpartition("-")[0] == folder]
            rows[name] = {"failed": "; ".join(dict.fromkeys(reasons)) or "not run"}
            continue
        rows[name] = {
            "training_seeds": len(cells),
            **{metric: mean_of(cell.mean(metric) for cell in cells) for metric in METRICS},
            "std_over_training_seeds": {metric: _spread(cell.mean(metric) for cell in cells) for metric in METRICS},
            "sets": {
                key: mean_of(set_score(cell.scores["rouge_l"][key]) for cell in cells)
                for key in cells[0].scores["rouge_l"]
            },
            "other_temperatures": {
                key: mean_of(value for cell in cells for value in cell.other_temperatures[key])
                for key in cells[0].other_temperatures
            },
            "text_bits_per_byte": mean_of(value for cell in cells for value in cell.text_bits_per_byte.values()),
            "ece": mean_of(value for cell in cells for value in cell.ece.values()),
            "num_truncated": max(cell.num_truncated for cell in cells),
            "seconds_per_step": mean_of(cell.seconds_per_step for cell in cells),
            "peak_memory_bytes": max((cell.peak_bytes for cell in cells if cell.peak_bytes is not None), default=None),
        }
        if finals and rows[name]["seconds_per_step"] is not None:
            rows[name]["seconds_until_sft"] = seconds_until(cells, float(np.mean(finals)))
        rows[name]["versus"] = {
            other: {metric: found[name, other] for metric, found in intervals.items() if (name, other) in found}
            for other in trained
            if name in trained and other != name
        }
    return {"sft": sft, "variants": rows, "failures": dict(failures)}


def comparison_tables(summary: Mapping[str, Any]) -> Group:
    """Show the summary as tables of 80 columns: scores by test set, differences, other scores and cost of each variant."""
    rows = {name: row for name, row in summary["variants"].items() if "failed" not in row}
    sets = list(next(iter(rows.values()))["sets"]) if rows else []
    scores = _table("ROUGE-L, sampled, in percent", *sets, "mean ± training seeds")
    compared = [metric for metric in METRICS if metric != "greedy_exact_match"]
    reference = summary["sft"]
    gaps = _table(
        f"Differences to {reference} [95 % paired bootstrap over rows and seeds]", *(METRICS[name] for name in compared)
    )
    columns = [
        (f"ROUGE-L\nT = {key}", key, 2) for key in (next(iter(rows.values()))["other_temperatures"] if rows else ())
    ]
    columns += [(METRICS[name], name, 2 + (name == "bits_per_byte")) for name in METRICS if name != "rouge_l"]
    if any(row["text_bits_per_byte"] is not None for row in rows.values()):
        columns.append(("bits per\nbyte, text", "text_bits_per_byte", 3))
    columns.append(("ECE\nin %", "ece", 2))
    others = _table("Other scores", *(heading for heading, *_ in columns))
    headings = ["seconds\nper step", "peak memory\nin GB", "training\nseeds"]
    if timed := any("seconds_until_sft" in row for row in rows.values()):
        headings.append("seconds until SFT's\nfinal bits per byte")
    costs = _table("Cost", *headings)
    for name, row in rows.items():
        spread, peak = row["std_over_training_seeds"]["rouge_l"], row["peak_memory_bytes"]
        mean = f"{row['rouge_l']:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
        scores.add_row(name, *(f"{row['sets'][key]:.2f}" for key in sets), mean)
        if not is_teacher(name):
            found = row["versus"].get(reference, {})
            gaps.add_row(name, *("-" if key not in found else _gap(found[key], key) for key in compared))
        values = {**row, **row["other_temperatures"]}
        others.add_row(name, *(_cell(values[key], digits) for _, key, digits in columns))
        until = row.get("seconds_until_sft", "-")
        ends = [f"{until:.1f}" if isinstance(until, float) else until or "never"] if timed else []
        gigabytes = None if peak is None else peak / 1e9
        costs.add_row(name, _cell(row["seconds_per_step"], 3), _cell(gigabytes, 2), str(row["training_seeds"]), *ends)
    notes = [
        Text(
            f"{name}: bits per byte does not include the end of {row['num_truncated']} responses, which were cut at "
            "evaluation.max_length"
        )
        for name, row in rows.items()
        if row["num_truncated"]
    ]
    notes += [Text(f"run {name} failed: {reason}") for name, reason in summary["failures"].items()]
    return Group(scores, *(("", gaps) if reference in rows else ()), "", others, "", costs, *notes)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.HORIZONTALS, show_edge=False)
    table.add_column("row", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _gap(interval: Sequence[float], metric: str) -> str:
    difference, low, high = interval
    digits = 3 if metric == "bits_per_byte" else 2
    return f"{difference:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _spread(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None
