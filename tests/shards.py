"""Helpers for tests of files that are written in shards: kill a process that writes them, and record which rank wrote which."""

import os
import time
from pathlib import Path
from typing import Any

from tests.processes import start


def kill_after_first_shard(module: str, *arguments: object, shards: Path, seconds: float) -> None:
    """Run `python -m MODULE ARGUMENTS`, and kill it this many seconds after the first shard is in the folder `shards`."""
    log = shards.parent / "killed.log"
    process = start(module, *arguments, log=log)
    try:
        deadline = time.monotonic() + 200
        while not list(shards.glob("shard-*")):
            assert process.is_alive(), f"the process ended before it could be killed: {log.read_text()}"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(seconds)
    finally:
        process.kill()
        process.join()


def record_shards(owner: Any, folder: Path) -> None:
    """Let `owner.write_shard` append the number of each shard to the file of this rank, rank-R.txt in a folder."""
    write = owner.write_shard

    def recorded(self: Any, shard: int, content: Any) -> None:
        with (folder / f"rank-{os.environ['RANK']}.txt").open("a") as file:
            file.write(f"{shard}\n")
        write(self, shard, content)

    owner.write_shard = recorded
