"""Compare finished runs with the published tables, and say which differences exceed the noise.

  python -m benchmarks.paper runs/MiniLLM-gpt2-120M                            # results of `dwakd eval`
  python -m benchmarks.paper runs/paper                                        # a folder of `dwakd compare`
  python -m benchmarks.paper runs/dwa_kd --table qwen1.5-1.8b-gpt2-120m --row dwa_kd   # one run of `dwakd train`

Noise is the half-width of a 95 % interval of the difference, for scores that are equal apart from their seeds:
- For a published model, it follows from the spread over the generation seeds. The published score is a mean over the
  same number of seeds, so the variance of a mean counts twice.
- For models that were trained here, it follows from the spread over training seeds, pooled over the methods. The
  published score is one training run. With one training seed, the noise is unknown.
Half a unit of the last published digit is added. One in twenty such differences exceeds the noise by chance.
docs/reproduce.md explains the steps.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from dwakd.errors import UserError

_METHODS = ("teacher", "sft", "uld", "min_ed", "multilevel_ot", "dskd", "dwa_kd")
_AVERAGES = {  # by the recipe in recipes/paper
    "qwen1.5-1.8b-gpt2-120m": (25.44, 13.85, 15.36, 16.40, 14.37, 16.68, 17.68),
    "qwen1.5-1.8b-gpt2-340m": (25.44, 15.03, 16.29, 16.74, 16.21, 17.25, 19.35),
    "qwen2.5-7b-gpt2-1.5b": (28.38, 18.27, 20.44, 20.83, 19.71, 21.04, 22.85),
    "qwen2.5-7b-opt-2.7b": (28.38, 20.63, 21.11, 21.21, 20.92, 22.09, 23.20),
    "mistral-7b-tinyllama-1.1b": (28.31, 20.57, 23.26, 23.05, 21.23, 23.54, 25.06),
}
Scores = dict[str, float]
TABLES: dict[str, dict[str, Scores]] = {
    "minillm": {"MiniLLM-gpt2-120M": {"dolly": 24.6, "self-instruct": 13.2, "vicuna": 16.9, "s-ni": 25.3}},
    **{
        pair: {name: {"mean": value} for name, value in zip(_METHODS, values, strict=True)}
        for pair, values in _AVERAGES.items()
    },
}
TABLES["qwen1.5-1.8b-gpt2-120m"] |= {"alm": {"mean": 16.01}, "dskd_v2": {"mean": 17.78}, "dwa_kd_v2": {"mean": 17.89}}
"""Published ROUGE-L: table, row, test set or "mean" (of the four sets). MiniLLM: arXiv 2306.08543; others: 2602.21669."""

SETS = {"dolly": "dolly", "self-instruct": "self.?inst", "vicuna": "vicuna", "s-ni": "sinst|s.?ni"}
"""The published test sets, and how the names of their files are recognised."""
NUM_ROWS = {"dolly": 500, "self-instruct": 242, "vicuna": 80, "s-ni": 1694}
SEEDS = [10, 20, 30, 40, 50]


class Score(NamedTuple):
    """A mean score, and its standard error if that is known, from an estimate with these degrees of freedom."""

    mean: float
    error: float | None
    freedom: int


class Difference(NamedTuple):
    """A published score and ours; `noise` is None if it is unknown."""

    row: str
    test_set: str
    published: float
    ours: float
    noise: float | None

    @property
    def verdict(self) -> str:
        if self.noise is None:
            return "noise unknown"
        return "within the noise" if abs(self.ours - self.published) <= self.noise else "differs"


def difference(row: str, test_set: str, published: float, score: Score) -> Difference:
    """Compare a score of ours with a published one."""
    if score.error is None:
        return Difference(row, test_set, published, score.mean, None)
    rounding = 0.5 * 10 ** -len(f"{published}".partition(".")[2])
    return Difference(row, test_set, published, score.mean, t_quantile(score.freedom) * score.error + rounding)


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution, from draws with a fixed seed (error below 1 %)."""
    return float(np.quantile(np.random.default_rng(0).standard_t(freedom, 1_000_000), 0.975))


def published_set(name: str) -> str | None:
    """Return the published test set of a file's or a set's name, if it is one of the four."""
    return next((key for key, pattern in SETS.items() if re.search(pattern, name, re.IGNORECASE)), None)


def evaluation_scores(evaluations: Iterable[dict[str, Any]]) -> dict[str, Score]:
    """Return the scores of the published sets and their mean, from the evaluations of one model."""
    found = {}
    for numbers in evaluations:
        name, rouge = published_set(numbers["signature"]["data"]["name"]), numbers["rouge_l"]
        if name is not None and rouge is not None:
            seeds = len(numbers["signature"]["seeds"])
            error = None if rouge["std"] is None else rouge["std"] * math.sqrt(2 / seeds)
            found[name] = Score(rouge["mean"], error, max(1, seeds - 1))
    if set(found) == set(SETS):
        # means are published for models that were trained here, whose spread over training seeds is unknown
        found["mean"] = Score(fmean(score.mean for score in found.values()), None, 1)
    return found


