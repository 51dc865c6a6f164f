"""Test that NaN ends a run in the step in which it occurs and is never saved."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from dwakd import UserError
from dwakd.data.collator import collate
from dwakd.training.callbacks import FiniteCheck, TermsProgressCallback
from tests.training.builders import ROWS, trainer


@pytest.mark.parametrize("options", [{"logging_steps": 1}, {"logging_strategy": "no"}, {"logging_steps": 100}])
def test_a_loss_of_nan_ends_the_run_whatever_is_logged(tmp_path, options):
    """A loss of NaN ends the run at once, also in steps that are not logged."""
    run = trainer(tmp_path, learning_rate=1e30, lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=6, **options)
    with pytest.raises(UserError, match=r"the loss is \S+ at step [23]"):
        run.train()


def test_the_term_and_the_rows_of_nan_are_named(tmp_path, monkeypatch):
    """Without the rows and the term, a user must search the data for the row at which a method fails."""
    from dwakd.losses.dwa_kd import DwaKdLoss

    def broken(self, *args, **kwargs):
        output = compute(self, *args, **kwargs)
        broken.calls += 1
        if broken.calls == 2:
            output.terms["dtw_hidden"] = output.terms["dtw_hidden"] * torch.nan
            output = replace(output, loss=output.loss * torch.nan)
        return output

    compute, broken.calls = DwaKdLoss.forward, 0
    monkeypatch.setattr(DwaKdLoss, "forward", broken)
    run = trainer(tmp_path, rows=ROWS[:4], per_device_train_batch_size=2, gradient_accumulation_steps=2)
    seen = []
    run.data_collator = lambda features: seen.append([f["example_id"] for f in features]) or collate(features)
    with pytest.raises(UserError, match=r"the loss is nan at step 1 \(terms: dtw_hidden; training rows, ") as caught:
        run.train()
    assert f"from 0: {', '.join(map(str, seen[1]))})" in str(caught.value)


def test_steps_of_nan_are_skipped_and_counted(tmp_path, monkeypatch, caplog):
    """A skipped step must not change weights, optimiser or means; the count goes on after a resume."""
    from dwakd.losses.sft import SftLoss

    def broken(self, *args, **kwargs):
        output = compute(self, *args, **kwargs)
        broken.calls += 1
        factor = {3: torch.nan, 6: torch.inf}.get(broken.calls, 1.0)
        return replace(output, loss=output.loss * factor, terms={n: t * factor for n, t in output.terms.items()})

    compute, broken.calls = SftLoss.forward, 0
    monkeypatch.setattr(SftLoss, "forward", broken)
    options = {"method": "sft", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 2, "max_skipped_steps": 1}
    run, seen = trainer(tmp_path, **options), []
    step = torch.optim.AdamW.step

    def recorded(self, *args, **kwargs):
        step(self, *args, **kwargs)
        seen.append([p.detach().clone() for p in run.model.parameters()])
        seen[-1] += [state["exp_avg"].clone() for state in self.state.values()]

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    message = (
        r"the loss is inf at step 3 \(terms: ce; .*, and no more steps are skipped \(training.max_skipped_steps=1\)"
    )
    with pytest.raises(UserError, match=message):
        run.train()
    assert "skipping a step (1 of at most 1): the loss is nan at step 2 (terms: ce; training rows" in caplog.text
    assert all(map(torch.equal, seen[0], seen[1]))
    (log,) = run.state.log_history
    assert log["skipped_steps"] == 1
    assert log["loss"] == pytest.approx(log["ce"], rel=1e-6), "the means are those of the first step"
    resumed = trainer(tmp_path, **options)
    next(resumed.model.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(UserError, match="the norm of the gradient is nan at step 3"):
        resumed.train(resume_from_checkpoint=True)


def test_weights_with_nan_are_not_saved(tmp_path):
    """Weights are checked after the last step, whose effect no later loss shows."""
    options = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
    run = trainer(tmp_path / "a", **options, save_strategy="steps", save_steps=1)
    with torch.no_grad():
        run.student.model.norm.weight[3] = torch.nan
    with pytest.raises(UserError, match="NaN or inf"):
        run.save_model()
    assert not list((tmp_path / "a").glob("**/*.safetensors"))
    diverged = trainer(tmp_path / "b", **options)
    diverged.args.learning_rate = 3e38
    with pytest.raises(UserError, match=r"the weights contain NaN or inf after step 1"):
        diverged.train()


@pytest.mark.parametrize(
    "options",
    [
        {"loss_options": {"ce_weight": 0.0, "kd_weight": 0.0, "dtw_weight": 0.0}},
        {"loss_options": {"ce_weight": 1e30}},
        {"max_grad_norm": 1e-320},
    ],
)
def test_a_run_in_which_the_student_gets_no_gradient_ends(tmp_path, options):
    """A run ends with an error if the student gets no gradient, for example because all loss weights are 0."""
    run = trainer(tmp_path, max_steps=6, **options)
    with pytest.raises(UserError, match=r"every gradient of the student is zero at step 3|the loss is"):
        run.train()


class OnAccelerator(torch.Tensor):
    """A tensor that reports a GPU as its device."""

    @property
    def device(self):
        return torch.device("cuda")


def test_losses_on_an_accelerator_are_checked_without_waiting(monkeypatch):
    """On a GPU, losses are copied and checked without waiting for the device."""
    events = []

    class Event:
        arrived = False

        def __init__(self, device):
            events.append(self)

        def record(self):
            self.recorded = True

        def query(self):
            return self.arrived

        def synchronize(self):
            self.arrived = True

    monkeypatch.setattr(torch, "Event", Event)
    run = finished_run()
    check = FiniteCheck(run)
    good, bad = (torch.tensor(value).as_subclass(OnAccelerator) for value in (1.0, torch.nan))
    for run.state.global_step, loss in enumerate((good, bad, good)):
        check.add(loss, {}, ())
    run.callback_handler.on_train_end.assert_not_called()
    events[0].arrived = events[1].arrived = True
    with pytest.raises(UserError, match="step 2"):
        check.add(good, {}, ())
    run.callback_handler.on_train_end.assert_called_once()
    run.state.global_step = 4
    check.add(bad, {"ce": good, "kd": bad, "dtw": bad}, range(20))
    with pytest.raises(
        UserError, match=r"step 5 \(terms: kd, dtw; training rows, from 0: 0, 1, 2, 3, 4, 5, 6, 7 and 12 more\)"
    ):
        check.finish()


def test_a_forbidden_token_may_keep_its_bias():
    """A bias of -inf, by which a head forbids unused tokens, is accepted."""
    FiniteCheck(finished_run()).finish()


def finished_run() -> Mock:
    """Return a trainer whose model has a bias of -inf."""
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[1] = -torch.inf
    return Mock(model=model, args=Mock(max_skipped_steps=0))


def test_tokens_per_second_and_the_norms_of_the_terms(tmp_path):
    """Evaluation and saving are not training, and padding is not text."""
    options = {"method": "sft", "logging_steps": 2, "term_gradient_steps": 3, "eval_rows": ROWS}
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=1, **options)
    run.train()
    first, second = (log for log in run.state.log_history if "ce" in log)
    sides = [row.student for row in run.train_dataset.rows]
    responses, read = sum(len(side.byte_ends) for side in sides), sum(side.length for side in sides)
    seconds = [sum(run.clock.seconds[:2]), sum(run.clock.seconds[2:])]
    names = ("response_tokens_per_second", "tokens_per_second")
    for name, count in zip(names, (responses, read), strict=True):  # four steps of four rows are an epoch
        total = sum(log[name] * time for log, time in zip((first, second), seconds, strict=True))
        assert 0.6 * count < total <= count
    assert first["term_grad_norm/ce"] > 0
    assert second["term_grad_norm/ce"] > 0, "measured at the first and the fourth step"
    assert "term_grad_norm/ce" not in trainer(tmp_path / "off", method="sft").state.log_history


def test_the_progress_bar_shows_the_main_terms():
    """Terms of sums have the name of their method, and several evaluation sets have their own names."""
    state, shown = Mock(is_world_process_zero=True, global_step=3), TermsProgressCallback()
    shown.training_bar = Mock()
    logs = {"loss": 1.0, "grad_norm": 2.0, "ce": 0.5, "dwa_kd.kd_student": 0.25, "dwa_kd.t2s_ce": 9.0, "alm.alm": 0.001}
    shown.on_log(None, state, None, logs)
    expected = {"loss": "1", "ce": "0.5", "dwa_kd.kd_student": "0.25", "alm.alm": "0.001"}
    shown.training_bar.set_postfix.assert_called_once_with(expected, refresh=False)
    shown.on_log(None, state, None, {"eval_short_loss": 1.5, "eval_short_bits_per_byte": 1.25, "epoch": 1.0})
    shown.training_bar.write.assert_called_once_with("step 3: eval_short_bits_per_byte 1.25")
