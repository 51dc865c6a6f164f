"""`dwakd generate` and `data.responses: teacher`: killed and continued, on two ranks, changed, and in training."""

import errno
import logging
import re
from functools import partial
from pathlib import Path

import pytest

from dwakd import UserError, load_examples
from dwakd.answers import GenerateSection, answer_prompts, answer_recipe
from dwakd.answers.run import training_examples
from dwakd.answers.store import read_json
from dwakd.data.encoding import TextEncoder
from dwakd.data.rows import Example
from dwakd.folders import write_file
from dwakd.recipe.recipe import recipe_from_dict
from tests.answers.builders import LABELLED, PROMPTS, TOKENIZER, changed, read_rows, teacher, write_rows
from tests.builders import CHAT_TEMPLATE, byte_bpe, tiny_model
from tests.command_line import one_sentence, run
from tests.shards import kill_after_first_shard
from tests.two_ranks import run_on_two_ranks

ROOT = Path(__file__).parents[2]


def content(path):
    """Read the answer file, its manifest and its shards."""
    files = [path, path.with_suffix(".json"), *sorted(path.with_suffix(".parts").iterdir())]
    return {file.name: file.read_bytes() for file in files}


def test_the_command_writes_what_train_reads(models, finished, tmp_path, monkeypatch, capsys, caplog):
    """The file must be complete by itself, and the command must say how much is left out."""
    folder, _ = models
    output = tmp_path / "answers.jsonl"
    code, out, err = run(monkeypatch, capsys, "generate", folder / "recipe.yaml", "-o", output)
    assert code == 0, err
    assert content(output) == content(finished)
    rows = read_rows(output)
    left_out = read_json(output.with_suffix(".json"))["left_out"]
    assert sum(left_out.values()) == 40 - len(rows)
    assert f"{len(rows)} of 40 answers to 40 prompts" in out
    assert f"{left_out['cut']} cut at generate.max_new_tokens, {left_out['empty']} empty" in caplog.text
    assert 5 < len(rows) < 40
    examples = load_examples(str(output))
    assert [example.instruction for example in examples] == [PROMPTS[row["prompt_number"]] for row in rows]
    assert [example.response for example in examples] == [row["completion"] for row in rows]
    train = ["train", folder / "recipe.yaml", f"data.train={output}", "-o", tmp_path / "run"]
    code, _, err = run(monkeypatch, capsys, *train)
    assert code == 0, err


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_killed_at_any_moment_it_continues(seconds, models, finished, tmp_path):
    """After kill -9 the next start answers only the prompts of missing shards, and the file is the same to the byte."""
    folder, recipe = models
    output = tmp_path / "answers.jsonl"
    parts = tmp_path / "answers.parts"
    kill_after_first_shard("tests.answers.slow_answers", folder / "recipe.yaml", output, shards=parts, seconds=seconds)
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("shard-*")}
    assert 0 < len(done) < 3
    (parts / ".shard-00002.jsonl.tmp-1").write_bytes(b"half")
    answer_recipe(changed(recipe), output=output)
    assert content(output) == content(finished)
    assert all((parts / name).stat().st_mtime_ns == at for name, at in done.items())


def test_two_ranks_make_the_same_file(models, finished, tmp_path):
    """A prompt could be answered twice or by no rank, with another seed, or a rank could train before all is answered."""
    folder, _ = models
    run_on_two_ranks("tests.answers.rank", folder / "recipe.yaml", tmp_path)
    assert content(tmp_path / "answers.jsonl") == content(finished)
    assert [(tmp_path / f"rank-{rank}.txt").read_text().split() for rank in (0, 1)] == [["0", "2"], ["1"]]
    assert (tmp_path / "run" / "dwakd-run.json").is_file()


def test_the_command_on_two_ranks(models, finished, tmp_path):
    """A rank that is ready first must neither fail nor wait for files that another rank has not written yet."""
    folder, _ = models
    run_on_two_ranks("dwakd", "generate", folder / "recipe.yaml", "-o", tmp_path / "answers.jsonl")
    assert content(tmp_path / "answers.jsonl") == content(finished)


