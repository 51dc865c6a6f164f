"""Test runs that train with a sum of methods."""

import json

import pytest
import yaml

from dwakd import DistillConfig, DistillTrainer, UserError
from tests.builders import bpe_byte_fallback, byte_bpe, tiny_model, wordpiece
from tests.command_line import run as call
from tests.training.builders import ROWS, assert_same, trainer, weights

LOSSES = [{"method": "dwa_kd", "gamma_end": 0.5, "gamma_steps": 4}, {"method": "min_ed", "weight": 0.5}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student and two teachers, saved with their tokenizers."""
    root, saved = tmp_path_factory.mktemp("models"), []
    tokenizers = byte_bpe(), bpe_byte_fallback(), wordpiece(vocab_size=200)
    for seed, (family, tokenizer) in enumerate(zip(("llama", "gemma2", "gpt2"), tokenizers, strict=True)):
        tiny_model(family, len(tokenizer), seed=seed).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
        saved.append(str(root / family))
    return saved


def test_accumulation_changes_nothing_and_a_run_resumes(tmp_path):
    """Gradient accumulation does not change a run, and checkpoints contain the maps and steps of all parts."""
    options = {"method": "sum", "loss_options": {"losses": LOSSES}, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    split = trainer(tmp_path / "s", **options, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    split.train()
    assert_same(weights(split), weights(whole), atol=2e-4)
    resumed = trainer(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(weights(resumed), weights(whole))


def test_two_teachers(tmp_path, folders):
    """Each teacher has its own sum, with its own maps and alignment. The gate is that of dwa_kd."""
    args = DistillConfig(
        output_dir=str(tmp_path),
        method="sum",
        loss_options={"losses": LOSSES},
        max_steps=2,
        template="plain",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    run = DistillTrainer(folders[0], folders[1:], args, ROWS, ROWS[:2])
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_gate_1"] + metrics["eval_gate_2"] == pytest.approx(1, abs=1e-5)
    assert metrics["eval_min_ed.kd"] > 0


def test_two_tokenizers_are_refused(tmp_path):
    """The message names the part that requires one tokenizer."""
    losses = {"losses": [{"method": "alm"}, {"method": "kd"}]}
    with pytest.raises(UserError, match="method kd requires a teacher with the student's tokenizer"):
        trainer(tmp_path, method="sum", loss_options=losses, two_tokenizers=True)


def test_a_recipe_lists_the_methods(tmp_path, folders, monkeypatch, capsys):
    """A recipe with a list of methods trains: with a cache, overrides of a part, metrics of parts, and a saved recipe."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    training |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    recipe = {
        "student": {"model": folders[0]},
        "teacher": {"model": folders[1], "cache": str(tmp_path / "cache")},
        "data": {"train": str(rows), "eval": str(rows), "template": "plain"},
        "loss": LOSSES,
        "training": {**training, "metric_for_best_model": "min_ed.kd"},
    }
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    code, _, error = call(monkeypatch, capsys, "train", path, "loss.2.weight=0.25", "-o", out)
    assert code == 0, error
    saved = yaml.safe_load((out / "dwakd-recipe.yaml").read_text(encoding="utf-8"))
    assert saved["loss"] == [LOSSES[0], {**LOSSES[1], "weight": 0.25}]
    assert "method `dwa_kd + min_ed`" in (out / "README.md").read_text(encoding="utf-8")
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    terms = {"ce", "dwa_kd.t2s_ce", "dwa_kd.kd_student", "dwa_kd.kd_teacher", "min_ed.kd"}
    assert terms <= history[0].keys()
    assert "eval_min_ed.kd" in history[1]
    for overrides, message in (
        (["loss.2.weight=1"], "loss.2.weight is 0.25 there and 1"),
        (["loss.1.temperature=-1"], "loss.1.temperature must be at least"),
        (["loss.3.weight=1"], "loss is a list here, of 2: write loss.1"),
        (["training.metric_for_best_model=kd"], "metric_for_best_model kd is unknown; valid ones: ce, dwa_kd.t2s_ce"),
    ):
        code, _, error = call(monkeypatch, capsys, "train", path, *overrides, "--resume", "-o", out)
        assert (code, message in error) == (2, True), error


def test_on_policy_training_with_the_gradient_of_each_term(tmp_path):
    """A sum trains on the student's own answers if its parts can, and the gradient of each part's terms is measured."""
    losses = {"losses": [{"method": "dwa_kd", "variant": "recommended"}, {"method": "alm"}]}
    sampling = {"lmbda": 0.5, "max_new_tokens": 8, "term_gradient_steps": 1}
    run = trainer(tmp_path, method="sum", loss_options=losses, max_steps=2, **sampling)
    run.train()
    logs = run.state.log_history[0]
    for term in ("ce", "dwa_kd.kd_student", "dwa_kd.kd_teacher", "alm.alm"):
        assert logs[f"term_grad_norm/{term}"] > 0
    losses["losses"][0].pop("variant")
    with pytest.raises(UserError, match="method dwa_kd cannot train on the student's own answers"):
        trainer(tmp_path, method="sum", loss_options=losses, **sampling)
