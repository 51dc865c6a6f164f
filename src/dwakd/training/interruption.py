"""Save a checkpoint and end a run on Ctrl-C, and on SIGTERM and SIGUSR1, which Slurm can send before it ends a job."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

INTERRUPTED = 75
"""Exit code of a run that can be continued with --resume (EX_TEMPFAIL of sysexits.h)."""

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_ON_INTERRUPT = b"\nCtrl-C: the run ends with a checkpoint after this step; press Ctrl-C again to end it at once\n"


class RunInterrupted(Exception):  # noqa: N818 (no error: the run can be continued)
    """Training has ended after a signal, and its checkpoint is complete on every rank."""


class StopOnSignal(TrainerCallback):
    """Save a checkpoint at the end of the optimiser step in which any rank received a signal, then raise RunInterrupted.

    The ranks agree in each step, because all of them must save the same step. An evaluation that is due at this step
    runs before the checkpoint, so that the resumed run has the same history.
    """

    def __init__(self) -> None:
        self.received = False
        self._stopping = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop = self.received
        if args.world_size > 1:
            flag = torch.tensor(int(stop), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            stop = bool(flag)
        epoch_ends = control.should_training_stop or float(state.epoch).is_integer()
        epoch_ends = epoch_ends and "epoch" in (args.eval_strategy, args.save_strategy)
        self._stopping = stop
        if stop and not epoch_ends:  # otherwise, the checkpoint follows the evaluation of this epoch
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stopping:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._stopping:
            return
        if args.world_size > 1:
            torch.distributed.barrier()  # a rank that exits first would abort the others while they write
        raise RunInterrupted(f"stopped by a signal after step {state.global_step}; continue with --resume")


@contextlib.contextmanager
def stops_on_signal(trainer: Any) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGUSR1 stop a trainer in a `with` block; outside the main thread, signals cannot be received.

    A second Ctrl-C is a KeyboardInterrupt; other repeated signals change nothing. Before and after the block, a signal ends
    the process at once.
    """
    callback = StopOnSignal()

    def receive(*_: Any) -> None:
        callback.received = True

    def interrupt(number: int, frame: Any) -> None:
        signal.signal(number, signal.default_int_handler)
        if os.getpid() == own:  # a data loader's workers inherit this function
            os.write(2, _ON_INTERRUPT)  # print() is not reentrant
        receive()

    trainer.add_callback(callback)
    own, main = os.getpid(), threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, receive) for number in _SIGNALS} if main else {}
    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup and shells ignore it for jobs
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except RunInterrupted:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # close bar and trackers
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trainer.remove_callback(callback)
