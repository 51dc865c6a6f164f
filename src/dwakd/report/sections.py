"""The sections of a report. A section without content is None."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np
from markupsafe import Markup

from dwakd.compare.plan import is_teacher
from dwakd.compare.scores import METRICS, CellScores, read_cell
from dwakd.compare.table import bootstrap, paired_intervals
from dwakd.report.charts import Score, box_plots, curve, intervals, is_finite, legend, logged_values
from dwakd.report.collect import DAMAGE, Collection, Run
from dwakd.report.page import Cell, Number, code, details, facts, grid, heading, join, paragraph, table
from dwakd.training.run_folder import flat_options

_GREEDY = "greedy"
_BITS = "bits per byte"
_NOT_TERMS = ("learning_rate", "tokens_per_second", "response_tokens_per_second")
_NOT_SHOWN = ("step", "epoch", "total_flos")


def _number(value: Any, digits: int = 2) -> Number:
    return Number(value, f"{value:,.{digits}f}") if is_finite(value) else Number(None, "–")


def scores(run: Run) -> Iterator[Score]:
    """Yield the scores of a run on its test sets."""
    for name, found in run.evaluations.items():
        given = found.signature.get("temperature")
        first = next(iter(given), "") if isinstance(given, list) else given
        passes: dict[str, tuple[Any, Any]] = {
            str(first): (found.rouge_l, found.exact_match),
            **{key: (one.rouge_l, one.exact_match) for key, one in found.other_temperatures.items()},
            _GREEDY: (found.greedy_rouge_l, found.greedy_exact_match),
        }
        for label, pair in passes.items():
            for metric, one in zip(("ROUGE-L", "exact match"), pair, strict=True):
                if one is not None:
                    low, high = one.interval
                    yield Score(run, name, metric, label, one.mean, one.std, low, high, one.n)
        if (bits := found.bits_per_byte) and any(num_bytes for *_, num_bytes in bits.rows):
            rows = np.array([row for row in bits.rows if row[2] > 0]).T[1:]
            low, high = np.percentile(bootstrap([{name: rows}], 0), [2.5, 97.5]).tolist()
            yield Score(run, name, _BITS, "", bits.value, None, low, high, bits.num_examples)
            yield Score(run, name, "calibration error", "", bits.ece, None, None, None, bits.num_examples)


def summary(found: Collection) -> Markup:
    """Show the notes, and one line for each run."""
    notes = Markup('<ul class="notes">{}</ul>').format(Markup().join(map(Markup("<li>{}</li>").format, found.notes)))
    lines: list[list[Cell]] = []
    for run in found.runs:
        means: dict[tuple[str, bool], list[float]] = {}
        for one in scores(run):
            if one.temperature in run.evaluations[one.test_set].other_temperatures:
                continue
            means.setdefault((one.metric, one.temperature == _GREEDY), []).append(one.value)
        keys = (("ROUGE-L", False), ("ROUGE-L", True), (_BITS, False))
        values = [_number(fmean(means[key]) if key in means else None, 3 if key[0] == _BITS else 2) for key in keys]
        lines.append([run.name, run.method, _number(run.record.get("num_steps"), 0), *values])
    caption = (
        "Means over test sets, sampled at the first temperature. ROUGE-L is in percent. Lower bits per byte are better."
    )
    shown = table(["run", "method", "steps", "ROUGE-L sampled", "ROUGE-L greedy", _BITS], lines, caption=caption)
    return join(notes, shown) if found.notes else shown


def results(runs: Sequence[Run], rows: Sequence[str]) -> Markup | None:
    """Show scores with intervals by test set and temperature, and the differences between the rows."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for one in (one for run in runs for one in scores(run)):
        groups.setdefault((one.test_set, one.metric), []).append(one)
    charts = [intervals(": ".join(key), found, rows) for key, found in groups.items() if key[1] in ("ROUGE-L", _BITS)]
    lines: list[list[Cell]] = []
    for one in (one for found in groups.values() for one in found):
        numbers = [_number(value, 3 if one.metric == _BITS else 2) for value in (one.value, one.std, one.low, one.high)]
        lines.append([one.run.name, one.test_set, one.metric, one.temperature, *numbers, _number(one.num_rows, 0)])
    headings = ["run", "test set", "score", "temperature", "value", "± seeds", "from", "to", "rows"]
    text = "ROUGE-L, exact match and calibration error are in percent. From and to are the ends of the 95 % bootstrap interval."
    shown = Markup('<div class="grid wide">{}</div>').format(join(*charts))
    known = legend(rows, [run.row for run in runs if run.evaluations])
    all_scores = details("All scores", table(headings, lines, caption=text))
    return join(known, shown, *_differences(runs), all_scores) if lines else None


def _differences(runs: Sequence[Run]) -> list[Markup]:
    """Compare every row with `sft`, or else the first one of SFT on the data itself, or else the first row."""
    by_row: dict[str, list[CellScores]] = {}
    for run in runs:
        try:
            by_row.setdefault(run.row, []).append(read_cell(run.folder, run.evaluations))
        except DAMAGE:  # a note names the file
            by_row.pop(run.row)
    trained = [row for row in by_row if not is_teacher(row)]
    on_data = [run.row for run in runs if run.method == "sft" and run.options.get("data.responses", "given") == "given"]
    fitting = [row for row in ("sft", *on_data, *trained) if row in trained]
    reference = next(iter(fitting), "")
    known = {row: by_row[row] for row in trained}
    gaps = {metric: found for metric in METRICS if (found := paired_intervals(known, metric))}
    lines: list[list[Cell]] = []
    for row in trained if len(trained) > 1 else ():
        line: list[Cell] = [row]
        for metric, found in gaps.items():
            gap, digits = found.get((row, reference)), 3 if metric == "bits_per_byte" else 2
            text = "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*gap, d=digits) if gap else "–"
            line.append(Number(gap[0] if gap else None, text))
        lines += [line] if row != reference else []
    caption = f"Difference to {reference}, with the 95 % interval of a paired bootstrap over rows and training seeds."
    return [table(["row", *(METRICS[m].replace("\n", " ") for m in gaps)], lines, caption=caption)] if lines else []


