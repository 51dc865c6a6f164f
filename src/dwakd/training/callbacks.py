"""Callbacks of every run: the epoch of the sampler, the time of steps, and the progress bar."""

import time
from typing import Any

from transformers.trainer_callback import ProgressCallback, TrainerCallback


class RunCallback(TrainerCallback):
    """Prepare a run for its other callbacks, pass the epoch to the sampler, and measure the time of steps.

    The callbacks after it receive the student as `model`, because the module of student and loss has no `generate`. A
    resumed data loader does not pass the epoch to the sampler.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seconds: list[float] = []
        """Time of each optimiser step from its first batch on, without logging, evaluation and saving."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.callback_handler.model = self.trainer.student

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.callback_handler.model = self.trainer.student
        self.trainer.reset_terms()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.length_sampler is not None:
            self.trainer.length_sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.finite.check_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.trainer.step_started)


class TermsProgressCallback(ProgressCallback):
    """A progress bar that shows the latest terms instead of printing a line for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = ("loss", "ce", "kd_student", "dtw_hidden", "eval_bits_per_byte", "eval_rouge_l")
        values = {name: f"{logs[name]:.3g}" for name in shown if name in logs}
        if any(name.startswith("eval_") for name in logs):
            self.training_bar.write(f"step {state.global_step}: " + ", ".join(f"{k} {v}" for k, v in values.items()))
        else:
            self.training_bar.set_postfix(values, refresh=False)
