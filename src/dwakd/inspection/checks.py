"""Find common mistakes in how rows become tokens. docs/inspect.md says what to do about each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import AutoConfig, GenerationConfig

from dwakd.data.encoded import EncodedPairs
from dwakd.data.encoding import TextEncoder
from dwakd.inspection.tokens import NAMES, Summary
from dwakd.models.specs import only_cached, resolve_spec
from dwakd.recipe.sections import DataSection

Finding = tuple[str, str]
"""The name of a mistake, and what was found."""


def check_responses(summary: Summary, data: DataSection) -> Iterator[Finding]:
    """Yield what is wrong with the responses of a sample."""
    count, unmatched = len(summary.rows), len(summary.unmatched)
    if summary.skipped:
        reasons = ", ".join(f"{reason}: {len(rows)}" for reason, rows in summary.skipped.items())
        yield "rows left out", f"Some rows of the sample cannot be used ({reasons})."
    if summary.num_cut:
        cut = f"{summary.num_cut} of {count} responses are cut to fit data.max_length={data.max_length}"
        yield "answer cut", f"{cut}. They have no end token, so they do not teach the student to stop."
    for name, sides in zip(NAMES, zip(*(row.sides for row in summary.rows), strict=True), strict=False):
        if changed := [row.number for row, side in zip(summary.rows, sides, strict=True) if side.is_changed]:
            example = f"{len(changed)} of {count} responses, for example in row {changed[0]}"
            yield "text changed", f"The {name}'s tokenizer changes or drops text in {example}."
    if 10 * unmatched > len(summary.numbers):
        numbers = f"{unmatched} of {len(summary.numbers)} numbers of two or more digits are divided differently"
        lost = "Methods that leave out unmatched tokens or merge groups (dskd_v2, dwa_kd_v2, min_ed, gold) teach little of them"
        yield "numbers not matched", f"{numbers} by the two tokenizers. {lost}."


def check_prompts(pairs: EncodedPairs, data: DataSection, encoders: Sequence[TextEncoder]) -> Iterator[Finding]:
    """Yield what is wrong with the prompts of a sample."""
    tokenizers = dict(zip(NAMES, (encoder.tokenizer for encoder in encoders), strict=False))
    having = [name for name, tokenizer in tokenizers.items() if tokenizer.chat_template]
    if data.template != "chat" and having:
        unused = f"has a chat template, but data.template is {data.template!r}"
        yield "chat template not used", f"The tokenizer of the {' and of the '.join(having)} {unused}."
    with_bos, lacking = [], []
    for number, (name, tokenizer) in enumerate(tokenizers.items()):
        bos = tokenizer.bos_token_id
        if bos is not None and all((row.student, *row.teachers)[number].ids[0] == bos for row in pairs.rows):
            with_bos.append(name)
        elif bos is not None and tokenizer("a")["input_ids"][0] == bos:
            lacking.append(name)
    if lacking:
        usual = "usually puts a BOS token before a text, but the prompts have none"
        yield "BOS missing", f"The tokenizer of the {' and of the '.join(lacking)} {usual}."
    elif len(with_bos) == 1 < len(tokenizers):
        right = "This is right if the other model was trained without one, as GPT-2 and Qwen were"
        yield "BOS on one side only", f"Only the {with_bos[0]}'s prompts begin with a BOS token. {right}."


def check_end_tokens(specs: Sequence[str], encoders: Sequence[TextEncoder]) -> Iterator[Finding]:
    """Yield the models that are not configured to stop at the end token of the responses."""
    for name, spec, encoder in zip(NAMES, specs, encoders, strict=False):
        expected = stop_ids(spec)
        if expected and encoder.end_token_id not in expected:
            token, *others = encoder.tokenizer.convert_ids_to_tokens([encoder.end_token_id, *sorted(expected)])
            stops = f"the configuration of the {name} stops at {', '.join(map(str, others))}"
            yield "end token", f"Responses of the {name} end with {token}, but {stops}."


def check_ends(probabilities: Sequence[float]) -> Iterator[Finding]:
    """Yield the models that hardly ever predict the end token where responses end."""
    for name, value in zip(NAMES, probabilities, strict=False):
        if value < 0.1:
            where = "where the shown responses end"
            yield (
                "end token not predicted",
                f"The {name} gives the end token a mean probability of {value:.2g} {where}.",
            )


def stop_ids(spec: str) -> set[int] | None:
    """Return the ids of the tokens that end a generation of a model; None if its configuration does not tell."""
    location = resolve_spec(spec)
    for kind in (GenerationConfig, AutoConfig):
        try:
            config: Any = kind.from_pretrained(location, local_files_only=only_cached(location, None))
        except Exception:  # the folder has no such file, or code of the model would have to run
            continue
        if (found := config.eos_token_id) is not None:
            return set(found if isinstance(found, list) else [found])
    return None
