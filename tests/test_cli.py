"""The command line: a user's mistake is one sentence and exit code 2, never a traceback; a right call works."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from rich.console import Console

from dwakd.cli import main
from tests.builders import byte_bpe, tiny_model, unigram_byte_fallback

ROWS = [{"prompt": f"Say number {n}.", "response": f"It is number {n}."} for n in range(12)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Two tiny models saved as folders, a data file and a recipe over them."""
    folder = tmp_path_factory.mktemp("workspace")
    for name, family, tokenizer in (("student", "llama", byte_bpe()), ("teacher", "qwen2", unigram_byte_fallback())):
        model = tiny_model(family, len(tokenizer))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    recipe = {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "data": {"train": str(folder / "data.jsonl"), "template": "plain"},
        "loss": {"method": "dwa_kd"},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of one call, within this process."""
    monkeypatch.setattr(sys, "argv", ["dwakd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def one_sentence(err):
    """The last line of standard error, which must be the only one that starts with error."""
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_train_eval_and_resume(workspace, tmp_path, monkeypatch, capsys):
    """The main road: recipe in, plain folder out, scores beside it; a second start in the same folder is refused."""
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
    whole = (output / "model.safetensors").read_bytes()
    for lost in (None, "trainer_state.json", "dwakd-run.json"):  # ended, and broken off after its last checkpoint
        if lost:
            (output / lost).write_text("{")
            (output / "model.safetensors").write_bytes(b"half")
        if lost == "dwakd-run.json":
            (output / lost).unlink()
        code, out, _ = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *extra, "-o", output, "--resume")
        assert code == 0
        assert "after 2 steps" in out
        assert (output / "model.safetensors").read_bytes() == whole
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
    assert len(answers) == 4  # two rows, one seed and greedy
    assert json.loads(answers[0])["prompt"] == "Say number 0.\n", "the template is the run's own"


def test_test_sets_are_read_once(workspace, tmp_path, monkeypatch, capsys):
    """A second reading could see a file that was changed during the training: other rows than those that were checked."""
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
        (["training.learning_rate=1e10"], "at step 2: lower training.learning_rate"),
        (
            ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=64"],
            "are fewer than a batch of 64",
        ),
    ],
)
def test_a_run_that_trains_nothing_is_no_success(workspace, tmp_path, monkeypatch, capsys, options, message):
    """A folder that looks like a student, of weights that are NaN or as they were."""
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *options, "-o", tmp_path / "run")
    assert code == 2
    assert message in one_sentence(err)
    assert not (tmp_path / "run" / "dwakd-run.json").exists()


def test_two_processes_never_train_into_one_folder(workspace, tmp_path, monkeypatch, capsys):
    """A comparison that was killed may leave a run behind, which still writes when it is started again."""
    output = tmp_path / "run"
    output.mkdir()
    with FileLock(output / ".lock"):
        code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", "-o", output)
    assert code == 2
    assert "another process is training into" in one_sentence(err)


def test_lora_by_recipe_loads_with_peft(workspace, tmp_path, monkeypatch, capsys):
    """`student.peft` trains an adapter that PEFT and `dwakd eval` both read."""
    from peft import AutoPeftModelForCausalLM

    output = tmp_path / "lora"
    code, _, err = run(
        monkeypatch, capsys, "train", workspace / "recipe.yaml", "student.peft={r: 4, lora_alpha: 8}", "-o", output
    )
    assert code == 0, err
    loaded = AutoPeftModelForCausalLM.from_pretrained(output)
    assert any("lora_A" in name for name, _ in loaded.named_parameters())
    code, _, err = run(
        monkeypatch, capsys, "eval", output, "-d", workspace / "data.jsonl", "--limit", 1, "--seeds", 1,
        "--max-new-tokens", 2,
    )  # fmt: skip
    assert code == 0, err
    assert list((output / "eval").glob("*.json"))


def test_shrink(workspace, tmp_path, monkeypatch, capsys):
    """A smaller folder that loads; a vocabulary below the alphabet is refused with the least that works."""
    student = tmp_path / "student"
    shutil.copytree(workspace / "student", tmp_path / "original")
    settings = tmp_path / "original" / "generation_config.json"  # as of Llama 2 Chat; transformers refuses to save it
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "do_sample": False, "temperature": 0.6}))
    arguments = ["shrink", tmp_path / "original", "-d", workspace / "data.jsonl", "--layers", 2]
    code, out, err = run(monkeypatch, capsys, *arguments, "--vocab-size", 300, "-o", student)
    assert code == 0, err
    assert "bits per byte" in out
    assert (student / "config.json").is_file()
    code, _, err = run(monkeypatch, capsys, *arguments, "--vocab-size", 20, "-o", tmp_path / "other")
    assert code == 2
    assert "20" in one_sentence(err)
    assert not (tmp_path / "other").exists()


BAD = {
    "unknown option": (["loss.tau=2"], r"loss\.tau"),
    "unknown method": (["loss.method=dwakd"], "valid ones: sft, "),
    "unknown section": (["lose.method=sft"], "unknown option lose; did you mean loss"),
    "unknown training option": (["training.learning_rat=1"], "did you mean learning_rate"),
    "unknown peft option": (["student.peft={rank: 4}"], r"unknown option student\.peft\.rank"),
    "mistyped value": (["data.max_length=long"], "data.max_length must be int"),
    "value out of range": (["loss.temperature=-1"], "temperature must be a number"),
    "no section": (["data=3"], "data must be a section"),
    "bad override": (["temperature"], "must look like section.option=value"),
    "unknown template": (["data.template=alpacca"], "alpaca"),
    "missing column": (["data.prompt=question"], "question"),
    "no such student": (["student.model=./nowhere"], "nowhere"),
    "no such teacher": (["teacher.model=./nowhere"], "nowhere"),
    "no such data": (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "prompt too long": (["data.max_prompt_length=2"], "max_prompt_length"),
    "dtype": (["student.dtype=float12"], "unknown dtype"),
    "unreadable optimiser": (["training.optim=fancy"], "training options"),
    "mistyped training option": (["training.learning_rate=abc"], "training.learning_rate must be float"),
    "training option out of range": (["training.per_device_train_batch_size=0"], "must be at least 1"),
    "mistyped loss option": (["loss.gate=5"], "loss.gate must be bool"),
    "unknown kernel": (["loss.impl=foo"], "valid ones: auto, naive, cpu"),
    "unknown tracker": (["training.report_to=foo"], "foo is not supported"),
    "absent tracker": (["training.report_to=wandb"], "pip install wandb"),
    "peft value": (["student.peft={r: -4}"], "student.peft"),
    "peft target": (["student.peft={target_modules: [foo]}"], "foo"),
    "peft on the head": (["student.peft={target_modules: [lm_head]}"], "modules_to_save"),
    "evaluation without data": (["training.eval_strategy=steps"], "give data.eval"),
    "best without data": (["training.metric_for_best_model=ce"], "give data.eval"),
    "collator's columns": (["training.remove_unused_columns=true"], "must stay False"),
    "no such test set": (["evaluation.test=[nowhere.jsonl]"], "nowhere.jsonl"),
    "no seeds": (["evaluation.seeds=0"], "evaluation.seeds must be at least 1"),
    "order": (["training.train_sampling_strategy=foo"], "valid ones: random"),
    "fsdp alone": (["training.fsdp=full_shard"], "distributed"),
    "absent optimiser": (["training.optim=adamw_bnb_8bit"], "training.optim: .*bitsandbytes"),
    "optimiser of another package": (["training.optim=galore_adamw"], "training.optim: .*galore_torch"),
    "optimiser's options": (["training.optim_args=foo"], "optim_args must look like name=value"),
    "beta out of range": (["training.adam_beta1=2"], "adam_beta1 must be 0 or more and below 1, got 2"),
    "workers": (["training.dataloader_num_workers=-1"], "dataloader_num_workers must be 0 or more"),
    "infinite rate": (["training.learning_rate=.inf"], "learning_rate must be above 0 and finite"),
    "schedule without its option": (
        ["training.lr_scheduler_type=cosine_with_min_lr"],
        "training.lr_scheduler_type: .*min_lr",
    ),
    "schedule's option": (
        ["training.lr_scheduler_type=cosine_with_restarts", "training.lr_scheduler_kwargs={foo: 1}"],
        "training.lr_scheduler_type: .*foo",
    ),
    "number for an option": (["loss={method: sft, 1: 2}"], "unknown option loss.1;"),
    "number for a peft option": (["student.peft={1: 2}"], "unknown option student.peft.1;"),
    "method in place of the section": (["loss=uld"], "loss must be a section with method and options, got 'uld'"),
    "peft in place of the section": (["student.peft=true"], "student.peft must be a section with options"),
    "no rows to evaluate on": (["data.eval_limit=0"], "data.eval_limit must be at least 1"),
    "teacher without weight": (["teacher.weight=0"], "teacher.weight must be a number above 0"),
    "kind of a cache that isn't": (["teacher.cache_dtype=bfloat16"], "name its folder in teacher.cache"),
    "checkpoint as an option": (["training.resume_from_checkpoint=x"], "has no effect here; go on .* --resume"),
    "no training": (["training.do_train=false"], "has no effect here; leave it out"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_in_a_recipe(name, workspace, tmp_path, monkeypatch, capsys):
    """Each names the option or the file."""
    overrides, message = BAD[name]
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", *overrides, "-o", tmp_path / "run")
    assert code == 2, err
    assert re.search(message, one_sentence(err)), err
    assert not (tmp_path / "run").exists(), "nothing is half-written"


def test_a_hub_that_refuses_is_one_sentence(workspace, tmp_path, monkeypatch, capsys):
    """transformers asks for the repository before it trains, and the network's errors are no UserErrors."""

    def refuse(*_):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", refuse)
    arguments = ["train", workspace / "recipe.yaml", "training.push_to_hub=true", "-o", tmp_path / "run"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert (code, one_sentence(err)) == (2, "error: push_to_hub: no network and more")
    assert not (tmp_path / "run").exists()


def test_a_prompt_without_room_shows_before_the_training(workspace, tmp_path, monkeypatch, capsys):
    """Hours of training would end in a sentence that could have stood at their beginning; `eval` says the same."""
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
    """A machine that went down while it was written leaves a part of it, or nothing."""
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


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write")
def test_folders_that_cannot_be_written_are_refused(workspace, monkeypatch, capsys):
    """Before models are loaded; `similarity` looked for the place of its file after all the work."""
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", "-o", "/proc/foo/x")
    assert (code, "/proc/foo/x cannot be written" in one_sentence(err)) == (2, True)
    arguments = ["similarity", "./nowhere", "--teacher", "./nowhere", "-d", workspace / "data.jsonl"]
    code, _, err = run(monkeypatch, capsys, *arguments, "-o", workspace / "recipe.yaml" / "x")
    assert (code, "recipe.yaml is a file" in one_sentence(err)) == (2, True)


FILES = {
    "empty dataset": ("data.jsonl", "", "data.jsonl"),
    "malformed line": ("data.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": ', "line 2"),
    "row that is no object": ("data.jsonl", '["a"]', "line 1"),
    "value that is no string": ("data.jsonl", '{"prompt": 3, "response": "b"}', "line 1"),
    "empty response": ("data.jsonl", '{"prompt": "a", "response": " "}', "response"),
    "missing response": ("data.jsonl", '{"prompt": "a", "answer": "b"}', "answer"),
    "unknown kind": ("data.xls", "x", "data.xls"),
}


@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_the_data(name, workspace, tmp_path, monkeypatch, capsys):
    """Each names the file and the line."""
    file_name, content, message = FILES[name]
    (tmp_path / file_name).write_text(content)
    train = f"data.train={tmp_path / file_name}"
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", train, "-o", tmp_path / "run")
    assert code == 2, err
    assert message in one_sentence(err)
    assert file_name in one_sentence(err)


def test_best_metric_is_checked_before_training(workspace, tmp_path, monkeypatch, capsys):
    """transformers finds out after the first evaluation, when an epoch is lost."""
    recipe = [workspace / "recipe.yaml", f"data.eval={workspace / 'data.jsonl'}", "-o", tmp_path / "run"]
    code, _, err = run(monkeypatch, capsys, "train", *recipe, "training.metric_for_best_model=foo")
    assert code == 2
    assert "bits_per_byte" in one_sentence(err)
    code, _, err = run(monkeypatch, capsys, "train", *recipe, "training.metric_for_best_model=rouge_l")
    assert code == 2
    assert "training.eval_rouge_l=true" in one_sentence(err)
    assert not (tmp_path / "run").exists()


def test_resume_names_what_differs_and_passes_over_a_broken_checkpoint(
    workspace, tmp_path, monkeypatch, capsys, caplog
):
    """Another recipe in the same folder mixes two runs; longer training of the same one is what resuming is for."""
    base = ["train", workspace / "recipe.yaml", "-o", tmp_path / "run"]
    base += ["training.save_strategy=steps", "training.save_steps=1"]
    code, _, err = run(monkeypatch, capsys, *base)
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, *base, "loss.temperature=3", "--resume")
    assert code == 2
    assert "loss.temperature is unset there and 3 here" in one_sentence(err)
    (tmp_path / "run" / "checkpoint-2" / "distillation.safetensors").unlink()
    code, _, err = run(monkeypatch, capsys, *base, "training.max_steps=3", "--resume")
    assert code == 0, err
    assert re.search("incomplete .*checkpoint-2", caplog.text)
    steps = [
        entry["step"] for entry in json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    ]
    assert steps == [1, 2, 3, 3]
    (tmp_path / "file").write_text("mine")
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", "-o", tmp_path / "file")
    assert code == 2
    assert "is a file" in one_sentence(err)
    twice = (workspace / "recipe.yaml").read_text() + "loss: {method: sft}\n"
    (tmp_path / "twice.yaml").write_text(twice)
    code, _, err = run(monkeypatch, capsys, "train", tmp_path / "twice.yaml")
    assert code == 2
    assert "loss is given twice" in one_sentence(err)


def test_more_mistakes(workspace, tmp_path, monkeypatch, capsys):
    """No recipe, broken YAML, a folder that holds something else, a GGUF that is none, a tokenizer without end."""
    code, _, err = run(monkeypatch, capsys, "train", tmp_path / "none.yaml")
    assert code == 2
    assert "none.yaml does not exist" in one_sentence(err)
    (tmp_path / "broken.yaml").write_text("student: [")
    code, _, err = run(monkeypatch, capsys, "train", tmp_path / "broken.yaml")
    assert code == 2
    assert "not valid YAML: line 1, column 11: " in one_sentence(err)
    (tmp_path / "binary.yaml").write_bytes(b"student: \x01")
    code, _, err = run(monkeypatch, capsys, "train", tmp_path / "binary.yaml")
    assert (code, "unicode string" in one_sentence(err)) == (2, False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", "-o", tmp_path / "mine")
    assert code == 2
    assert "is not empty" in one_sentence(err)
    (tmp_path / "model.gguf").write_bytes(b"no GGUF at all")
    model = f"teacher.model=gguf:{tmp_path / 'model.gguf'}"
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", model, "-o", tmp_path / "run")
    assert code == 2
    assert "model.gguf" in one_sentence(err)
    tokenizer = byte_bpe()
    tokenizer.eos_token = None
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        source = workspace / "student" / name
        if source.is_file():
            target = tmp_path / "endless" / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
    tokenizer.save_pretrained(tmp_path / "endless")
    model = f"student.model={tmp_path / 'endless'}"
    code, _, err = run(monkeypatch, capsys, "train", workspace / "recipe.yaml", model, "-o", tmp_path / "run")
    assert code == 2
    assert "end-of-sequence" in one_sentence(err)


def test_help_and_methods(monkeypatch, capsys):
    """`--help` of every command, and the list of methods with the options of one."""
    for command in ([], ["train"], ["cache"], ["eval"], ["shrink"], ["demo"], ["methods"]):
        code, out, _ = run(monkeypatch, capsys, *command, "--help")
        assert code == 0
        assert "Usage" in out
    code, out, _ = run(monkeypatch, capsys, "methods")
    assert code == 0
    assert "dwa_kd" in out
    monkeypatch.setattr("dwakd.cli.console", Console(width=80))
    code, out, _ = run(monkeypatch, capsys, "methods", "dwa_kd")
    assert re.search(r"band_blend +0\.7 .* between 0 and 1", out)
    assert re.search(r"weight_normalisation +null .* product,", out), "names are whole and allowed values shown"
    assert re.search(r"gate_warmup_steps +0 .* whole, at least 0", out)
    assert re.search(r"gamma_end +null .* at least 1e-06", out)
    assert "KD^stu = sum_i w_i D(p^{t->s}_i || p^s_i) KD^tea" in " ".join(out.split()), "the formula as written"
    assert max(map(len, out.splitlines())) <= 80
    code, _, err = run(monkeypatch, capsys, "methods", "nothing")
    assert code == 2
    assert "valid ones" in one_sentence(err)


def test_imports_point_one_way():
    """losses and kernels without transformers, evaluation without losses: or the layers grow into each other."""
    script = (
        "import sys, importlib; importlib.import_module(sys.argv[1]); "
        "sys.exit(any(name.split('.')[: len(bad)] == bad for name in sys.modules for bad in [sys.argv[2].split('.')]))"
    )
    for module, forbidden in (
        ("dwakd", "torch"),
        ("dwakd.cli", "torch"),
        ("dwakd.losses", "transformers"),
        ("dwakd.kernels", "transformers"),
        ("dwakd.evaluation.run", "dwakd.losses"),
        ("dwakd.models.rows", "dwakd.losses"),
        ("dwakd.cache.build", "dwakd.training"),
        ("dwakd.cache.build", "dwakd.losses"),
        ("dwakd.data.collator", "dwakd.models"),
        ("dwakd.data.pairs", "dwakd.models"),
    ):
        result = subprocess.run([sys.executable, "-c", script, module, forbidden], check=False, capture_output=True)
        assert result.returncode == 0, f"{module} imports {forbidden}: {result.stderr.decode()}"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_recipes_of_the_repository_load(path):
    """A recipe that a user copies must be one that is read, with options that its methods take."""
    from dwakd.compare.plan import variants_of
    from dwakd.config import CompareSection, load_recipe
    from dwakd.training.recipe import check_options

    recipe = load_recipe(path, ["training.bf16=false", "training.use_cpu=true"])
    check_options(recipe, "unused")
    variants_of(recipe, recipe.compare or CompareSection(methods=[recipe.method]), ablation=False)
