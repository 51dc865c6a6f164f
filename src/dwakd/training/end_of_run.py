"""Leave the process group of torchrun at the end of a command."""

import os
import sys

import torch

from dwakd.environment import global_rank


def end_other_ranks(code: int = 0) -> None:
    """Leave the process group together with the other ranks, and end all of them except the first, with `code`.

    The first one may then work for hours, for which the others would wait no longer than the time limit of the group. A
    rank that exits without the others aborts them.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        if global_rank() != 0:
            _exit(code)


def end_of_run(code: int = 0) -> None:
    """Call `end_other_ranks`, and end the first rank as well.

    Returns only if there is one process, which then exits as usual.
    """
    end_other_ranks(code)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _exit(code)


def _exit(code: int) -> None:
    """End the process at once: threads of gloo can outlive the interpreter and abort the process at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