def test_other_filters_need_no_new_answers(models, copied, monkeypatch):
    """The answers of a large teacher cost hours or money; choosing a filter by trying must cost nothing."""
    monkeypatch.setattr("dwakd.answers.run.load_causal_lm", lambda *args, **options: pytest.fail("loaded"))
    before = content(copied)
    shorter = changed(models[1], generate={"max_characters": 4, "batch_size": 3})
    file, collected = answer_recipe(shorter, output=copied)
    rows = read_rows(copied)
    assert rows == [row for row in map(dict, collected.rows) if len(row["completion"]) <= 4]
    assert 0 < len(rows) < before["answers.jsonl"].count(b"\n")
    assert file.manifest()["left_out"]["max_characters"] == before["answers.jsonl"].count(b"\n") - len(rows)
    answer_recipe(changed(models[1]), output=copied)
    assert content(copied) == before


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"generate": {"temperature": 0.5}}, r"generate\.temperature is 1\.0 there and 0\.5 here"),
        ({"generate": {"max_new_tokens": 13}}, r"generate\.max_new_tokens is 12 there and 13 here"),
        ({"data": {"template": "alpaca"}}, r"data\.template is plain there and alpaca here"),
        ({"generate": {"limit": 20}}, "the content of the prompts differs"),
        ({"teacher": {"model": "student"}}, "the content of the teacher differs"),
        ({"generate": {"endpoint": {"base_url": "http://x", "model": "m"}}}, "made with other options"),
    ],
)
def test_other_options_are_refused(sections, message, models, copied):
    """A file with answers of two teachers or templates would look like any other."""
    folder, recipe = models
    if "teacher" in sections:
        sections = {"teacher": {"model": str(folder / "student")}}
    before = content(copied)
    with pytest.raises(UserError, match=message):
        answer_recipe(changed(recipe, **sections), output=copied)
    assert content(copied) == before


def test_files_of_the_user_are_kept(models, copied, tmp_path):
    """Answers that the user has corrected by hand must not be replaced by the teacher's."""
    recipe = changed(models[1])
    with copied.open("a") as file:
        file.write('{"prompt": "mine", "completion": "mine"}\n')
    mine = tmp_path / "mine.jsonl"
    mine.write_text("{}\n")
    for path in (copied, mine):
        before = path.read_bytes()
        with pytest.raises(UserError, match=rf"{path.name} was not written by dwakd generate, .*--output"):
            answer_recipe(recipe, output=path)
        assert path.read_bytes() == before
    mine.with_suffix(".json").write_text('[{"prompt": "a"}]')
    mine.unlink()
    with pytest.raises(UserError, match=r"mine\.json is not a file of dwakd generate"):
        answer_recipe(recipe, output=mine)
    with pytest.raises(UserError, match=r"must end in \.jsonl"):
        answer_recipe(recipe, output=tmp_path / "answers.txt")


def test_a_damaged_shard_is_answered_again(models, copied, finished, caplog):
    """A disk that was full or a wrong edit must not end in a file with fewer answers."""
    shard = copied.with_suffix(".parts") / "shard-00002.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    flipped = "".join(lines).replace('"text": "', '"text": "!', 1)
    assert flipped != "".join(lines)
    for damaged in ("".join([*lines[:-2], lines[-1]]), "".join(lines)[:-20], "".join([lines[0], *lines[2:]]), flipped):
        shard.write_text(damaged)
        answer_recipe(changed(models[1]), output=copied)
        assert content(copied) == content(finished)
        assert "shard-00002.jsonl is damaged" in caplog.text
        caplog.clear()


def test_what_is_trained_on(models, finished, copied):
    """Labelled rows keep their responses, unless the teacher answers their prompts, too."""
    _, recipe = models
    responses = {"responses": "teacher"}
    added = training_examples(changed(recipe, data=responses, generate={"output": str(copied)}))
    answered = read_rows(finished)
    assert [row.response for row in added] == [row["response"] for row in LABELLED] + [
        row["completion"] for row in answered
    ]
    assert [row.index for row in added] == list(range(len(added)))
    kept = {"output": str(copied.parent / "all.jsonl"), "prompts": [recipe["data"]["train"]]}
    replaced = changed(recipe, data=responses, generate=kept)
    by_default = changed(recipe, data=responses, generate={**kept, "prompts": None})
    for one in (replaced, by_default):
        rows = training_examples(one)
        assert {row.instruction for row in rows} <= {row["prompt"] for row in LABELLED}
        assert not {row.response for row in rows} & {row["response"] for row in LABELLED}


