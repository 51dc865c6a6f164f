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
from dwakd.evaluation.rouge import references_of, rouge_l
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
        seed=trainer.args.seed,
        max_new_tokens=trainer.args.eval_max_new_tokens,
        batch_size=trainer.args.per_device_eval_batch_size,
        progress=not trainer.args.disable_tqdm,
    )
    references = [list(references_of(example)) for example in examples]
    metrics: dict[str, float] = {}
    if trainer.args.eval_rouge_l:
        scores = rouge_l(answers, references)
        metrics["rouge_l"] = sum(scores) / len(scores)
    if trainer.metrics_function:
        own = trainer.metrics_function(EvalPrediction(predictions=answers, label_ids=references))
        metrics |= plain_metrics(own)
    return metrics


def plain_metrics(metrics: Any) -> dict[str, Any]:
    """The metrics of a user's function with numbers of numpy and torch as plain numbers, ready for JSON files.

    Raises:
        UserError: not a dict by name, or a value that JSON cannot hold; names the metric.
    """
    if not isinstance(metrics, Mapping):
        raise UserError(f"compute_metrics must return a dict of numbers by name, got {type(metrics).__name__}")
    plain: dict[str, Any] = {}
    for name, value in denumpify_detensorize(dict(metrics)).items():
        plain[name] = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
        try:
            json.dumps({name: plain[name]})
        except (TypeError, ValueError) as error:
            raise UserError(
                f"compute_metrics must return numbers by name, but {name!r} is a {type(value).__name__}: return one number "
                "for each metric"
            ) from error
    return plain
