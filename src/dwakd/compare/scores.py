"""Read the scores of one run of a comparison, row by row."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers.trainer import TRAINER_STATE_NAME

from dwakd.evaluation.evaluate import TEXT_METRIC
from dwakd.training.run_folder import RUN_FILE

METRICS = {
    "rouge_l": "ROUGE-L\nsampled",
    "greedy_rouge_l": "ROUGE-L\ngreedy",
    "greedy_exact_match": "exact\ngreedy",
    "bits_per_byte": "bits per\nbyte",
}
"""Scores that are compared row by row, with their headings. Sampled ROUGE-L is that of the first temperature."""

PAIRED = (*METRICS, "ece")
"""Scores whose differences between rows of the table have an interval."""

Ratio = Float[np.ndarray, "parts rows"]
"""A score of a test set by row: the absolute sums of all lines but the last, added, divided by the sum of the last line.

The calibration error has a line for each bin, and the other scores have one line, which is not negative. Missing rows are 0.
"""


@dataclass(frozen=True)
class CellScores:
    """Scores and cost of a finished run."""

    scores: dict[str, dict[str, Ratio]]  # by metric and test set
    ece: dict[str, float] = field(default_factory=dict)  # calibration error in percent, by test set
    other_temperatures: dict[str, list[float]] = field(default_factory=dict)  # mean ROUGE-L of each test set
    text_bits_per_byte: dict[str, float] = field(default_factory=dict)  # of sets of texts without a prompt
    seconds_per_step: float | None = None  # median; None for a model that was not trained here
    peak_bytes: int | None = None  # peak memory of the process, on the GPU if there is one
    num_truncated: int = 0  # responses whose bits per byte are those of their beginning
    dev: tuple[tuple[int, float], ...] = ()  # optimiser step and bits per byte of each evaluation on the dev set

    def mean(self, metric: str) -> float | None:
        """Return the unweighted mean of a score over the test sets, or None if no set has it."""
        return mean_of(set_score(rows) for rows in self.scores.get(metric, {}).values())


def set_score(rows: Ratio) -> float:
    """Return the score of a test set."""
    return float(np.abs(rows[:-1].sum(1)).sum() / rows[-1].sum())


def read_cell(folder: Path, sets: Collection[str] | None = None) -> CellScores:
    """Read the scores from the folder of a run: those of these test sets, or of all that were evaluated."""
    scores: dict[str, dict[str, Ratio]] = {metric: {} for metric in PAIRED}
    ece, text, num_truncated = {}, {}, 0
    others: dict[str, list[float]] = {}
    for path in sorted((folder / "eval").glob("*.json")):
        if sets is not None and path.stem not in sets:
            continue
        numbers = json.loads(path.read_text(encoding="utf-8"))
        if numbers["signature"]["metric"] == TEXT_METRIC:
            if numbers["bits_per_byte"]:
                text[path.stem] = numbers["bits_per_byte"]["value"]
            continue
        other_temperatures = numbers.get("other_temperatures", {})
        for temperature, found in other_temperatures.items():
            if found["rouge_l"]:
                others.setdefault(temperature, []).append(found["rouge_l"]["mean"])
        for metric, rows in _by_row(path.with_suffix(".answers.jsonl"), other_temperatures).items():
            scores[metric][path.stem] = rows
        if numbers["bits_per_byte"]:
            likelihood = numbers["bits_per_byte"]
            scores["bits_per_byte"][path.stem] = _by_place(likelihood["rows"])
            ece[path.stem] = likelihood["ece"]
            num_truncated += likelihood.get("num_truncated", 0)
            if gaps := likelihood.get("row_gaps"):  # results of older versions have none
                percent = ([100 * gap for gap in row[:-1]] + row[-1:] for row in gaps)
                places = (row[0] for row in likelihood["rows"])
                scores["ece"][path.stem] = _by_place(
                    [[place, *row] for place, row in zip(places, percent, strict=True)]
                )
    record = folder / RUN_FILE
    run: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    state = folder / TRAINER_STATE_NAME
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.is_file() else []
    dev = tuple((entry["step"], entry["eval_bits_per_byte"]) for entry in history if "eval_bits_per_byte" in entry)
    cost = run.get("seconds_per_step"), run.get("peak_memory_bytes")
    return CellScores(scores, ece, others, text, *cost, num_truncated, dev)


def _by_row(path: Path, other_temperatures: Mapping[str, Any]) -> dict[str, Ratio]:
    """Read the scores of the answers to each row, sampled ones averaged over the generation seeds."""
    found: dict[str, dict[int, list[float]]] = {}
    for answer in map(json.loads, filter(None, path.read_text(encoding="utf-8").split("\n"))):  # not other line breaks
        if answer["rouge_l"] is None or str(answer.get("temperature")) in other_temperatures:
            continue
        names = ("rouge_l",) if answer["seed"] is not None else ("greedy_rouge_l", "greedy_exact_match")
        for name in names:
            found.setdefault(name, {}).setdefault(answer["row"], []).append(answer[name.removeprefix("greedy_")])
    means = {name: [np.mean(rows[row]) for row in sorted(rows)] for name, rows in found.items()}
    return {name: np.stack([np.array(rows), np.ones(len(rows))]) for name, rows in means.items()}


def _by_place(rows: Sequence[Sequence[float]]) -> Ratio:
    """Return the values of rows, which begin with their index; a row that did not fit into the model is missing."""
    places, *values = zip(*rows, strict=True)
    found = np.zeros((len(values), 1 + max(places)))
    found[:, places] = values
    return found


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