def comparison_scores(comparison: dict[str, Any]) -> dict[str, dict[str, Score]]:
    """Return the mean score of each method and of the teacher, from comparison.json of `dwakd compare`."""
    rows = {name: row for name, row in comparison["variants"].items() if "failed" not in row}
    spreads = {name: row["std_over_training_seeds"]["rouge_l"] for name, row in rows.items()}
    weights = {name: rows[name]["training_seeds"] - 1 for name, spread in spreads.items() if spread is not None}
    freedom = sum(weights.values())
    pooled = math.sqrt(sum(weights[name] * spreads[name] ** 2 for name in weights) / freedom) if freedom else None
    scores = {}
    for name, row in rows.items():
        if {published_set(key) for key in row["sets"]} != set(SETS):
            raise UserError(
                f"the published mean is over {', '.join(SETS)}, but {name} has the sets {', '.join(row['sets'])}"
            )
        error = None if pooled is None else pooled * math.sqrt(1 + 1 / row["training_seeds"])
        scores[name] = {"mean": Score(row["rouge_l"], error, freedom)}
    return scores


def protocol_faults(evaluations: Iterable[dict[str, Any]]) -> list[str]:
    """Say how evaluations differ from the published protocol: `decoding: minillm`, five seeds, all rows."""
    expected = {"no_repeat_ngram_size": 6, "temperature": 1.0, "top_p": 1.0, "seeds": SEEDS, "max_new_tokens": 256}
    faults = []
    for numbers in evaluations:
        signature = numbers["signature"]
        name = published_set(signature["data"]["name"])
        if name is None or numbers["rouge_l"] is None:
            continue
        wanted, found = {**expected, "template": "alpaca", "rows": NUM_ROWS[name]}, {**signature, **signature["data"]}
        faults += [
            f"{name}: {key} is {found.get(key)}, but {value} in the published tables"
            for key, value in wanted.items()
            if found.get(key) != value
        ]
    return list(dict.fromkeys(faults))


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON file of an evaluation or a comparison."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}): give a folder of dwakd eval, train or compare"
        ) from error
    if not (isinstance(content, dict) and ("variants" in content or {"rouge_l", "signature"} <= content.keys())):
        raise UserError(
            f"{path} contains neither a comparison nor an evaluation: give a folder of dwakd eval or compare"
        )
    return content


def read_run(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the comparison in a folder, if it contains one, and all its evaluations.

    `path` is a folder of `dwakd compare`, `train` or `eval`, or one JSON file of these.
    """
    if path.is_file():
        content = read_json(path)
        return (content, []) if "variants" in content else (None, [content])
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a folder or JSON file of dwakd eval, train or compare")
    if (path / "comparison.json").is_file():
        found = sorted(path.glob("cells/*/eval/*.json"))
        return read_json(path / "comparison.json"), [read_json(file) for file in found]
    found = sorted(path.glob("eval/*.json")) or sorted(path.glob("*.json"))
    if not found:
        raise UserError(f"{path} contains no results: give a folder of dwakd eval, train or compare")
    return None, [read_json(file) for file in found]


def compare_with_paper(
    path: Path, table: str | None = None, row: str | None = None
) -> tuple[list[Difference], list[str]]:
    """Compare the results in a folder with a published table.

    Args:
        path: see `read_run`.
        table: name in `TABLES`. Default: the table of MiniLLM's students for evaluations, the first pair for a
            comparison.
        row: row of the table, for evaluations. Default: the last part of the model's name.

    Returns:
        The differences, and how the evaluations differ from the published protocol.

    Raises:
        UserError: the path has no results, or the table has no such row or set.
    """
    comparison, evaluations = read_run(path)
    rows = TABLES[table or ("minillm" if comparison is None else "qwen1.5-1.8b-gpt2-120m")]
    if comparison is not None:
        scores = comparison_scores(comparison)
    else:
        names = {numbers["signature"]["model"]["name"] for numbers in evaluations}
        if len(names) > 1:
            raise UserError(
                f"{path} contains evaluations of several models ({', '.join(sorted(names))}): give one of them"
            )
        name = row or Path(names.pop()).name
        if name not in rows:
            raise UserError(
                f"the published table has no row {name}: choose --row from {', '.join(rows)}, or another --table"
            )
        scores = {name: evaluation_scores(evaluations)}
    found = [
        difference(name, key, published, by_set[key])
        for name, by_set in scores.items()
        for key, published in rows.get(name, {}).items()
        if key in by_set
    ]
    if not found:
        raise UserError(
            f"{path} has no score that was published: evaluate all of {', '.join(SETS)}, or choose another --table"
        )
    faults = protocol_faults(evaluations)
    return found, faults if evaluations else ["the folder has no evaluations, so their protocol is unknown"]


def show(differences: Sequence[Difference], faults: Sequence[str]) -> Table:
    """Return the table to print."""
    looks: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "box": box.HORIZONTALS}
    table = Table(
        "row", "test set", title="ROUGE-L, published and here", show_edge=False, padding=(0, 1, 0, 0), **looks
    )
    for heading in ("published", "here", "difference", "noise"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for one in differences:
        noise = "-" if one.noise is None else f"± {one.noise:.2f}"
        numbers = (f"{one.published}", f"{one.ours:.2f}", f"{one.ours - one.published:+.2f}", noise)
        table.add_row(one.row, one.test_set, *numbers, one.verdict)
    num_different = sum(one.verdict == "differs" for one in differences)
    notes = [f"{num_different} of {len(differences)} differences exceed the noise (95 %)."]
    if faults:
        notes += ["Not the published protocol:", *faults]
    table.caption = "\n".join(notes)
    return table


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of dwakd eval, train or compare")
    parser.add_argument(
        "--table", choices=list(TABLES), help="published table; by default the one of the first example"
    )
    parser.add_argument("--row", help="row of the table; by default the last part of the model's name")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    given = option_parser().parse_args(arguments)
    try:
        Console().print(show(*compare_with_paper(given.path, given.table, given.row)))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