def test_prompts_that_are_trained_on_twice(models, tmp_path, caplog):
    """The labelled rows are recognised by any name of their file, and a part of them that is answered is reported."""
    folder, recipe = models
    train = recipe["data"]["train"]
    other = f"{Path(train).parent}/../{folder.name}/{Path(train).name}"
    one = {"output": str(tmp_path / "all.jsonl"), "prompts": [other]}
    rows = training_examples(changed(recipe, data={"responses": "teacher"}, generate=one))
    assert not {row.response for row in rows} & {row["response"] for row in LABELLED}
    assert "trained on twice" not in caplog.text
    part = changed(
        recipe,
        data={"responses": "teacher"},
        generate={"output": str(tmp_path / "part.jsonl"), "prompts": [f"{train}@[:2]"]},
    )
    assert len(training_examples(part)) > len(LABELLED)
    assert f"2 prompts are trained on twice, with their response in {train}" in caplog.text
    before = read_rows(tmp_path / "part.jsonl")
    longer = part.model_copy(update={"generate": part.generate.model_copy(update={"min_characters": 10_000})})
    with pytest.raises(UserError, match=r"no answer of .* is left"):
        training_examples(longer, write=False)
    assert read_rows(tmp_path / "part.jsonl") == before
    (tmp_path / "part.parts" / "shard-00000.jsonl").unlink()
    with pytest.raises(UserError, match=r"part\.parts are not complete; run dwakd generate"):
        training_examples(part, write=False)


def test_limits(models, tmp_path):
    """`data.limit` must not limit other files, and `generate.limit` holds for each file."""
    _, recipe = models
    both = {"prompts": [*recipe["generate"]["prompts"], recipe["data"]["train"]], "output": str(tmp_path / "a.jsonl")}
    file, _ = answer_recipe(changed(recipe, data={"limit": 2}, generate={**both, "limit": 9}))
    assert file.num_prompts == 9 + 2
    assert [one["rows"] for one in file.manifest()["prompts"]] == [9, 2]


def test_train_answers_first_and_resumes(models, tmp_path, monkeypatch, capsys):
    """The answers are made if they are missing, read if they are there, and part of what a run is identified by."""
    folder, _ = models
    output = tmp_path / "answers.jsonl"
    base = ["train", folder / "recipe.yaml", "data.responses=teacher", f"generate.output={output}"]
    code, _, err = run(monkeypatch, capsys, *base, "loss.method=uld", "-o", tmp_path / "run")
    assert code == 0, err
    monkeypatch.setattr("dwakd.answers.run.load_causal_lm", lambda *args, **options: pytest.fail("loaded"))
    code, _, err = run(monkeypatch, capsys, *base, "-o", tmp_path / "second")
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, *base, "generate.seed=1", "-o", tmp_path / "second", "--resume")
    assert (code, "generate.seed is 0 there and 1 here" in one_sentence(err)) == (2, True)
    code, _, err = run(monkeypatch, capsys, *base, "data.max_prompt_length=2", "-o", tmp_path / "third")
    rows = f"the rows of {folder / 'labelled.jsonl'}, then the answers in {output}, row 0 (counting from 0)"
    assert (code, rows in one_sentence(err)) == (2, True)


