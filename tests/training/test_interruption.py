"""Test that SIGTERM and SIGUSR1 save a checkpoint from which a run continues bit-identically."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import TrainerCallback
from transformers.utils import chat_template_utils as clock

from dwakd.models.loading import load_causal_lm
from dwakd.recipe.recipe import load_recipe
from dwakd.training.interruption import INTERRUPTED, RunInterrupted, stops_on_signal
from dwakd.training.run import train
from dwakd.training.run_folder import last_checkpoint
from tests.builders import CHAT_TEMPLATE, byte_bpe
from tests.command_line import run
from tests.processes import start
from tests.training.builders import ROWS, assert_same, trainer, weights


class SignalInStep(TrainerCallback):
    """Send a signal to this process while a step is under way."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def test_a_process_ends_with_a_checkpoint_and_continues_bit_identically(workspace, tmp_path, monkeypatch, capsys):
    """A preempted job loses no step: when it is resumed, it gives the student of a run that was never stopped."""
    options = ["train", str(workspace / "recipe.yaml"), "training.max_steps=40", "-o"]
    log = tmp_path / "log"
    process = start("dwakd", *options, tmp_path / "stopped", log=log, threads=torch.get_num_threads())
    while process.is_alive() and not (log.exists() and re.search(r" [1-9]\d*/40 ", log.read_text())):
        time.sleep(0.02)
    process.terminate()
    process.join(60)
    assert process.exitcode == INTERRUPTED, log.read_text()
    log = log.read_text()
    assert "Traceback" not in log
    step = int(re.search(r"stopped by a signal after step (\d+); continue with --resume", log)[1])
    assert step < 40
    assert last_checkpoint(tmp_path / "stopped") == str(tmp_path / "stopped" / f"checkpoint-{step}")
    assert not (tmp_path / "stopped" / ".lock").exists()
    assert run(monkeypatch, capsys, *options, tmp_path / "stopped", "--resume")[0] == 0
    assert run(monkeypatch, capsys, *options, tmp_path / "whole")[0] == 0
    stopped, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "whole"))
    assert stopped == whole


def test_a_longer_run_that_was_stopped_is_not_finished(workspace, tmp_path):
    """The results of the shorter run are still in the folder; they must not be taken for those of the longer one."""
    options = ["training.save_strategy=steps", "training.save_steps=1", "training.lr_scheduler_type=constant"]
    recipes = [load_recipe(workspace / "recipe.yaml", [*options, f"training.max_steps={steps}"]) for steps in (2, 5)]
    train(recipes[0], tmp_path / "run")
    with pytest.raises(RunInterrupted):
        train(recipes[1], tmp_path / "run", resume=True, hook=lambda _: SignalInStep(signal.SIGTERM, 3))
    resumed = train(recipes[1], tmp_path / "run", resume=True)
    assert resumed.state.global_step == 5
    assert_same(weights(resumed), weights(train(recipes[1], tmp_path / "whole")))


def test_a_run_keeps_the_date_of_its_prompts(workspace, tmp_path, monkeypatch):
    """A run that is preempted over midnight continues with the same prompts, although its chat template prints the date."""
    tokenizer = byte_bpe()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "student")
    load_causal_lm(str(workspace / "student")).save_pretrained(tmp_path / "student")
    options = [f"student.model={tmp_path / 'student'}", "data.template=chat", "loss.method=sft", "training.max_steps=4"]
    recipe = load_recipe(workspace / "recipe.yaml", options)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "run", hook=lambda _: SignalInStep(signal.SIGTERM, 2))
    real = clock.datetime
    monkeypatch.setattr(clock, "datetime", type("Later", (), {"now": staticmethod(lambda: real(2031, 5, 6))}))
    assert_same(weights(train(recipe, tmp_path / "run", resume=True)), weights(whole))
    assert train(recipe, tmp_path / "later").student_encoder.printed_date == "2031-05-06"


@pytest.fixture
def default_interrupt():
    """Receive SIGINT as in a terminal; shells let background jobs ignore it, and the tests may run in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_background_job_still_ignores_ctrl_c(tmp_path):
    """Ctrl-C in a terminal reaches the jobs in its background as well, and shells let them ignore it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stops_on_signal(trainer(tmp_path)):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupt")
def test_ctrl_c_saves_a_checkpoint_and_a_second_one_ends_the_run_at_once(workspace, tmp_path, capfd):
    """The first Ctrl-C finishes the current step, saves a checkpoint and says so. The second one stops the run immediately."""
    recipe = load_recipe(workspace / "recipe.yaml", ["training.max_steps=4"])
    with pytest.raises(RunInterrupted, match="after step 2"):
        train(recipe, tmp_path / "run", hook=lambda _: SignalInStep(signal.SIGINT, 2))
    assert capfd.readouterr().err.count("press Ctrl-C again to end it at once") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")

    class Twice(SignalInStep):
        def on_step_begin(self, args, state, control, **kwargs):
            self.on_pre_optimizer_step(args, state, control)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", resume=True, hook=lambda _: Twice(signal.SIGINT, 3))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(recipe, tmp_path / "run", resume=True).state.global_step == 4


@pytest.mark.slow
def test_a_rank_that_dies_is_named(tmp_path):
    """The error of the network library names neither the rank nor the fix. Before, both ranks skip the same step."""
    # torchrun ends the first rank when it notices that the second has died. It looks only every 10 seconds here.
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--monitor-interval=10"]
    launch += ["-m", "tests.training.lost_rank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [sys.executable, *launch, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    message = (
        r"skipped on both ranks; .* has lost the connection to rank 1, which has ended, at step [34] \(.*\): .*--resume"
    )
    assert re.search(message, result.stdout), result.stderr[-3000:]


@pytest.mark.parametrize("step", [2, 4])
def test_the_best_checkpoint_and_the_evaluation_of_the_epoch_are_kept(step, tmp_path):
    """With save_total_limit 1, the end of a training would delete the checkpoint of the signal; the last step of an epoch or
    of a run is evaluated before the checkpoint, so that the history of the resumed run is complete."""
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "eval_rows": ROWS[:4], "eval_strategy": "epoch"}
    options |= {
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "greater_is_better": True,
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    stopped = trainer(tmp_path / "stopped", **options)
    stopped.add_callback(SignalInStep(signal.SIGTERM, step))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunInterrupted, match=f"after step {step}"), stops_on_signal(stopped):
        stopped.train()
    assert signal.getsignal(signal.SIGTERM) is before
    checkpoint = tmp_path / "stopped" / f"checkpoint-{step}"
    assert last_checkpoint(tmp_path / "stopped") == str(checkpoint)
    assert [entry["step"] for entry in stopped.state.log_history if "eval_loss" in entry] == [2, 4][: step // 2]
    if step == 2:
        resumed = trainer(tmp_path / "stopped", **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_same(weights(resumed), weights(whole))
        evaluated = [[e["eval_loss"] for e in one.state.log_history if "eval_loss" in e] for one in (resumed, whole)]
        assert evaluated[0] == evaluated[1]
