"""Kill trainings on one and two ranks at random times, resume them, and compare their students with uninterrupted ones.

`python -m tests.long.kills --kills 50` takes minutes on an idle core. Each rank is a process that runs `dwakd train`. It is
forked after the imports, so that the kills fall into the work. As torchrun does, the test ends the other ranks when one dies.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import yaml

from dwakd.cli import main
from dwakd.training import run as imported_before_the_fork  # noqa: F401
from tests.builders import byte_bpe, tiny_model
from tests.command_line import make_workspace

GRACE_SECONDS = 30
STOPPED = 75
STEPS = 24
OPTIONS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "seed": 7,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 1,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "disable_tqdm": True,
}


def prepare(folder: Path) -> None:
    """Write models and a recipe with dropout, so that the random state matters, and with learned maps."""
    make_workspace(folder)
    tokenizer = byte_bpe()
    student = tiny_model("gpt2", len(tokenizer))
    student.config.update({"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})
    student.save_pretrained(folder / "student")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["training"] = OPTIONS
    recipe["data"]["eval"] = recipe["data"]["train"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def fork(work: Any, log: Path, **environment: object) -> int:
    """Run a function in a new process, with its output in a file, and return the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= {name: str(value) for name, value in environment.items()}
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Attempt:
    """One start of `dwakd train --resume` on some ranks. `cpu_seconds`: time of the processor that rank 0 has used."""

    def __init__(self, workspace: Path, folder: Path, world: int) -> None:
        sys.argv = ["dwakd", "train", str(workspace / "recipe.yaml"), "-o", str(folder), "--resume"]
        self.log, self.codes = folder.with_suffix(".log"), dict[int, int]()
        self.start = self.log.stat().st_size if self.log.exists() else 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.pids = [
            fork(main, self.log, **({**ranks, "RANK": rank, "LOCAL_RANK": rank} if world > 1 else {}))
            for rank in range(world)
        ]
        self.cpu_seconds = 0.0

    def running(self) -> list[int]:
        """Return the ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def finish(self, kill: tuple[float, int, list[int]] | None) -> tuple[bool, bool]:
        """Wait for the end and send a signal to some ranks on the way; return whether it arrived and whether all succeeded."""
        arrived, asked = False, None
        while ranks := self.running():
            now = time.monotonic()
            if 0 in ranks:  # time of the processor does not depend on what else runs on the machine
                used = psutil.Process(self.pids[0]).cpu_times()
                self.cpu_seconds = used.user + used.system
            if kill is not None and not arrived and self.cpu_seconds >= kill[0]:
                arrived = True
                for rank in set(kill[2]) & set(ranks):
                    os.kill(self.pids[rank], kill[1])
            if asked is None and any(code not in (0, STOPPED) for code in self.codes.values()):
                asked = now
                for rank in ranks:
                    os.kill(self.pids[rank], signal.SIGTERM)
            if asked is not None and now > asked + GRACE_SECONDS:
                for rank in ranks:
                    os.kill(self.pids[rank], signal.SIGKILL)
            time.sleep(0.005)
        text = self.log.read_text(errors="replace")[self.start :]
        done = all(code == 0 for code in self.codes.values())
        assert done or arrived, f"ended with {self.codes} without a signal:\n{text[-3000:]}"
        return arrived and not done, done


def result(folder: Path) -> dict[str, Any]:
    """Return what must be equal: the student, the maps of the loss, and the logs without times and summary.

    A run that is stopped after its last step has no summary.
    """
    state = json.loads((folder / "trainer_state.json").read_text())
    logs = [
        {k: v for k, v in log.items() if "per_second" not in k and "runtime" not in k}
        for log in state["log_history"]
        if "train_runtime" not in log
    ]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("**/*.safetensors")}
    checkpoints = {name for name in files if name.startswith("checkpoint-")}
    return {"logs": logs, "files": {name: data for name, data in files.items() if name not in checkpoints}}


def chains(workspace: Path, world: int, kills: int, random_: random.Random) -> Counter[str]:
    """Kill chains of resumed runs until `kills` signals have ended a run, and compare each chain's student."""
    counts: Counter[str] = Counter()
    whole = workspace / f"whole-{world}"
    attempt = Attempt(workspace, whole, world)
    assert attempt.finish(None)[1]
    seconds, expected = attempt.cpu_seconds, result(whole)
    while counts["kills"] < kills:
        folder = workspace / f"chain-{world}-{counts['chains']}"
        counts["chains"] += 1
        done = False
        while not done:
            number = (signal.SIGKILL, signal.SIGTERM)[counts["kills"] % 2]
            ranks = random_.choice([[rank] for rank in range(world)] + [list(range(world))])
            kill = (random_.uniform(0, seconds), number, ranks) if counts["kills"] < kills else None
            killed, done = Attempt(workspace, folder, world).finish(kill)
            counts["kills"] += killed
            counts[signal.Signals(number).name] += killed
            print(f"{seconds:.1f} s, {world} ranks, chain {counts['chains']}: {dict(counts)}", flush=True)
        log = folder.with_suffix(".log").read_text(errors="replace")
        counts["checkpoints that were incomplete and skipped"] += len(re.findall("skipping checkpoint", log))
        counts["checkpoints on signal"] += len(re.findall("stopped by a signal after step", log))
        assert result(folder) == expected, f"{folder} differs from {whole}"
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as name:
        place, start = Path(name), time.monotonic()
        os.waitpid(fork(lambda: prepare(place), place / "prepare.log"), 0)
        total: Counter[str] = Counter()
        for size in given.ranks:
            total += chains(place, size, given.kills // len(given.ranks), random.Random(f"{given.seed} {size}"))
        print(
            f"every student is bit-identical to the uninterrupted one: {dict(total)}, {time.monotonic() - start:.0f} s"
        )