def test_a_prompt_that_is_too_long(models, tmp_path, monkeypatch, capsys):
    """The message names the row, before hours of answering; or the row is skipped and counted."""
    folder, _ = models
    prompts = write_rows(tmp_path / "long.jsonl", [*({"prompt": p} for p in PROMPTS), {"prompt": "word " * 600}])
    base = ["generate", folder / "recipe.yaml", f"generate.prompts=[{prompts}]", "-o", tmp_path / "answers.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr("dwakd.answers.run.load_causal_lm", lambda *args, **options: pytest.fail("loaded"))
        code, _, err = run(monkeypatch, capsys, *base, "data.responses=teacher")
        assert code == 2
        assert (
            "long.jsonl, row 40 (counting from 0): the prompt has 3001 tokens for the student, above"
            in one_sentence(err)
        )
    code, _, err = run(monkeypatch, capsys, *base)
    assert code == 2
    assert "long.jsonl, row 40 (counting from 0): its prompt of " in one_sentence(err)
    code, _, err = run(monkeypatch, capsys, *base, "data.invalid_rows=skip")
    assert code == 0, err
    assert read_json(tmp_path / "answers.json")["left_out"]["refused"] == 1


def test_the_date_of_the_recipe(models, tmp_path):
    """The teacher would answer prompts of another day than those that are trained on; answers that exist keep their date."""
    _, recipe = models
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE)
    teacher = {**recipe["teacher"], "chat_template_path": str(tmp_path / "dated.jinja")}
    given = {"teacher": teacher, "generate": {"output": str(tmp_path / "a.jsonl"), "limit": 9}}
    for day in ("2001-02-03", "2004-05-06"):
        file, _ = answer_recipe(changed(recipe, data={"template": "chat", "template_date": day}, **given))
        assert file.request["the date for chat templates"] == "2001-02-03"


def test_a_missing_tokenizer():
    """Without this check, the command ends in an AttributeError."""
    with pytest.raises(
        UserError, match="tokenizer is missing: a model that is passed as an object needs its tokenizer"
    ):
        answer_prompts(teacher(), None, [{"prompt": "Why?"}])


def test_prompts_are_checked_for_the_models_that_are_trained(models, tmp_path, monkeypatch):
    """In training, the prompts would be refused after hours of answering. A method without a teacher has other limits."""
    monkeypatch.setattr("dwakd.answers.run.load_causal_lm", lambda *args, **options: pytest.fail("loaded"))
    lengths = [
        [len(TextEncoder(one, "plain").prompt_ids(Example(0, text))) for text in PROMPTS]
        for one in (byte_bpe(), TOKENIZER)
    ]
    limit = max(lengths[0])
    assert max(lengths[1]) > limit
    for method, error in (("alm", UserError), ("sft", pytest.fail.Exception)):
        options = {"data": {"responses": "teacher", "max_prompt_length": limit}, "loss": {"method": method}}
        recipe = changed(models[1], **options, generate={"output": str(tmp_path / f"{method}.jsonl")})
        with pytest.raises(error, match="above data.max_prompt_length" if method == "alm" else "loaded"):
            training_examples(recipe)


def test_a_teacher_that_never_ends(models, tmp_path, monkeypatch, capsys, caplog):
    """An answer without an end would teach the student to stop in the middle of a sentence."""
    folder, _ = models
    base = ["generate", folder / "recipe.yaml", "-o", tmp_path / "answers.jsonl"]
    code, _, err = run(monkeypatch, capsys, *base, "generate.max_new_tokens=1", "generate.seed=5", "generate.limit=3")
    assert code == 2
    assert "all 3 answers of" in one_sentence(err)
    assert "generate.max_new_tokens=1 without an end token: raise it" in one_sentence(err)
    assert not (tmp_path / "answers.jsonl").exists()
    assert "all 3 answers so far are cut" in caplog.text, "a warning after the first shard, not after hours"


def test_an_empty_answer(tmp_path, caplog):
    """An empty response would be refused by the training, hours later."""
    with pytest.raises(UserError, match=r"all 40 answers of \w+ are empty: use the data\.template"):
        answer_prompts(teacher(end_bias=50.0), TOKENIZER, [{"prompt": p} for p in PROMPTS], progress=False)
    options = GenerateSection(temperature=1.0, max_new_tokens=12)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    with caplog.at_level(logging.WARNING, "dwakd"):
        answered = answer_prompts(teacher(end_bias=7.0), TOKENIZER, rows, options, template="plain", progress=False)
    assert all(row["completion"] for row in answered)
    assert "empty" in caplog.text


