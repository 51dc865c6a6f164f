"""Callbacks of a run: check for NaN and missing gradients, average the terms, measure steps, and show the progress bar."""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from dwakd.batch import PairedBatch
from dwakd.errors import UserError
from dwakd.training.on_policy import AnswerCounts, answer_metrics

logger = logging.getLogger(__name__)

_FIX = "lower training.learning_rate, or set training.warmup_steps"
SKIPPED = "skipped_steps"
ROWS_OF_STEP = "rows_of_step"
"""The name of the number of rows of an optimiser step, over all processes, in the state that checkpoints contain."""


def skipped_steps(state: Any) -> int:
    """Return the number of skipped steps since the beginning of a run, which its checkpoints contain."""
    return int(state.stateful_callbacks.get(SKIPPED, 0))


def check_rows_of_step(state: Any, rows: int, processes: int, checkpoint: str) -> None:
    """Raise UserError if the steps of this run have other numbers of rows than those of the run that saved a checkpoint."""
    before = state.stateful_callbacks.get(ROWS_OF_STEP, rows)  # older versions did not store it
    if before != rows:
        raise UserError(
            f"{checkpoint} has {before} rows in a step, but this run with {processes} processes has {rows}: set "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps so that the product is the same"
        )


class RunCallback(TrainerCallback):
    """Collect what is logged and the time of steps, and give later callbacks the student as `model`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seconds: list[float] = []
        """Time of each optimiser step from its first batch on, without logging, evaluation and saving."""
        self.answers = AnswerCounts()
        """Counts of the answers that the student has sampled."""
        self._start(0)

    def _start(self, step: int) -> None:
        self._first_step, self._num_seconds = step, len(self.seconds)
        self._terms: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._before: Any = ({}, {})
        self._tokens = [0.0, 0.0]
        self._skipped: set[int] = set()

    def add_tokens(self, batches: Sequence[PairedBatch]) -> float:
        """Count the student's tokens in the micro-batches of a step; return the number of response tokens."""
        responses = sum(batch.weight * sum(batch.student.num_rows) for batch in batches)
        read = sum(batch.weight * sum(batch.student.num_tokens) for batch in batches)
        self._tokens = [total + new for total, new in zip(self._tokens, (responses, read), strict=True)]
        self._before = dict(self._terms), dict(self._squares)
        return responses

    def add_output(self, output: dict[str, Any], weight: float) -> None:
        """Add the terms of a micro-batch, and the squared norms of their gradients if they were measured."""
        for name, value in output["terms"].items():
            self._terms[name] = self._terms.get(name, 0.0) + weight * value
        self.trainer.balance.add(output.get("gradient_squares", {}), weight)
        for name, value in output.get("gradient_squares", {}).items():
            self._squares[name] = self._squares.get(name, 0.0) + weight**2 * value

    def skip_step(self) -> None:
        """Leave the current step, whose gradients are discarded, out of the means."""
        self._terms, self._squares = self._before
        self._skipped.add(self.trainer.state.global_step)

    def metrics(self) -> dict[str, float]:
        """Return what is logged about the optimiser steps since the last call, over all ranks, without skipped steps.

        These are the mean of each term, the root mean square of the gradient norms, tokens per second, and properties of the
        student's answers. Seconds are without evaluation and saving.
        """
        counted = {SKIPPED: skipped_steps(self.trainer.state)} if self.trainer.args.max_skipped_steps else {}
        if not self._terms:
            return counted | ({"loss": math.nan} if self._skipped else {})
        seconds = sum(self.seconds[self._num_seconds :]) + time.perf_counter() - self._step_ended
        step, every = self.trainer.state.global_step, self.trainer.args.term_gradient_steps
        sums = torch.stack([*self._terms.values(), *self._squares.values()])
        counts = sums.new_tensor([*self._tokens, *self.answers.take()])
        sums, counts = (self.trainer.accelerator.reduce(values, "sum") for values in (sums, counts))
        steps = [index for index in range(self._first_step, step) if index not in self._skipped]
        num_measured = sum(index % every == 0 for index in steps) if every else 1
        means = (sums[: len(self._terms)] / max(len(steps), 1)).tolist()
        norms = (sums[len(self._terms) :] / max(num_measured, 1)).sqrt().tolist()
        responses, read = (counts[:2] / seconds).tolist()
        metrics = dict(zip(self._terms, means, strict=True))
        metrics |= {f"term_grad_norm/{name}": norm for name, norm in zip(self._squares, norms, strict=True)}
        metrics |= {"response_tokens_per_second": responses, "tokens_per_second": read, **answer_metrics(counts[2:])}
        metrics |= counted
        self._start(step)
        return metrics

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.callback_handler.model = self.trainer.student  # the Distiller has no `generate`
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if state.global_step:
            check_rows_of_step(state, rows, args.world_size, "the checkpoint")
        state.stateful_callbacks[ROWS_OF_STEP] = rows
        self._start(state.global_step)

    on_init_end = on_train_begin  # an evaluation may come before the training

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_ended = time.perf_counter()
        self.seconds.append(self._step_ended - self.trainer.step_started)


