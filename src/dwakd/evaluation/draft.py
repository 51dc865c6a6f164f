"""Measure how many tokens of a draft model with another vocabulary a target model accepts: `dwakd eval --draft-for`.

transformers' universal assisted decoding answers the prompts as it does in use, and this module counts. In each step, the draft
model continues the text greedily by `lookahead` tokens, and the target's tokenizer encodes the new text. One call of the target
accepts these tokens up to the first that is not its own greedy choice, and adds that choice.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig, PreTrainedModel

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.evaluate import evaluation_signature, model_identity
from dwakd.evaluation.generate import answerable_prompts, max_positions, progress_bar
from dwakd.evaluation.metrics import RESAMPLES, Summary
from dwakd.evaluation.options import EvalOptions, RowOptions
from dwakd.evaluation.report import check_overwrite, signature_line
from dwakd.evaluation.run import load_for_evaluation, read_test_sets, results_folder, text_encoder_of, trained_folder
from dwakd.folders import write_file
from dwakd.models.loading import load_tokenizer
from dwakd.models.rows import evaluating


class Draft(NamedTuple):
    """A draft model with its tokenizer, and its target with tokenizer and template."""

    model: PreTrainedModel
    tokenizer: Any
    target: PreTrainedModel
    encoder: TextEncoder

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `generate`, or raise a UserError if transformers cannot combine the vocabularies."""
        sizes = [model.config.get_text_config().vocab_size for model in (self.model, self.target)]
        if sizes[0] != sizes[1]:
            names = {"tokenizer": self.encoder.tokenizer, "assistant_tokenizer": self.tokenizer}
            return {"assistant_model": self.model, **names}
        if self.tokenizer.get_vocab() != self.encoder.tokenizer.get_vocab():
            raise UserError(
                f"draft and target have different vocabularies of the same size, {sizes[0]}, which transformers takes for one "
                "vocabulary: give the draft more tokens with resize_token_embeddings"
            )
        return {"assistant_model": self.model}


class DraftCounts(NamedTuple):
    """Counts of one prompt: calls of the target, and tokens of its vocabulary that were proposed and accepted."""

    calls: int
    proposed: int
    accepted: int
    answer: list[int]
    """Token ids of the answer, which is the target's own greedy answer."""


@dataclass(frozen=True)
class DraftScores:
    """Result of `evaluate_draft`: quotients of sums over all prompts, with bootstrap intervals over the prompts.

    Args:
        accepted: accepted tokens per call of the target. An answer takes 1 / (1 + accepted) of the calls that it takes without
            the draft.
        acceptance_rate: accepted tokens in percent of the proposed ones; 0 if there are none.
        target_calls: calls of the target for all prompts.
        seconds: wall-clock time.
        signature: everything that the numbers depend on.
    """

    accepted: Summary
    acceptance_rate: Summary
    target_calls: int
    seconds: float
    signature: dict[str, Any]


def evaluate_draft(
    draft: Draft,
    examples: Sequence[Example],
    *,
    lookahead: int = 5,
    max_new_tokens: int = 256,
    signature: dict[str, Any] | None = None,
    progress: bool = True,
) -> DraftScores:
    """Count the tokens of a draft model that its target accepts under universal assisted decoding.

    Both models decode greedily. The draft reads the text of the target's prompt without special tokens.

    Args:
        lookahead: tokens that the draft adds in each step, in its own vocabulary.
        max_new_tokens: most tokens of an answer, in the target's vocabulary.
        signature: result of `draft_signature`, if the caller has computed it already.

    Raises:
        UserError: there are no rows, a prompt is empty or too long for the target or the draft, or transformers cannot combine
            the models.
    """
    started = time.perf_counter()
    if not examples:
        raise UserError("the evaluation data has no rows")
    prompts = check_prompts(draft, examples, max_new_tokens)
    with evaluating(draft.target), evaluating(draft.model), progress_bar(disable=not progress) as bar:
        counts = [
            count_accepted(draft, ids, lookahead, max_new_tokens) for ids in bar.track(prompts, description="drafts")
        ]
    calls, proposed, accepted = np.array([count[:3] for count in counts]).T
    signature = signature or draft_signature(draft, examples, lookahead, max_new_tokens)
    ratios = _ratio(accepted, calls), _ratio(100 * accepted, proposed)
    return DraftScores(*ratios, int(calls.sum()), time.perf_counter() - started, signature)


def check_prompts(
    draft: Draft, examples: Sequence[Example], max_new_tokens: int, source: str = "the examples"
) -> list[list[int]]:
    """Return the target's token ids of every prompt; raise a UserError if one has no room in the target or in the draft."""
    prompts = answerable_prompts(draft.target, draft.encoder, examples, source)
    positions = max_positions(draft.model)
    for example, ids in zip(examples, prompts, strict=True):
        text = draft.encoder.tokenizer.decode(ids, skip_special_tokens=True)
        num_read = len(draft.tokenizer(text)["input_ids"])
        if not num_read:
            raise UserError(
                f"{source}, {example.place}: the draft's tokenizer makes no token of the prompt; remove that row"
            )
        needed = num_read + max_new_tokens
        if needed > positions:
            raise UserError(
                f"{source}, {example.place}: the prompt and {max_new_tokens} new tokens may need {needed} tokens of the draft, "
                f"which has {positions} positions: shorten the prompt or lower --max-new-tokens"
            )
    return prompts