def test_rows_in_memory_equal_the_command(models, finished):
    """A script and a recipe with the same options must train on the same text."""
    _, recipe = models
    options = GenerateSection(temperature=1.0, max_new_tokens=12, batch_size=7)
    rows = [{"prompt": prompt, "response": "ignored"} for prompt in PROMPTS]
    from_memory = answer_prompts(teacher(), TOKENIZER, rows, options, template="plain", progress=False)
    by_name = answer_prompts(recipe["teacher"]["model"], None, rows, options, template="plain", progress=False)
    without_numbers = [{key: row[key] for key in ("prompt", "completion")} for row in read_rows(finished)]
    for made in (from_memory, by_name):
        assert [{key: row[key] for key in ("prompt", "completion")} for row in made] == without_numbers


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"generate": {"output": None}}, r"--output or generate\.output"),
        ({"generate": {"prompts": ["nowhere.jsonl"]}}, r"nowhere\.jsonl"),
        ({"teacher": {"model": "./nowhere"}}, "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_sentence(sections, message, models, tmp_path, monkeypatch):
    """Each is found before the teacher is loaded, and no file is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dwakd.answers.run.load_causal_lm", lambda *args, **options: pytest.fail("loaded"))
    given = {"generate": {"output": "answers.jsonl"}} | sections
    if "generate" in sections:
        given["generate"] = {"output": "answers.jsonl"} | sections["generate"]
    with pytest.raises(UserError, match=message):
        answer_recipe(changed(models[1], **given))
    assert not list(tmp_path.iterdir())


def test_training_on_answers_needs_a_file_and_a_teacher():
    """The file is named once, so that every run reads the same text."""
    base = {"student": {"model": "s"}, "loss": {"method": "sft"}}
    data = {"train": "t", "responses": "teacher"}
    with pytest.raises(UserError, match=r"requires generate\.output"):
        recipe_from_dict({**base, "data": data, "teacher": {"model": "t"}})
    for command in ("train", "compare"):
        with pytest.raises(UserError, match=r"nobody answers the prompts: add a teacher without url"):
            recipe_from_dict({**base, "data": data, "generate": {"output": "a.jsonl"}}, command)
    endpoint = {"output": "a.jsonl", "endpoint": {"base_url": "http://localhost", "model": "m"}}
    assert recipe_from_dict({**base, "data": data, "generate": endpoint}).teachers == []


def test_answers_that_the_student_replaces():
    """A large teacher would answer all prompts for hours, and no answer would be used."""
    data, generate = {"train": "t", "responses": "teacher"}, {"output": "a.jsonl"}
    content = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": data, "generate": generate}
    given = {"loss": {"method": "alm"}, "training": {"lmbda": 1}}
    with pytest.raises(UserError, match=r"training\.lmbda: 1 .* data\.responses: teacher are never used"):
        recipe_from_dict({**content, **given})
    assert recipe_from_dict({**content, **given, "training": {"lmbda": 0.5}}).training == {"lmbda": 0.5}
    assert recipe_from_dict({**content, **given}, "generate").data.responses == "teacher"


def test_a_disk_that_is_full(models, tmp_path, monkeypatch):
    """The answers of finished shards must be kept, and the message must say so."""

    def full(path, data):
        if path.name == "shard-00001.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(path, data)

    monkeypatch.setattr("dwakd.answers.store.write_file", full)
    with pytest.raises(UserError, match=r"finished answers are kept.*No space left on device"):
        answer_recipe(changed(models[1]), output=tmp_path / "answers.jsonl")
    assert len(list((tmp_path / "answers.parts").glob("shard-*"))) == 1


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    """What a reader copies must run as it stands."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.setattr("dwakd.answers.GenerateSection", partial(GenerateSection, temperature=1.0))
    names = {
        "teacher": teacher(),
        "teacher_tokenizer": TOKENIZER,
        "prompts": [{"prompt": prompt} for prompt in PROMPTS],
        "student": tiny_model("llama", len(byte_bpe())),
        "student_tokenizer": byte_bpe(),
        "labelled": [{"prompt": row["prompt"], "completion": row["response"]} for row in LABELLED],
    }
    exec(example, names)
    assert len(names["trainer"].train_dataset) > len(LABELLED)
