"""The model card of a student: the parts that dwakd writes, and the results of its evaluations.

Everything else in the card belongs to the user and is kept: text outside the markers, and metadata that is already set.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard

from dwakd.errors import reason_of
from dwakd.folders import write_file

logger = logging.getLogger(__name__)

CARD = "README.md"
RESULTS = "results"
_TOOL = "dwakd eval"
_METRICS = (
    ("rouge_l", "rouge", "ROUGE-L, sampled"),
    ("greedy_rouge_l", "rouge", "ROUGE-L, greedy"),
    ("exact_match", "exact_match", "exact match, sampled"),
    ("greedy_exact_match", "exact_match", "exact match, greedy"),
    ("bits_per_byte", "bits_per_byte", "bits per byte"),
)
"""Name in the results, type on the Hugging Face Hub, and heading."""
_NOTE = (
    "ROUGE-L (F1) and exact match are in percent, with 95 % bootstrap intervals over the rows. Sampled scores are means over "
    "the seeds. Bits per byte are those of the responses; lower is better."
)


def read_card(path: Path) -> ModelCard | None:
    """Read a model card. If its metadata is invalid, warn and return None, so that the file is kept as it is."""
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        logger.warning("%s is not updated, because its metadata is invalid: %s", path, reason_of(error))
        return None


def put_section(text: str, name: str, body: str) -> str:
    """Replace a marked section of a card, or append it if there is none."""
    section = f"{_marker(name)}\n{body.strip()}\n{_marker(f'end of {name}')}"
    pattern = re.compile(f"{re.escape(_marker(name))}.*?{re.escape(_marker(f'end of {name}'))}", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: section, text, count=1)
    return f"{text.rstrip()}\n\n{section}\n".lstrip("\n")


def has_section(text: str, name: str) -> bool:
    """Return whether a card has a marked section."""
    return _marker(name) in text


def _marker(name: str) -> str:
    return f"<!-- dwakd: {name} -->"


def update_results(student: Path) -> None:
    """Write the results in the student's folder eval/ into its card, if dwakd has written the card.

    The section "results" and dwakd's entries of `model-index` are replaced. Results of other weights than those evaluated
    last are left out.
    """
    path = student / CARD
    files = [file for file in sorted((student / "eval").glob("*.json")) if _is_evaluation(file)]
    if not files or not path.is_file() or not has_section(path.read_text(encoding="utf-8", errors="replace"), RESULTS):
        return
    card = read_card(path)
    if card is None:
        return
    read = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    digests = {name: one["signature"]["model"]["sha256"] for name, one in read.items()}
    last = digests[max(files, key=lambda file: file.stat().st_mtime).stem]
    found = {name: one for name, one in read.items() if digests[name] == last}
    before: list[EvalResult] = card.data.get("eval_results") or []
    others = [one for one in before if (one.metric_args or {}).get("evaluated_with") != _TOOL]
    card.data["eval_results"] = [*others, *(one for name, result in found.items() for one in _entries(name, result))]
    card.data["model_name"] = card.data.get("model_name") or student.resolve().name
    card.text = put_section(card.text, RESULTS, _table(found))
    write_file(path, str(card).encode())


def _is_evaluation(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["signature"]["model"]["sha256"])
    except (ValueError, LookupError, TypeError):
        return False


def _scores(result: dict[str, Any]) -> Iterator[tuple[str, str, float, list[float] | None]]:
    """Yield type, heading, value and interval of each metric that an evaluation has."""
    for key, kind, heading in _METRICS:
        if score := result.get(key):
            yield kind, heading, score.get("mean", score.get("value")), score.get("interval")


def _entries(name: str, result: dict[str, Any]) -> Iterator[EvalResult]:
    about: dict[str, Any] = {"task_type": "text-generation", "dataset_type": name, "dataset_name": name}
    for kind, heading, value, interval in _scores(result):
        arguments = {"evaluated_with": _TOOL, "rows": result["num_examples"]}
        arguments |= {"interval": [round(end, 3) for end in interval]} if interval else {}
        score = round(value, 3)
        yield EvalResult(metric_type=kind, metric_name=heading, metric_value=score, metric_args=arguments, **about)


def _table(results: dict[str, dict[str, Any]]) -> str:
    """Return the section with a row for each test set."""
    headings = [heading for key, _, heading in _METRICS if any(one.get(key) for one in results.values())]
    lines = [["test set", "rows", *headings], ["---"] * (len(headings) + 2)]
    for name, one in results.items():
        cells = {
            heading: f"{value:.3f}" if interval is None else "{:.2f} ({:.2f}–{:.2f})".format(value, *interval)
            for _, heading, value, interval in _scores(one)
        }
        lines.append([f"`{name}`", str(one["num_examples"]), *(cells.get(heading, "") for heading in headings)])
    return "\n".join(["## Results\n", *(f"| {' | '.join(line)} |" for line in lines), "", _NOTE])
