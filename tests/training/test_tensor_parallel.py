"""Test teachers that transformers divides among processes."""

import json

import pytest
from safetensors.torch import load_file

from dwakd import DistillConfig, DistillTrainer
from dwakd.errors import UserError
from dwakd.models.loading import load_causal_lm
from tests.builders import tiny_model
from tests.command_line import one_sentence, run
from tests.training.builders import ROWS, TOKENIZERS, assert_same, trainer, weights
from tests.two_ranks import run_on_two_ranks

CASES = {
    "hidden states": {"method": "dwa_kd"},
    "attention": {"method": "sra"},
    "numbers of micro-batches differ": {"method": "alm", "max_tokens_per_batch": 120},
}


@pytest.mark.slow
def test_a_divided_teacher_gives_the_same_student(tmp_path):
    """Two ranks, which run each other's batches and have half of the attention heads, end with the weights of one process."""
    tiny_model("gemma2", len(TOKENIZERS[1]), seed=2).save_pretrained(tmp_path / "teacher")
    cases = {name: options | {"eval_rows": ROWS[:6]} for name, options in CASES.items()}
    run_on_two_ranks("tests.training.tensor_parallel_rank", tmp_path, json.dumps(cases))
    for name, options in cases.items():
        one = trainer(tmp_path / "one", **options)
        one.train()
        expected = one.evaluate()
        assert_same(load_file(tmp_path / name / "weights.safetensors"), weights(one), atol=2e-4)
        logged = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][-1]
        assert logged["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)


def test_one_process_and_other_options(workspace, tmp_path, monkeypatch, capsys):
    """A run that cannot divide its teacher says so, and one that would wait forever is refused."""
    with pytest.raises(UserError, match=r"start them with torchrun, or use teacher\.device_map"):
        load_causal_lm(str(workspace / "teacher"), tp_plan="auto")
    args = DistillConfig(output_dir=str(tmp_path), method="sft", use_cpu=True, model_init_kwargs={"tp_plan": "auto"})
    with pytest.raises(UserError, match="tp_plan is for teachers"):
        DistillTrainer(model=str(workspace / "student"), args=args, train_dataset=ROWS)
    recipe = workspace / "recipe.yaml"
    for option, message in (
        (f"teacher.cache={tmp_path / 'cache'}", "tp_plan cannot be combined with cache"),
        ("teacher.tp_plan=columns", "teacher.tp_plan"),
    ):
        code, _, err = run(monkeypatch, capsys, "train", recipe, "-o", tmp_path / "run", "teacher.tp_plan=auto", option)
        assert code == 2
        assert message in one_sentence(err)
