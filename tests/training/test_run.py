"""Test `dwakd train`: a recipe gives a plain folder with scores, and mistakes are found before the training."""

import json
import re
import shutil

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from dwakd import DistillConfig, DistillTrainer
from dwakd.answers.prompts import check_prompts, read_prompts
from dwakd.errors import UserError
from dwakd.models.loading import load_causal_lm
from dwakd.recipe.files import RECIPE_FILE
from dwakd.recipe.recipe import load_recipe, recipe_from_dict
from dwakd.training.distiller import LOSS_STATE, Distiller
from dwakd.training.run import check_options, training_config
from dwakd.training.run_folder import RUN_FILE
from tests.builders import CHAT_TEMPLATE
from tests.command_line import ROWS, one_sentence, run
from tests.data.chat import chatml
from tests.two_ranks import run_on_two_ranks


def test_train_eval_and_resume(workspace, tmp_path, monkeypatch, capsys):
    """A recipe gives a plain folder with scores; a second run in the same folder is refused, and --resume continues it."""
    output = tmp_path / "run"
    extra = ["training.save_strategy=steps", "training.save_steps=1", "evaluation.limit=2", "evaluation.seeds=2"]
    extra += [f"evaluation.test=[{workspace / 'data.jsonl'}]", "evaluation.max_new_tokens=4"]
    code, out, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *extra, "-o", output)
    assert code == 0, err
    assert "after 2 steps" in out
    scores = json.loads(next((output / "eval").glob("*.json")).read_text())
    assert scores["signature"]["seeds"] == [10, 20]
    assert scores["signature"]["template"] == "plain"
    assert (output / "dwakd-run.json").is_file()
    assert "method `dwa_kd`" in (output / "README.md").read_text()

    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *extra, "-o", output)
    assert code == 2
    assert "already holds a run" in one_sentence(err)
    code, _, err = run(
        monkeypatch, capsys, "train", workspace / "recipe.yaml", "loss.temperature=3", "-o", output, "--resume"
    )
    assert code == 2
    assert "loss.temperature is unset there" in one_sentence(err)
    whole, maps = ((output / name).read_bytes() for name in ("model.safetensors", LOSS_STATE))
    for lost in (
        None,
        "trainer_state.json",
        "dwakd-run.json",
    ):  # the run is finished, or was stopped at its end
        if lost:
            (output / lost).write_text("{")
            (output / "model.safetensors").write_bytes(b"half")
        if lost == "dwakd-run.json":
            (output / lost).unlink()
        code, out, _ = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *extra, "-o", output, "--resume")
        assert code == 0
        assert "after 2 steps" in out
        assert (output / "model.safetensors").read_bytes() == whole
        assert (output / LOSS_STATE).read_bytes() == maps
        assert json.loads((output / "dwakd-run.json").read_text())["num_steps"] == 2
    assert not (output / ".lock").exists()
    shorter = [*extra, "training.max_steps=1", "-o", output, "--resume"]
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *shorter)
    assert code == 2
    assert "is of step 2, beyond training.max_steps 1" in one_sentence(err)

    code, out, err = run(
        monkeypatch, capsys, "eval", output, "-d", workspace / "data.jsonl", "--limit", 2, "--seeds", 1,
        "--max-new-tokens", 3, "-o", tmp_path / "scores",
    )  # fmt: skip
    assert code == 0, err
    answers = next((tmp_path / "scores").glob("*.answers.jsonl")).read_text().splitlines()
    assert len(answers) == 4  # two rows, each with one sampled and one greedy answer
    assert json.loads(answers[0])["prompt"] == "Say number 0.\n", "the template is the run's own"


def test_test_sets_are_read_once(workspace, tmp_path, monkeypatch, capsys):
    """Test sets are read once, so that a file that changes during the training has no effect."""
    from dwakd.evaluation.run import load_examples as load

    read = []
    monkeypatch.setattr(
        "dwakd.evaluation.run.load_examples", lambda source, **options: read.append(source) or load(source, **options)
    )
    data = str(workspace / "data.jsonl")
    extra = [f"evaluation.test=[{data}]", "evaluation.limit=1", "evaluation.seeds=1", "evaluation.max_new_tokens=2"]
    arguments = ["train", workspace / "recipe.yaml", *extra, "loss.method=sft", "-o", tmp_path / "run"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert (code, read) == (0, [data]), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training.learning_rate=1e10"], r"at step 2 \(terms: ce, .*\): lower training.learning_rate"),
        (
            ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=64"],
            "are fewer than a batch of 64",
        ),
    ],
)
def test_a_run_that_trains_nothing_ends_with_an_error(workspace, tmp_path, monkeypatch, capsys, options, message):
    """A run whose weights become NaN, or that has no batch to train on, ends with an error."""
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *options, "-o", tmp_path / "run")
    assert code == 2
    assert re.search(message, one_sentence(err))
    assert not (tmp_path / "run" / "dwakd-run.json").exists()


