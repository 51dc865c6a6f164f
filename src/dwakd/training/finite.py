"""Detection of NaN and infinite values in the losses and the weights of a run."""

from collections import deque
from typing import Any, NoReturn

import torch
from torch import Tensor

from dwakd.errors import UserError


class FiniteCheck:
    """Ends a run when a training loss or a trained weight is NaN or infinite, or when the student gets no gradient.

    On a CPU a loss is checked at once. On an accelerator its value is copied to the host without waiting and is checked when
    the copy has arrived: usually one step later, and always in `finish`.

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
        while self._copies and self._first_arrived():
            self._check_first()

    def check_gradients(self) -> None:
        """Refuse a run whose student has had no gradient other than zero by its third step, or its last if that is earlier.

        Called after the gradients are clipped. Once a gradient is found, nothing is checked. Gradients that are sharded over
        processes are not checked.

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
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
            raise UserError(
                f"every gradient of the student is zero at step {step}, so nothing is trained: check the weights in loss, "
                "training.max_grad_norm, and lora_alpha and lora_dropout in student.peft"
            )

    def finish(self) -> None:
        """Wait for every loss and check it, and check the trained parameters as they are now.

        A weight of -inf is accepted: it is a legitimate bias of a token that is never predicted.

        Raises:
            UserError: a loss or a parameter is NaN or infinite; names the step.
        """
        while self._copies:
            event = self._copies[0][2]
            if event is not None:
                event.synchronize()
            self._check_first()
        trained = (parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad)
        if any(bool((tensor.isnan() | tensor.isposinf()).any()) for tensor in trained):
            self._fail(f"the weights contain NaN or inf after step {self.trainer.state.global_step} and are not saved")

    def _first_arrived(self) -> bool:
        event = self._copies[0][2]
        return event is None or bool(event.query())

    def _check_first(self) -> None:
        step, loss, _ = self._copies.popleft()
        if not loss.isfinite():
            self._fail(f"the loss is {loss.item()} at step {step}")

    def _fail(self, what: str) -> NoReturn:
        self._copies.clear()
        self.trainer.callback_handler.on_train_end(self.trainer.args, self.trainer.state, self.trainer.control)
        raise UserError(f"{what}: lower training.learning_rate, or set training.warmup_steps")