def training_curves(runs: Sequence[Run], rows: Sequence[str]) -> Markup | None:
    """Show what the runs have logged: terms, gradient norms, evaluations, schedule and speed."""
    groups: dict[str, list[str]] = {"Loss and terms": [], "Gradient norms": [], "Dev set": [], "Schedule and speed": []}
    kinds = {"grad_norm": "Gradient norms", "term_grad_norm": "Gradient norms", "eval_": "Dev set"}
    names = [name for name in logged_values(runs) if name not in _NOT_SHOWN and not name.startswith("train_")]
    for name in sorted(names, key=lambda name: name != "loss"):
        other = "Schedule and speed" if name in _NOT_TERMS or "/" in name else "Loss and terms"
        groups[next((kind for start, kind in kinds.items() if name.startswith(start)), other)].append(name)
    parts: list[Markup] = []
    for title, own in groups.items():
        parts += [heading(title), grid([curve(name, runs, rows, len(names)) for name in own])] if own else []
    text = """The loss and its terms are in nats per student response token. Terms are shown without their weights in the loss.
    The losses of different methods cannot be compared."""
    return join(paragraph(text), legend(rows, [run.row for run in runs if run.history]), *parts) if parts else None


def cost(runs: Sequence[Run]) -> Markup | None:
    """Show time and memory of the runs that have been trained."""
    lines: list[list[Cell]] = []
    for run in (run for run in runs if run.record or run.history):
        last = {name: value for entry in run.history for name, value in entry.items()}
        peak, evaluated = run.record.get("peak_memory_bytes"), [one.seconds for one in run.evaluations.values()]
        speeds = [speed for entry in run.history if is_finite(speed := entry.get("tokens_per_second"))]
        numbers = [
            *(_number(last.get("step"), 0), _number(last.get("train_runtime"), 1)),
            *(_number(run.record.get("seconds_per_step"), 3), _number(median(speeds) if speeds else None, 0)),
            *(_number(sum(evaluated) or None, 1), _number(peak / 1e9 if is_finite(peak) else None)),
            *(_number(run.record.get(name), 0) for name in ("num_train_examples", "world_size")),
        ]
        lines.append([run.name, *numbers])
    names = ["steps", "training in s", "s per step", "tokens per s", "evaluation in s", "memory in GB", "rows", "ranks"]
    caption = "Time of a step and tokens per second are medians. Memory is the peak of the GPU, or else of the process."
    return table(["run", *names], lines, caption=caption) if lines else None


def similarity(found: Collection) -> Markup | None:
    """Show the files of `dwakd similarity`."""
    parts: list[Markup] = []
    for path, students in found.similarity.items():
        cosine, product = ({key: getattr(one, k) for key, one in students.items()} for k in ("cosine", "product"))
        parts += [
            heading(path),
            grid(
                [
                    box_plots("difference of cosines between spans (M_cos)", cosine),
                    box_plots("difference of normalised inner products (M_prod)", product),
                ]
            ),
        ]
    text = "A smaller difference means that a student relates the parts of a text to each other more like the teacher."
    return join(paragraph(text), *parts) if parts else None


def options(runs: Sequence[Run]) -> Markup | None:
    """Show the options that differ between the runs, and the recipe of each."""
    _, differing = _contrast({run.name: run.options for run in runs if run.options})
    recipes = [details(f"Recipe of {run.name}", code(run.recipe)) for run in runs if run.recipe]
    return join(*differing, *recipes) if recipes else None


def environment(runs: Sequence[Run]) -> Markup | None:
    """Show versions and hardware, and the signature of the scores: everything that they depend on."""
    costs = ("seconds_per_step", "peak_memory_bytes", "num_steps", "num_train_examples", "teacher_caches")
    records = {run.name: {key: run.record[key] for key in run.record if key not in costs} for run in runs if run.record}
    signatures = {f"{run.name}, {name}": one.signature for run in runs for name, one in run.evaluations.items()}
    groups = {"Versions and hardware": records, "Signature of the scores": signatures}
    parts: list[Markup] = []
    for title, values in groups.items():
        same, differing = _contrast({name: flat_options(one) for name, one in values.items()})
        parts += [heading(title), facts(list(same.items())), *differing] if values else []
    return join(*parts) if parts else None


def _contrast(runs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], list[Markup]]:
    """Return the values that all runs have in common, and a table of those that differ, if any do."""
    names = dict.fromkeys(name for values in runs.values() for name in values)
    columns = {name: [_shown(one[name]) if name in one else "unset" for one in runs.values()] for name in names}
    same = {name: texts[0] for name, texts in columns.items() if len(set(texts)) == 1}
    differing = [name for name in names if name not in same]
    lines = [[run, *(columns[name][number] for name in differing)] for number, run in enumerate(runs)]
    caption = "These values differ between the runs."
    return same, [table(["run", *differing], lines, caption=caption)] if differing else []


def _shown(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable()
    return str(value) if plain else json.dumps(value, ensure_ascii=False, default=str)