def test_lora_by_recipe_loads_with_peft(workspace, tmp_path, monkeypatch, capsys):
    """`student.peft` trains an adapter that PEFT and `dwakd eval` both read. `dwakd train` evaluates the same weights.

    `dwakd eval BASE --adapter RUN` finds the chat template of the run and writes into its folder.
    """
    from peft import AutoPeftModelForCausalLM

    output, data = tmp_path / "lora", workspace / "data.jsonl"
    evaluation = f"evaluation={{test: [{data}], limit: 1, seeds: 1, max_new_tokens: 2}}"
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    chat = [f"{role}.chat_template_path={tmp_path / 'chat.jinja'}" for role in ("student", "teacher")]
    peft = "student.peft={r: 4, lora_alpha: 8}"
    arguments = [workspace / "recipe.yaml", peft, evaluation, "data.template=chat", *chat]
    code, _, err = run(monkeypatch, capsys, "train", *arguments, "-o", output)
    assert code == 0, err
    before = json.loads(next((output / "eval").glob("*.json")).read_text())["signature"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(output)
    assert any("lora_A" in name for name, _ in loaded.named_parameters())
    base = yaml.safe_load((output / RECIPE_FILE).read_text())["student"]["model"]
    limits = ["--limit", 1, "--seeds", 1, "--max-new-tokens", 2, "--overwrite"]
    for evaluated in ([output], [base, "--adapter", output]):
        shutil.rmtree(output / "eval")
        code, _, err = run(monkeypatch, capsys, "eval", *evaluated, "-d", data, *limits)
        assert code == 0, err
        after = json.loads(next((output / "eval").glob("*.json")).read_text())["signature"]
        assert after["model"].pop("sha256") == before["model"]["sha256"]
        assert {**after, "model": None} == {**before, "model": None}


def test_a_second_run_starts_from_an_adapter(workspace, tmp_path, monkeypatch, capsys):
    """The weights of the first adapter are trained and saved. A second adapter would be saved without the first one."""
    base, first, second = workspace / "recipe.yaml", tmp_path / "first", tmp_path / "second"
    peft = "student.peft={r: 4, lora_alpha: 64}"
    code, _, err = run(monkeypatch, capsys, "train", base, peft, "training.learning_rate=0.05", "-o", first)
    assert code == 0, err
    again = ["train", base, f"student.model={first}", "training.learning_rate=1e-9", "-o", second]
    code, _, err = run(monkeypatch, capsys, *again, peft)
    assert (code, "is an adapter. A new adapter would be saved for the original base" in one_sentence(err)) == (2, True)
    code, _, err = run(monkeypatch, capsys, *again)
    assert code == 0, err
    ids = torch.arange(4, 12)[None]
    original, merged, saved = (load_causal_lm(str(one))(ids).logits for one in (workspace / "student", first, second))
    torch.testing.assert_close(saved, merged, atol=1e-4, rtol=0)
    assert (merged - original).abs().max() > 0.01


MISTAKES = {
    "missing column": (["data.prompt=question"], "question"),
    "no such student": (["student.model=./nowhere"], "nowhere"),
    "no such teacher": (["teacher.model=./nowhere"], "nowhere"),
    "no such data": (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "prompt too long": (["data.max_prompt_length=2"], "max_prompt_length"),
    "tracker that is not installed": (["training.report_to=wandb"], "pip install wandb"),
    "unknown tracker": (["training.report_to=foo"], "foo is not supported"),
    "fsdp alone": (["training.fsdp=full_shard"], "distributed"),
    "rank below 1": (["student.peft={r: -4}"], r"student\.peft"),
    "peft target": (["student.peft={target_modules: [foo]}"], "foo"),
    "peft on the head": (["student.peft={target_modules: [lm_head]}"], "modules_to_save"),
    "no such test set": (["evaluation.test=[nowhere.jsonl]"], "nowhere.jsonl"),
    "option of a section": (["loss.tau=2"], r"unknown option loss\.tau"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(name, workspace, tmp_path, monkeypatch, capsys):
    """The message names the option, and no folder is left that looks like a run."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # transformers sets it to true for training.fsdp
    overrides, message = MISTAKES[name]
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *overrides, "-o", tmp_path / "run")
    assert code == 2, err
    assert re.search(message, one_sentence(err)), err
    assert not (tmp_path / "run").exists()


def test_too_little_memory_names_the_options(workspace, tmp_path, monkeypatch, capsys):
    """A user without experience does not know from torch's message which option of a recipe needs less memory."""
    monkeypatch.setattr(Distiller, "forward", lambda *_, **__: torch.empty(1 << 60))
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", "-o", tmp_path / "run")
    assert code == 2, err
    assert re.search(
        r"enough memory for step 1: .*per_device_train_batch_size \(now 4\).*max_length", one_sentence(err)
    )
    monkeypatch.setattr(Distiller, "forward", lambda *_, **__: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="size"):  # an error of the program keeps its traceback
        run(monkeypatch, capsys, "train", workspace / "recipe.yaml", "-o", tmp_path / "run")


def test_a_malformed_row_is_named_by_file_and_line(workspace, tmp_path, monkeypatch, capsys):
    """The message about a malformed row contains the file and the line."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": ')
    train = f"data.train={tmp_path / 'rows.jsonl'}"
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", train, "-o", tmp_path / "run")
    assert (code, "rows.jsonl" in one_sentence(err), "line 2" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"prompt": "a", "response": 3}, "rows.jsonl, line 1201: 'response' must be a string"),
        ({"prompt": "a " * 400, "response": "b"}, "rows.jsonl, row 1200 .*the prompt has .* tokens for the student"),
    ],
)
def test_rows_are_checked_before_models_are_loaded(last, message, workspace, tmp_path, monkeypatch, capsys):
    """An error in the last row of a large file is reported although no model can be loaded."""
    rows = [*ROWS * 100, last]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("student", "teacher"):
        shutil.copytree(workspace / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    options = [f"{name}.model={tmp_path / name}" for name in ("student", "teacher")]
    options += [f"data.train={tmp_path / 'rows.jsonl'}", "-o", tmp_path / "run"]
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *options)
    assert code == 2
    assert re.search(message, one_sentence(err))
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *options, "data.invalid_rows=skip")
    assert "could not load the model" in one_sentence(err)
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *options, "data.max_length=100000")
    assert re.search(r"data\.max_length is 100000, but .*student has only \d+ positions", one_sentence(err))


def test_a_special_token_without_an_embedding_is_found_before_models_are_loaded(
    workspace, tmp_path, monkeypatch, capsys
):
    """The number of embeddings is read from config.json, so the row is refused before the weights are loaded."""
    student = shutil.copytree(
        workspace / "student", tmp_path / "student", ignore=shutil.ignore_patterns("*.safetensors")
    )
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(student)
    rows = [*ROWS, {"prompt": "What is <image>?", "response": "b"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [f"student.model={student}", f"data.train={tmp_path / 'rows.jsonl'}", "-o", tmp_path / "run"]
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *options)
    assert code == 2
    assert re.search(rf"row {len(ROWS)} .*the prompt contains '<image>', a special token", one_sentence(err))


def test_a_hub_that_refuses_is_one_sentence(workspace, tmp_path, monkeypatch, capsys):
    """Errors of the hub, where transformers creates the repository before training, are shown without a traceback."""

    def refuse(*_):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", refuse)
    arguments = ["train", workspace / "recipe.yaml", "training.push_to_hub=true", "-o", tmp_path / "run"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert (code, one_sentence(err)) == (2, "error: push_to_hub: no network and more")
    assert not (tmp_path / "run").exists()


def test_a_prompt_without_room_is_refused_before_the_training(workspace, tmp_path, monkeypatch, capsys):
    """A test prompt that leaves no room for an answer is refused before the training, and by `dwakd eval`."""
    rows = [*ROWS[:2], {"prompt": "word " * 600, "response": "end"}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    test = f"evaluation.test=[{workspace / 'data.jsonl'}, {tmp_path / 'long.jsonl'}]"
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", test, "-o", tmp_path / "run")
    assert code == 2
    assert re.search(r"long\.jsonl, row 2 \(counting from 0\): its prompt of \d+ tokens", one_sentence(err))
    assert not (tmp_path / "run").exists()
    sets = ["-d", workspace / "data.jsonl", "-d", tmp_path / "long.jsonl"]
    code, _, err = run(monkeypatch, capsys, "eval", workspace / "student", *sets, "-o", tmp_path / "scores")
    assert (code, "long.jsonl, row 2" in one_sentence(err)) == (2, True)
    assert not (tmp_path / "scores").exists(), "no set is answered before all are checked"


@pytest.mark.parametrize(("content", "reason"), [("", "no section data"), ("data: {train: [", "line 1, column 16")])
def test_a_damaged_recipe_of_a_run_is_named(content, reason, workspace, tmp_path, monkeypatch, capsys):
    """If the saved recipe of a run is incomplete or empty, as after a crash, the message names it."""
    folder = shutil.copytree(workspace / "student", tmp_path / "run")
    (folder / "dwakd-recipe.yaml").write_text(content)
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", "-o", folder, "--resume")
    assert code == 2
    assert f"{folder / 'dwakd-recipe.yaml'} is damaged ({reason}" in one_sentence(err).replace("it has ", "")
    assert "another folder with --output" in one_sentence(err)
    code, _, err = run(monkeypatch, capsys, "eval", folder, "-d", workspace / "data.jsonl")
    assert code == 2
    assert "is damaged" in one_sentence(err)
    assert "give --template" in one_sentence(err)


def test_resume_names_what_differs_and_skips_a_damaged_checkpoint(workspace, tmp_path, monkeypatch, capsys, caplog):
    """Only options that make the run longer may change when it is resumed; damaged checkpoints are skipped."""
    base = ["train", workspace / "recipe.yaml", "-o", tmp_path / "run"]
    base += ["training.save_strategy=steps", "training.save_steps=1"]
    code, _, err = run(monkeypatch, capsys, *base)
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, *base, "loss.temperature=3", "--resume")
    assert code == 2
    assert "loss.temperature is unset there and 3.0 here" in one_sentence(err)
    (tmp_path / "run" / "checkpoint-2" / LOSS_STATE).unlink()
    code, _, err = run(monkeypatch, capsys, *base, "training.max_steps=3", "--resume")
    assert code == 0, err
    assert re.search("checkpoint .*checkpoint-2: its .*maps.safetensors is missing", caplog.text)
    steps = [
        entry["step"] for entry in json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    ]
    assert steps == [1, 2, 3, 3]
    (tmp_path / "file").write_text("mine")
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", "-o", tmp_path / "file")
    assert code == 2
    assert "is a file" in one_sentence(err)


def recipe_of(**sections):
    content = {"student": {"model": "x"}, "data": {"train": "x"}, "loss": {"method": "sft"}, **sections}
    return recipe_from_dict(content | {"training": {"use_cpu": True, **content.get("training", {})}})


REFUSED = {
    "schedule": ({"lr_scheduler_type": "fancy"}, "training options: .*fancy"),
    "optimiser that is not installed": ({"optim": "adamw_bnb_8bit"}, r"training\.optim: .*bitsandbytes"),
    "optimiser with its own groups": ({"optim": "galore_adamw"}, r"optim galore_adamw cannot be used"),
    "schedule without its option": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        r"training\.lr_scheduler_type: .*min_lr",
    ),
    "option of a schedule": (
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"foo": 1}},
        r"training\.lr_scheduler_type: .*foo",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_are_named(name):
    """Options that transformers or another package refuses are reported before the training begins."""
    options, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        check_options(recipe_of(training=options), "unused")
    assert re.search(message, str(caught.value))


def test_sections_become_training_arguments():
    """The sections of a recipe become training arguments."""
    data = {"train": "x", "eval": "y", "template": "chat", "max_length": 99, "invalid_rows": "skip"}
    teachers = [{"model": "a", "weight": 3}, {"model": "b"}]
    read = recipe_of(
        data=data, teacher=teachers, loss={"method": "uld", "uld_weight": 2}, training={"learning_rate": 1e-5}
    )
    config = training_config(read, "folder")
    assert (config.output_dir, config.method, config.loss_options) == ("folder", "uld", {"uld_weight": 2})
    assert (config.template, config.max_length, config.invalid_rows) == ("chat", 99, "skip")
    assert (config.teacher_weights, config.learning_rate) == ([3, 1], 1e-5)
    assert (config.eval_strategy, config.save_strategy) == ("epoch", "epoch")
    steps = training_config(recipe_of(data=data, training={"eval_strategy": "steps", "eval_steps": 5}), "folder")
    assert (steps.eval_strategy, steps.save_strategy) == ("steps", "steps")
    assert training_config(recipe_of(), "folder").eval_strategy == "no"


def test_a_student_without_a_chat_template(workspace, tmp_path, monkeypatch, capsys):
    """A base student trains with the template of a chat model, which `dwakd eval` of the saved student uses."""
    for role in ("student", "teacher"):
        shutil.copytree(workspace / role, tmp_path / role)
        (tmp_path / role / "chat_template.jinja").unlink()
    chatml().save_pretrained(tmp_path / "chat")
    file = tmp_path / "template.jinja"
    file.write_text(CHAT_TEMPLATE, encoding="utf-8")
    options = [f"{role}.model={tmp_path / role}" for role in ("student", "teacher")]
    options += ["data.template=chat", f"student.chat_template_path={tmp_path / 'chat'}"]
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *options, "-o", tmp_path / "none")
    assert code == 2
    assert "has no chat template" in one_sentence(err)  # the teacher's
    options.append(f"teacher.chat_template_path={file}")
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *options, "-o", tmp_path / "run")
    assert code == 0, err
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == chatml().chat_template
    code, out, err = run(monkeypatch, capsys, "inspect", tmp_path / "run", "--rows", 1)
    assert (code, "<|im_start|>" in out) == (0, True), err
    answered = load_recipe(tmp_path / "run" / RECIPE_FILE, ["data.responses=teacher", "generate.output=answers.jsonl"])
    check_prompts(answered, read_prompts(answered))
    rows = ["--data", workspace / "data.jsonl", "--limit", 2, "--seeds", 1, "--max-new-tokens", 4]
    code, _, err = run(monkeypatch, capsys, "eval", tmp_path / "run", *rows)
    assert code == 0, err
    answers = next((tmp_path / "run" / "eval").glob("*.answers.jsonl")).read_text(encoding="utf-8")
    assert json.loads(answers.splitlines()[0])["prompt"].startswith("<|im_start|>user\nSay number 0.<|im_end|>")


def test_a_student_without_a_chat_template_in_python(workspace, tmp_path):
    """`chat_template_path` is TRL's option; without template='chat' it would have no effect."""
    options = {"output_dir": str(tmp_path), "use_cpu": True, "method": "sft", "max_steps": 1, "disable_tqdm": True}
    chatml().save_pretrained(tmp_path / "chat")
    with pytest.raises(UserError, match="chat_template_path requires template='chat', got template='alpaca'"):
        DistillConfig(**options, chat_template_path=str(tmp_path / "chat"))
    args = DistillConfig(**options, chat_template_path=str(tmp_path / "chat"), template="chat")
    trainer = DistillTrainer(str(workspace / "student"), args=args, train_dataset=ROWS)
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == chatml().chat_template


def test_two_ranks_train_and_the_first_evaluates(workspace, tmp_path):
    """The second rank ends before the evaluation, which may take longer than ranks wait for each other.

    The recipe does not set `use_cpu`. Without a GPU, the processes must nevertheless train together.
    """
    test = [f"evaluation.test=[{workspace / 'data.jsonl'}]", "evaluation.limit=2", "evaluation.max_new_tokens=4"]
    test.append("training.use_cpu=false")
    run_on_two_ranks("dwakd", "train", workspace / "recipe.yaml", *test, "-o", tmp_path / "run", use_cpu="false")
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text())["world_size"] == 2
    (scores,) = (tmp_path / "run" / "eval").glob("*.json")
    assert json.loads(scores.read_text())["signature"]["model"]["sha256"]
    assert (tmp_path / "run" / "model.safetensors").is_file()
