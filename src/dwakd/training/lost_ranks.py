"""Explain the error of a rank that waits for another one which has ended or does not answer."""

import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import torch
from accelerate.utils import gather_object

from dwakd.errors import UserError, reason_of

_LOST = re.compile(r"gloo|NCCL|(closed|reset) by peer|timed out", re.IGNORECASE)
_SECONDS = 3.0


@contextmanager
def lost_ranks_explained(trainer: Any) -> Iterator[None]:
    """Turn an error of the communication between ranks into a UserError that names the ranks which have ended.

    Only processes on this machine can be looked up. The watchdog of NCCL may end the process before the error is raised.
    """
    peers = gather_object([(socket.gethostname(), os.getpid())]) if trainer.args.world_size > 1 else []
    try:
        yield
    except RuntimeError as error:
        if not peers or not (isinstance(error, torch.distributed.DistError) or _LOST.search(str(error))):
            raise
        deadline = time.monotonic() + _SECONDS  # the launcher needs a moment until a dead process is gone
        while not (ended := _ended(peers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        names = " and ".join(f"rank {rank}" for rank in ended)
        which = f"{names}, which {'has' if len(ended) == 1 else 'have'} ended" if ended else "another rank"
        slow = "" if ended else f", or raise training.ddp_timeout (now {trainer.args.ddp_timeout} s) if a rank is slow"
        raise UserError(
            f"rank {trainer.args.process_index} has lost the connection to {which}, at step {trainer.state.global_step + 1} "
            f"({reason_of(error):.200}): read the last messages of the other ranks, and continue with --resume{slow}"
        ) from error


def _ended(peers: Sequence[tuple[str, int]]) -> list[int]:
    """Return the ranks on this machine whose processes have ended."""
    return [rank for rank, (host, pid) in enumerate(peers) if host == socket.gethostname() and not _is_running(pid)]


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
