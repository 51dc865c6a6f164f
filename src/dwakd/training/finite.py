"""Detection of NaN and infinite values in the losses and the weights of a run."""

from collections import deque
from typing import Any, NoReturn

import torch
from torch import Tensor

from dwakd.errors import UserError

_FIX = "lower training.learning_rate, or set training.warmup_steps"


class FiniteCheck:
    """End a run when a training loss or a trained weight is NaN or infinite, or when the student gets no gradient.

    On a CPU, a loss is checked at once. On an accelerator, its value is copied to the host without waiting and is checked
    when the copy has arrived: usually one step later, and always in `finish`.

    Args:
        trainer: gives the model, the state of the run, and the callbacks that close progress bars and trackers.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._has_gradient = False
        self._copies: deque[tuple[int, Tensor, torch.Event | None]] = deque()

    def add(self, loss: Tensor) -> None:
        """Check a loss of the current step, and those of earlier steps whose copies have arrived.

        Raises:
            UserError: a loss is NaN or infinite; names the step.
        """
        event = None if loss.device.type == "cpu" else torch.Event(loss.device)
        self._copies.append((self.trainer.state.global_step + 1, loss.detach().to("cpu", non_blocking=True), event))
        if event is not None:
            event.record()
        self._check_arrived(wait=False)

    def check_gradients(self) -> None:
        """Refuse a run whose student has had no gradient other than zero by its third step, or its last if that is earlier.

        Called after the gradients are clipped. Gradients that are sharded over processes are not checked.

        Raises:
            UserError: names the options that can cause it.
        """
        trainer = self.trainer
        if self._has_gradient or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        gradients = (parameter.grad for parameter in trainer.student.parameters())
        self._has_gradient = any(bool(gradient.any()) for gradient in gradients if gradient is not None)
        step = trainer.state.global_step + 1
        if not self._has_gradient and step >= min(3, trainer.state.max_steps):
            self._fail(
                f"every gradient of the student is zero at step {step}, so nothing is trained: check the weights in loss, "
                "training.max_grad_norm, and lora_alpha and lora_dropout in student.peft"
            )

    def finish(self) -> None:
        """Wait for every loss and check it, and check the trained parameters as they are now.

        A weight of -inf is accepted: it is a legitimate bias of a token that is never predicted.

        Raises:
            UserError: a loss or a parameter is NaN or infinite; names the step.
        """
        self._check_arrived(wait=True)
        trained = (parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad)
        if any(bool((tensor.isnan() | tensor.isposinf()).any()) for tensor in trained):
            step = self.trainer.state.global_step
            self._fail(f"the weights contain NaN or inf after step {step} and are not saved: {_FIX}")

    def _check_arrived(self, *, wait: bool) -> None:
        while self._copies:
            step, loss, event = self._copies[0]
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                return
            self._copies.popleft()
            if not loss.isfinite():
                self._fail(f"the loss is {loss.item()} at step {step}: {_FIX}")

    def _fail(self, message: str) -> NoReturn:
        self._copies.clear()
        self.trainer.callback_handler.on_train_end(self.trainer.args, self.trainer.state, self.trainer.control)
        raise UserError(message)
