"""Evaluation during training: exact means of every term, and answers to the evaluation prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction
from transformers.trainer_utils import denumpify_detensorize

from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.generate import generate_answers
from dwakd.evaluation.metrics import references_of, rouge_l
from dwakd.evaluation.options import GenerationOptions
from dwakd.losses import method_class
from dwakd.training.config import DistillConfig
from dwakd.training.sampler import cut_repeats

if TYPE_CHECKING:
    from dwakd.training.trainer import DistillTrainer


def eval_terms(trainer: DistillTrainer, dataloader: DataLoader[Any]) -> dict[str, float]:
    """Every term summed over the set and divided by its response tokens, and the bits per byte of the response."""
    distiller = trainer.accelerator.unwrap_model(trainer.model)
    was_training = distiller.training
    distiller.eval()
    sums: dict[str, torch.Tensor] = {}
    counts = torch.zeros(2, dtype=torch.float64)
    for batch in tqdm(dataloader, desc="evaluating", delay=2, leave=False, disable=trainer.args.disable_tqdm):
        prepared = trainer._prepare_input(batch)
        cut_repeats([prepared], trainer.accelerator.gradient_state, trainer.args)
        trainer.attach_teachers([prepared])
        with torch.no_grad():
            output = distiller(*trainer.forward_inputs(prepared, num_tokens=1.0))
        for name, value in output["terms"].items():
            sums[name] = sums.get(name, 0.0) + prepared["share"] * value.double()
        counts += prepared["share"] * torch.tensor(
            [
                prepared["student_response_mask"].sum().item(),
                prepared["student_byte_ends"].amax(-1).sum().item(),
            ]
        )
    distiller.train(was_training)
    totals = torch.stack([*sums.values(), *counts.to(next(iter(sums.values())))])
    *values, num_tokens, num_bytes = trainer.accelerator.reduce(totals, "sum").tolist()
    terms = {name: value / num_tokens for name, value in zip(sums, values, strict=True)}
    if "ce" in terms:
        terms["bits_per_byte"] = terms["ce"] * num_tokens / num_bytes / math.log(2)
    return terms


def generated_metrics(trainer: DistillTrainer, examples: list[Example]) -> dict[str, float]:
    """ROUGE-L of sampled answers (temperature 1, a fixed seed), and the user's own metrics of them."""
    answers = generate_answers(
        trainer.student,
        trainer.student_encoder,
        examples,
        GenerationOptions(
            seed=trainer.args.seed,
            max_new_tokens=trainer.args.eval_max_new_tokens,
            batch_size=trainer.args.per_device_eval_batch_size,
        ),
        progress=not trainer.args.disable_tqdm,
    )
    references = [list(references_of(example)) for example in examples]
    metrics: dict[str, float] = {}
    if trainer.args.eval_rouge_l:
        scores = rouge_l(answers, references)
        metrics["rouge_l"] = sum(scores) / len(scores)
    if trainer.metrics_function:
        own = plain_metrics(trainer.metrics_function(EvalPrediction(predictions=answers, label_ids=references)))
        known, best = known_metrics(trainer.args), best_metric(trainer.args)
        for name in own:
            if name in known:
                raise UserError(
                    f"compute_metrics returned {name!r}, which is the name of a metric of the run: rename it"
                )
        value = own.get(best or "", 0.0)
        if (
            best is not None
            and best not in known
            and (best not in own or not isinstance(value, int | float) or not math.isfinite(value))
        ):
            raise UserError(f"metric_for_best_model is {best}, but compute_metrics returned {own.get(best)!r} for it")
        metrics |= own
    return metrics


def best_metric(args: DistillConfig) -> str | None:
    """The metric by which checkpoints are compared, without its prefix; None if they are not compared."""
    if args.metric_for_best_model is None:
        return None
    return args.metric_for_best_model.removeprefix("eval_")


def known_metrics(args: DistillConfig) -> set[str]:
    """The names of the metrics that an evaluation reports without `compute_metrics`."""
    return {*method_class(args.method).terms, "loss", "bits_per_byte", "rouge_l"}


def check_best_metric(args: DistillConfig, has_own: bool) -> None:
    """Refuse a metric for the best model that no evaluation reports.

    Args:
        args: of the run.
        has_own: whether there is a `compute_metrics`.

    Raises:
        UserError: lists the metrics that exist.
    """
    best, known = best_metric(args), known_metrics(args)
    if best is not None and best not in known and not has_own:
        raise UserError(f"unknown metric_for_best_model {best}; valid ones: {', '.join(sorted(known))}")


def plain_metrics(metrics: Any) -> dict[str, Any]:
    """The metrics of a user's function with numbers of numpy and torch as plain numbers, ready for JSON files.

    Raises:
        UserError: not a dict by name, or a value that JSON cannot hold; names the metric.
    """
    if not isinstance(metrics, Mapping):
        raise UserError(f"compute_metrics must return a dict of numbers by name, got {type(metrics).__name__}")
    plain: dict[str, Any] = {}
    for name, value in denumpify_detensorize(dict(metrics)).items():
        if not isinstance(name, str):
            raise UserError(f"compute_metrics must return numbers by name, but one of its names is {name!r}")
        plain[name] = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
        try:
            json.dumps({name: plain[name]})
        except (TypeError, ValueError) as error:
            raise UserError(
                f"compute_metrics must return numbers by name, but {name!r} is a {type(value).__name__}: return one number "
                "for each metric"
            ) from error
    return plain