def count_accepted(draft: Draft, ids: list[int], lookahead: int, max_new_tokens: int) -> DraftCounts:
    """Answer one prompt of the target with the draft's help and count calls and tokens."""
    model, target, ends = draft.model, draft.target, draft.encoder.end_token_ids
    limit = min(max_new_tokens, max_positions(target) - len(ids))
    config = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
    drafting = GenerationConfig(num_assistant_tokens=lookahead, num_assistant_tokens_schedule="constant")
    drafting.assistant_confidence_threshold = 0.0  # an uncertain draft continues
    reads: list[int] = []  # number of tokens that each call of the target reads
    hook = target.register_forward_pre_hook(lambda *call: reads.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    saved = model.generation_config, target.generation_config  # `generate` reads the unset values from the models
    model.generation_config, target.generation_config = drafting, config
    inputs = torch.tensor([ids], device=target.device)
    try:
        mask = torch.ones_like(inputs)
        output = target.generate(inputs, attention_mask=mask, generation_config=config, **draft.arguments())
    finally:
        hook.remove()
        model.generation_config, target.generation_config = saved
    answer, calls = output[0, len(ids) :].tolist(), len(reads)
    # before the draft, the first call reads the prompt and every other call one token; each call adds a token of the target
    return DraftCounts(calls, sum(reads) - len(ids) - (calls - 1), len(answer) - calls, answer)


def draft_signature(
    draft: Draft, examples: Sequence[Example], lookahead: int, max_new_tokens: int, source: str = "rows in memory"
) -> dict[str, Any]:
    """Return everything that the result of `evaluate_draft` depends on; `source` is the name of the rows."""
    options = EvalOptions(max_new_tokens=max_new_tokens)
    full = evaluation_signature(draft.target, draft.encoder, examples, options, source=source)
    prompts = ("data", "template_date", "special_tokens_in_prompts", "template", "chat_template", "bos", "tokenizer")
    runs = ("max_new_tokens", "dtype", "device", "bootstrap_resamples", "versions")
    return {
        "metric": "tokens accepted per target call in greedy universal assisted decoding",
        "draft": model_identity(draft.model),
        "target": full["model"],
        "lookahead": lookahead,
        **{name: full[name] for name in (*prompts, *runs) if name in full},
    }


def evaluate_draft_sets(
    draft: str,
    target: str,
    data: Sequence[str],
    rows: RowOptions,
    *,
    lookahead: int = 5,
    max_new_tokens: int = 256,
    adapter: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> Group:
    """Measure a draft model on test sets, write draft/SET.draft.json in its folder, and return the table to print.

    The arguments are those of `evaluate_sets` and `evaluate_draft`. The folder is that of the adapter, if there is one. By
    default, the prompts have the template of the recipe in the adapter's or the draft's folder.
    """
    folder, sets = results_folder(adapter or draft, output, "draft"), read_test_sets(data, rows)
    encoder = text_encoder_of(target, rows, recipe_of=trained_folder(draft, adapter))
    pair = Draft(
        load_for_evaluation(draft, adapter=adapter), load_tokenizer(draft), load_for_evaluation(target), encoder
    )
    pair.arguments()
    table = Table(box=box.HORIZONTALS, show_edge=False, caption_justify="left")
    table.add_column("test set", overflow="fold")
    for heading in ("prompts", "accepted tokens\nper target call", "95 %\ninterval", "acceptance\nrate in %"):
        table.add_column(heading, justify="right")
    signatures = {}
    for item in sets:
        check_prompts(pair, item.examples, max_new_tokens, item.source)
        signatures[item.name] = draft_signature(pair, item.examples, lookahead, max_new_tokens, item.source)
        if not overwrite:
            check_overwrite(folder / f"{item.name}.draft.json", signatures[item.name])
    for item in sets:
        path, signature = folder / f"{item.name}.draft.json", signatures[item.name]
        scores = evaluate_draft(
            pair, item.examples, lookahead=lookahead, max_new_tokens=max_new_tokens, signature=signature
        )
        write_file(path, f"{json.dumps(asdict(scores), indent=2, ensure_ascii=False)}\n".encode())
        mean, interval, rate = scores.accepted.mean, scores.accepted.interval, scores.acceptance_rate.mean
        cells = f"{mean:.2f}", "{:.2f}–{:.2f}".format(*interval), f"{rate:.1f}"
        table.add_row(item.name, str(scores.accepted.n), *cells)
    caption = Text(signature_line(signature))
    return Group(table, caption, Text(f"scores with their signature: {folder}", no_wrap=True, overflow="ignore"))


def _ratio(parts: np.ndarray, wholes: np.ndarray) -> Summary:
    """Divide the sums over the prompts, with a reproducible bootstrap over the prompts."""
    rng, count = np.random.default_rng(0), len(parts)
    chosen = [rng.integers(count, size=count) for _ in range(RESAMPLES)]
    value, *values = (float(parts[rows].sum() / max(wholes[rows].sum(), 1)) for rows in [np.arange(count), *chosen])
    low, high = np.percentile(values, [2.5, 97.5])
    return Summary(value, None, count, (float(low), float(high)))