_SHOWN = ("ce", "kd", "kd_student", "alm", "uld", "jsd", "span", "absolute", "dtw_hidden")
_SCORES = ("bits_per_byte", "rouge_l", "t2s_accuracy", "teacher_accuracy")


class TermsProgressCallback(ProgressCallback):
    """A progress bar that shows the main terms of each step, and prints a line for each evaluation."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        is_evaluation = any(name.startswith("eval_") for name in logs)
        shown = [
            n for n in logs if (n.endswith(_SCORES) if is_evaluation else n.rpartition(".")[2] in ("loss", *_SHOWN))
        ]
        values = {name: f"{logs[name]:.3g}" for name in shown}
        if is_evaluation:
            self.training_bar.write(f"step {state.global_step}: " + ", ".join(f"{k} {v}" for k, v in values.items()))
        else:
            self.training_bar.set_postfix(values, refresh=False)


class _Copied(NamedTuple):
    """The loss of a micro-batch and its terms, in this order, on their way to the host."""

    step: int
    terms: list[str]
    rows: Sequence[int]
    values: Tensor
    event: torch.Event | None

    def problem(self) -> str | None:
        """Name the step, the terms and the rows if the loss is not finite; return None if it is."""
        loss, *terms = self.values.tolist()
        if math.isfinite(loss):
            return None
        found = (name for name, value in zip(self.terms, terms, strict=True) if not math.isfinite(value))
        names = ", ".join(name for name in found if name != "loss")
        shown = ", ".join(map(str, self.rows[:8])) + (f" and {len(self.rows) - 8} more" if len(self.rows) > 8 else "")
        where = "; ".join(filter(None, [names and f"terms: {names}", shown and f"training rows, from 0: {shown}"]))
        return f"the loss is {loss} at step {self.step}" + (f" ({where})" if where else "")


class FiniteCheck(TrainerCallback):
    """End a run when a training loss or a trained weight is NaN or infinite, or when the student gets no gradient.

    On a CPU, a loss is checked at once. On an accelerator, its value is copied to the host without waiting and is checked
    when the copy has arrived: usually one step later, and always in `finish`. With `max_skipped_steps`, it is always checked
    in its own step, whose gradients are discarded if the loss or the gradient of any rank is not finite.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._has_gradient = False
        self._problem: str | None = None
        self._copies: deque[_Copied] = deque()

    def add(self, loss: Tensor, terms: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        """Check a loss of the current step, and those of earlier steps whose copies have arrived.

        `terms` and `rows` are the terms of this loss and the indices of its rows in the data set, for the message.
        """
        event = None if loss.device.type == "cpu" else torch.Event(loss.device)
        values = torch.stack([loss.detach(), *terms.values()]).to("cpu", non_blocking=True)
        self._copies.append(_Copied(self.trainer.state.global_step + 1, list(terms), rows, values, event))
        if event is not None:
            event.record()
        self._check_arrived(wait=False)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a run whose student has had no gradient other than zero by its third step, or its last if that is earlier.

        Called after the gradients are clipped. Gradients that are sharded over processes are not checked.
        """
        trainer = self.trainer
        if args.max_skipped_steps and self._skips_step(args, state):
            return
        if self._has_gradient or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        gradients = (parameter.grad for parameter in trainer.student.parameters())
        self._has_gradient = any(bool(gradient.any()) for gradient in gradients if gradient is not None)
        step = state.global_step + 1
        if not self._has_gradient and step >= min(3, state.max_steps):
            self._fail(
                f"every gradient of the student is zero at step {step}, so nothing is trained: check the weights in loss, "
                "training.max_grad_norm, and lora_alpha and lora_dropout in student.peft"
            )

    def _skips_step(self, args: Any, state: Any) -> bool:
        """Discard the gradients of the current step if the loss or the gradient of any rank is not finite."""
        self._check_arrived(wait=True)
        problem, self._problem = self._problem, None
        parameters = [parameter for parameter in self.trainer.model.parameters() if parameter.grad is not None]
        if problem is None and self.trainer.accelerator.scaler is None:  # a scaler expects and skips infinite gradients
            local = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in parameters]
            norm = float(torch.nn.utils.get_total_norm(local))
            problem = (
                None if math.isfinite(norm) else f"the norm of the gradient is {norm} at step {state.global_step + 1}"
            )
        flag = torch.tensor(int(problem is not None), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if not flag:
            return False
        problem = problem or f"the loss or the gradient of another rank is not finite at step {state.global_step + 1}"
        number = skipped_steps(state) + 1
        if number > args.max_skipped_steps:
            self._fail(
                f"{problem}, and no more steps are skipped (training.max_skipped_steps={args.max_skipped_steps}): {_FIX}"
            )
        logger.warning("skipping a step (%d of at most %d): %s", number, args.max_skipped_steps, problem)
        state.stateful_callbacks[SKIPPED] = number
        for parameter in parameters:
            parameter.grad = None  # the optimiser then leaves the parameter and its state as they are
        self.trainer.clock.skip_step()
        self.trainer.balance.skip_step()
        return True

    def finish(self) -> None:
        """Wait for every loss and check it, and check the trained parameters as they are now.

        A weight of -inf is accepted: it is a legitimate bias of a token that is never predicted.
        """
        self._check_arrived(wait=True)
        trained: list[Any] = [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]
        own = (parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in trained)
        if any(bool((tensor.isnan() | tensor.isposinf()).any()) for tensor in own):
            step = self.trainer.state.global_step
            self._fail(f"the weights contain NaN or inf after step {step} and are not saved: {_FIX}")

    def _check_arrived(self, *, wait: bool) -> None:
        while self._copies:
            event = self._copies[0].event
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                return
            if problem := self._copies.popleft().problem():
                if not self.trainer.args.max_skipped_steps:
                    self._fail(f"{problem}: {_FIX}")
                self._problem = self._problem or problem

    def _fail(self, message: str) -> NoReturn:
        self._copies.clear()
        self.trainer.callback_handler.on_train_end(self.trainer.args, self.trainer.state, self.trainer.control)
        raise UserError(message)


@contextmanager
def out_of_memory_explained(trainer: Any) -> Iterator[None]:
    """Turn an error for lack of memory into a UserError that names the step and the options to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch reports a full CPU as a RuntimeError
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        args = trainer.args
        trainer.callback_handler.on_train_end(args, trainer.state, trainer.control)  # close the progress bar
        raise UserError(
            f"{args.device} has not enough memory for step {trainer.state.global_step + 1}: lower "
            f"training.per_device_train_batch_size (now {args.per_device_train_batch_size}) and raise "
            "training.gradient_accumulation_steps, set training.max_tokens_per_batch or training.gradient_checkpointing=true, "
            "lower data.max_length (now "
            f"{args.max_length}), or lower training.per_device_eval_batch_size (now {args.per_device_eval_batch_size}) if this "
            "was an evaluation"
        ) from error
