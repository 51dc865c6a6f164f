"""Evaluation during training: exact means of every term, and metrics of answers to the evaluation prompts."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_utils import denumpify_detensorize

from dwakd.data.encoded import EncodedPairs
from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.environment import widest_float
from dwakd.errors import UserError
from dwakd.evaluation.generate import generate_answers
from dwakd.evaluation.metrics import references_of, rouge_l
from dwakd.evaluation.options import GenerationOptions
from dwakd.models.rows import evaluating
from dwakd.recipe.checks import check_best_metric, metric_names
from dwakd.recipe.training import DistillConfig
from dwakd.training.distiller import Distiller
from dwakd.training.inputs import Model
from dwakd.training.teachers import MicroBatch

Metrics = Callable[[EvalPrediction], dict[str, Any]]


def eval_loader(pairs: EncodedPairs, args: DistillConfig, collate_fn: Callable[..., Any]) -> DataLoader[Any]:
    """Return the batches of an evaluation set. Trainer.get_eval_dataloader would apply dataloader_drop_last."""
    workers, pin = args.dataloader_num_workers, args.dataloader_pin_memory
    return DataLoader(pairs, args.eval_batch_size, collate_fn=collate_fn, num_workers=workers, pin_memory=pin)


def mean_terms(
    distiller: Distiller, batches: Iterable[MicroBatch], add_ranks: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Compute the mean of every term over the response tokens of a data set, and the bits per byte of the responses.

    For a method that projects the teacher into the student's space, `t2s_accuracy` and `teacher_accuracy` are the shares of
    exactly aligned tokens that the projected teacher and the teacher itself predict correctly (see `count_correct`).
    `add_ranks` sums a tensor over all ranks.
    """
    sums: dict[str, Tensor] = {}
    correct: dict[str, Tensor] = {}
    counts = torch.zeros(2, dtype=torch.float64)
    with evaluating(distiller), torch.no_grad():
        for batch, sides, scales in batches:
            output = distiller(batch.student, sides, scales, num_tokens=1.0)
            for name, value in output["terms"].items():
                sums[name] = sums.get(name, 0.0) + batch.weight * value.to(widest_float(value.device))
            for name, value in output.get("counts", {}).items():
                correct[name] = correct.get(name, 0.0) + batch.weight * value.to(widest_float(value.device))
            num_bytes = batch.student.byte_ends.amax(-1).sum().item()
            counts += batch.weight * torch.tensor([sum(batch.student.num_rows), num_bytes])
    totals = add_ranks(torch.stack([*correct.values(), *sums.values(), *counts.to(next(iter(sums.values())))]))
    *values, num_tokens, num_bytes = totals.tolist()
    right, values = values[: len(correct)], values[len(correct) :]
    terms = {name: value / num_tokens for name, value in zip(sums, values, strict=True)}
    if correct and right[0] > 0:
        terms |= {
            f"{name}_accuracy": value / right[0] for name, value in zip(list(correct)[1:], right[1:], strict=True)
        }
    if "ce" in terms:
        terms["bits_per_byte"] = terms["ce"] * num_tokens / num_bytes / math.log(2)
    return terms


def choose_best(args: DistillConfig, sets: Sequence[str], *, own_metrics: bool) -> tuple[str, str]:
    """Return the evaluation set and the metric by which the best checkpoint is chosen, and check that they exist.

    With several sets, `metric_for_best_model` may name one, as in NAME_bits_per_byte. Otherwise it becomes that of the
    first set.

    Args:
        args: the training arguments.
        sets: names of the evaluation sets; the name of a single one is empty.
        own_metrics: whether there is a `compute_metrics`, whose names are not known yet.
    """
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    owner = max((name for name in sets if metric.startswith(f"{name}_")), key=len, default="")
    if not owner or metric in metric_names(args.method_options, rouge_l=True):
        owner = next(iter(sets), "")
        if owner and args.metric_for_best_model is not None:
            args.metric_for_best_model = f"{owner}_{metric}"
    else:
        metric = metric.removeprefix(f"{owner}_")
    if args.metric_for_best_model is not None and not own_metrics:
        check_best_metric(metric, args.method_options, rouge_l=args.eval_rouge_l)
    return owner, metric


def generated_metrics(
    model: Model,
    encoder: TextEncoder,
    examples: list[Example],
    args: DistillConfig,
    compute_metrics: Metrics | None,
    *,
    best: str,
) -> dict[str, float]:
    """Compute ROUGE-L of sampled answers (temperature 1, a fixed seed) if `eval_rouge_l` is set, and the user's metrics.

    `best` is the metric of this set by which the best checkpoint is chosen.
    """
    length, size = args.eval_max_new_tokens, args.per_device_eval_batch_size
    options = GenerationOptions(seed=args.seed, max_new_tokens=length, batch_size=size)
    answers = generate_answers(model, encoder, examples, options, progress=not args.disable_tqdm)
    references = [list(references_of(encoder.with_response(example))) for example in examples]
    metrics: dict[str, float] = {}
    if args.eval_rouge_l:
        scores = rouge_l(answers, references)
        metrics["rouge_l"] = sum(scores) / len(scores)
    if compute_metrics is None:
        return metrics
    own = plain_metrics(compute_metrics(EvalPrediction(predictions=answers, label_ids=references)))
    known = metric_names(args.method_options, rouge_l=True)
    if same := own.keys() & known:
        raise UserError(f"compute_metrics returned {min(same)!r}, which is the name of a metric of the run: rename it")
    value = own.get(best)
    if best not in known and not (isinstance(value, int | float) and math.isfinite(value)):
        raise UserError(f"metric_for_best_model is {best}, but compute_metrics returned {value!r} for it")
    return metrics | own


def plain_metrics(metrics: Any) -> dict[str, Any]:
    """Return the metrics of a user's function with plain numbers instead of those of numpy and torch, for JSON files."""
    if not isinstance(metrics, Mapping):
        raise UserError(f"compute_metrics must return a dict of numbers by name, got {type(metrics).__name__}")
    plain: dict[str, Any] = {}
    for name, value in denumpify_detensorize(dict(metrics)).items():
        plain[name] = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
        try:
            json.dumps(plain[name])
            valid = isinstance(name, str)
        except (TypeError, ValueError):
            valid = False
        if not valid:
            found = type(value).__name__
            raise UserError(f"compute_metrics must return one number for each name, but {name!r} is a {found}")
    return plain
