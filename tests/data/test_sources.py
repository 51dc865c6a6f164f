"""Test reading rows: every format and layout gives the same examples, and the message about a malformed row names it."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from dwakd.data import sources
from dwakd.data.sources import EVAL_SPLITS, TEST_SPLITS, TRAIN_SPLITS, Example, load_examples
from dwakd.errors import UserError

ROWS = [
    {"prompt": "Wie heißt du?", "response": "Ich heiße Ada.", "source": "x"},
    {"prompt": 'Say "a,\nb"', "response": " a,\nb\u2028c\x0c ", "source": "y"},
    {"prompt": "Grüße 😀", "response": "e\u0301", "source": "z"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".csv":
            with path.open("w", newline="", encoding="utf-8-sig") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def test_a_transform_of_a_data_set_is_refused():
    """It changes rows when they are read, which the reader of rows does not do."""
    rows = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}]).with_transform(lambda batch: batch)
    with pytest.raises(UserError, match=r"has a transform .* apply it with map"):
        load_examples(rows)


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_examples(source, **options)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_formats_give_the_same_examples(tmp_path: Path, suffix: str) -> None:
    """All file formats give the same examples, with line ends, separators and byte-order marks as in the data."""
    examples = load_examples(str(write(tmp_path / f"data{suffix}", ROWS)))
    assert examples == [
        Example(n, row["prompt"], response=row["response"], references=(row["response"],)) for n, row in enumerate(ROWS)
    ]


def test_objects_in_memory_are_read_like_files() -> None:
    """A data set in memory gives the same examples as the same rows in a file."""
    expected = load_examples(ROWS)
    table = datasets.Dataset.from_list(ROWS)
    assert load_examples(table) == expected
    assert load_examples(table.with_format("numpy")) == expected
    assert load_examples(datasets.DatasetDict(test=table), split="test") == expected
    assert load_examples(table, limit=2) == expected[:2]
    assert "no split 'train': its splits are test" in error_of(datasets.DatasetDict(test=table))
    assert "cannot read rows from int" in error_of(3)


def test_hub_ids_go_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Id, config and split are passed to `load_dataset`, and an error names them."""
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        calls.append((*args, options))
        if args[0] == "no/such":
            raise ConnectionError("no network\nand more")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    assert len(load_examples("org/name:main", split="train[:3]")) == 3
    load_examples("org/name")
    load_examples("org/name:main@train[3:9]", split="validation")
    assert calls == [
        ("org/name", "main", {"split": "train[:3]"}),
        ("org/name", None, {"split": "train"}),
        ("org/name", "main", {"split": "train[3:9]"}),
    ]
    assert "'no/such' (split 'test')" in error_of("no/such", split="test")
    assert "and more" not in error_of("no/such")


@pytest.mark.parametrize(
    ("names", "train", "evaluation", "test"),
    [
        (["train", "validation", "test"], "train", "validation", "test"),
        (["train", "test"], "train", "test", "test"),
        (["train", "dev"], "train", "dev", "dev"),
        (["train"], "train", None, None),
        (["eval"], None, "eval", "eval"),
        (["a", "b"], None, None, None),
    ],
)
def test_splits_are_read_by_their_use(
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    train: str | None,
    evaluation: str | None,
    test: str | None,
) -> None:
    """Training and evaluation each read their own split. An evaluation never reads the training split."""
    splits = {name: datasets.Dataset.from_list([{"prompt": "a", "response": name}]) for name in names}
    iterables = {name: table.to_iterable_dataset() for name, table in splits.items()}
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda *_, split: splits[split] if split else splits)
    kinds = [datasets.DatasetDict(splits), datasets.IterableDatasetDict(iterables), splits, "org/name"]
    for wanted, expected in ((TRAIN_SPLITS, train), (EVAL_SPLITS, evaluation), (TEST_SPLITS, test)):
        for source in kinds:
            if expected is not None:
                assert load_examples(source, split=wanted)[0].response == expected
            else:
                error = error_of(source, split=wanted)
                assert f"no split {wanted[0]!r}" in error
                assert f"its splits are {', '.join(names)}" in error
    assert load_examples(f"org/name@{names[-1]}", split=TRAIN_SPLITS)[0].response == names[-1]


def test_another_split_than_usual_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """A warning says if the test split is used for evaluation during training."""
    splits = {"train": ROWS, "test": ROWS}
    with caplog.at_level(logging.WARNING, "dwakd"):
        load_examples(splits, split=TRAIN_SPLITS)
        load_examples(splits, split=TEST_SPLITS)
        assert not caplog.records
        load_examples(splits, split=EVAL_SPLITS)
    assert "'validation'" in caplog.text
    assert "'test'" in caplog.text


def test_streams_are_read_up_to_the_limit() -> None:
    """A streamed data set is read only up to the limit."""

    def endless() -> Any:
        while True:
            yield from ROWS

    stream = datasets.IterableDataset.from_generator(endless)
    assert load_examples(stream, limit=2) == load_examples(ROWS)[:2]
    assert load_examples(datasets.Dataset.from_list(ROWS).to_iterable_dataset()) == load_examples(ROWS)


def test_features_that_cannot_be_decoded() -> None:
    """Images and sounds, which need extra packages, are decoded only if their column is used."""
    table = datasets.Dataset.from_dict({"prompt": ["a"], "response": ["b"], "image": [{"bytes": b"no", "path": None}]})
    table = table.cast_column("image", datasets.Image())
    for source in (table, table.to_iterable_dataset(), datasets.DatasetDict(train=table)):
        assert load_examples(source)[0].response == "b"
        assert error_of(source, response="image", name="my rows").startswith("my rows: cannot be read (")


BROKEN: list[Any] = [
    {"prompt": "a", "response": None},
    {"prompt": "a"},
    {"prompt": None, "response": "b"},
    {"prompt": 3, "response": "b"},
    {"prompt": [], "response": "b"},
    {"prompt": "a", "response": []},
    {"prompt": "a", "response": ["b", None]},
    ["a", "b"],
    None,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_malformed_rows_are_skipped_if_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: Any) -> None:
    """With `skip`, malformed rows do not stop the run, and a warning counts them."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [ROWS[0], broken, ROWS[2]])))
    with caplog.at_level(logging.WARNING, "dwakd"):
        kept = load_examples(path, invalid_rows="skip")
    assert [(example.index, example.response) for example in kept] == [
        (0, ROWS[0]["response"]),
        (2, ROWS[2]["response"]),
    ]
    assert len(caplog.records) == 1
    assert "1 of 3 rows" in caplog.text
    assert f"{path}, line 2: " in caplog.text
    assert error_of(path).startswith(f"{path}, line 2: ")
    assert error_of(path).endswith("data.invalid_rows: skip leaves it out")


def test_skipping_leaves_conversations_without_an_answer_out() -> None:
    """Conversations without an answer are skipped too. If no row is left, the error names the first reason."""
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows: list[Any] = [{"messages": turns} for turns in ([question], [question, answer], [], [answer], None)]
    assert [example.index for example in load_examples(rows, invalid_rows="skip")] == [1]
    assert "none of its 1 rows can be used" in error_of(rows[:1], invalid_rows="skip")
    assert "no assistant turn" in error_of(rows[:1], invalid_rows="skip")
    assert "data.invalid_rows 'drop' is unknown" in error_of(rows, invalid_rows="drop")


def test_files_of_the_hub_are_read_as_local_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file on the hub is read like a local one, also if a column mixes strings and lists, which `datasets` cannot read."""
    rows = [{"instruction": f"Ask {n}.", "output": f"Answer {n}." if n % 2 else [f"Yes {n}.", "No."]} for n in range(5)]
    (tmp_path / "11_").mkdir()
    (tmp_path / "11_" / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def hf_hub_download(repo: str, file: str, repo_type: str) -> str:
        assert (repo, repo_type) == ("MiniLLM/sinst", "dataset")
        if not (tmp_path / file).exists():
            raise FileNotFoundError(f"404 for {file}\nand more")
        return str(tmp_path / file)

    monkeypatch.setattr(sources.huggingface_hub, "hf_hub_download", hf_hub_download)
    name = "MiniLLM/sinst:11_/valid.jsonl"
    whole = load_examples(name)
    assert [example.references for example in whole[:2]] == [("Yes 0.", "No."), ("Answer 1.",)]
    for rows_of, expected in (("@[2:]", whole[2:]), ("@train[:3]", whole[:3]), ("@[1:4]", whole[1:4])):
        assert [example.response for example in load_examples(name + rows_of)] == [e.response for e in expected]
    error = error_of("MiniLLM/sinst:none.jsonl")
    assert "file none.jsonl of the data set MiniLLM/sinst" in error
    assert "404" in error
    assert "and more" not in error


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "i", "input": "x", "output": "o"}, Example(0, "i", "x", "o", ("o",))),
        ({"instruction": "i", "input": None, "output": "o"}, Example(0, "i", "", "o", ("o",))),
        ({"instruction": "i", "context": "x", "response": "o"}, Example(0, "i", "x", "o", ("o",))),
        ({"prompt": "i", "response": "o", "input": "ignored"}, Example(0, "i", "", "o", ("o",))),
        ({"prompt": "i", "completion": "o"}, Example(0, "i", "", "o", ("o",))),
        ({"prompt": "i", "output": "o"}, Example(0, "i", "", "o", ("o",))),
        ({"prompt": "rendered i", "instruction": "i", "output": "o"}, Example(0, "i", "", "o", ("o",))),
        ({"prompt": "i", "response": ["o", "p"]}, Example(0, "i", "", "o", ("o", "p"))),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "i"},
                    {"role": "assistant", "content": "o"},
                    {"role": "user", "content": "thanks"},
                ]
            },
            Example(
                0,
                "i",
                response="o",
                references=("o",),
                history=(
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ),
            ),
        ),
        (
            {"conversations": [{"from": "human", "value": "i"}, {"from": "gpt", "value": "o"}]},
            Example(0, "i", response="o", references=("o",)),
        ),
        (
            {
                "prompt": [{"role": "user", "content": "i"}],
                "completion": [{"role": "assistant", "content": "o"}],
            },
            Example(0, "i", response="o", references=("o",)),
        ),
    ],
)
def test_layouts_are_recognised(row: dict[str, Any], expected: Example) -> None:
    """The usual column names and layouts of conversations are recognised."""
    assert load_examples([row]) == [expected]
    assert load_examples(datasets.Dataset.from_list([row])) == [expected]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_rows_of_a_local_file(tmp_path: Path, suffix: str) -> None:
    """Ranges of rows have the same syntax for local files and for files of the Hub."""
    path = write(tmp_path / f"data.{suffix}", ROWS)
    whole = [example.response for example in load_examples(path)]
    for rows_of, expected in (("@[1:]", whole[1:]), ("@train[:2]", whole[:2]), ("@[1:2]", whole[1:2])):
        assert [example.response for example in load_examples(f"{path}{rows_of}")] == expected


def test_named_columns_win() -> None:
    """Columns that the user names have priority over the usual names. Dolly's `context` is found automatically."""
    row = {"question": "q", "hint": "h", "answer": "a", "instruction": "i", "context": "c", "response": "r"}
    named = load_examples([row], prompt="question", response="answer", input="hint")
    assert named == [Example(0, "q", "h", "a", ("a",))]
    assert load_examples([row], prompt="question", response="answer")[0].input == ""
    assert load_examples([row], prompt="instruction", response="response")[0].input == "c"


def test_questions_without_answers() -> None:
    """An evaluation set may lack answers, as Vicuna does. If it has answers, they are kept."""
    question = {"role": "user", "content": "q"}
    assert load_examples([{"instruction": "q"}], need_response=False) == [Example(0, "q")]
    assert load_examples([{"messages": [question]}], need_response=False) == [Example(0, "q")]
    assert load_examples([{"prompt": "q", "response": None}], need_response=False) == [Example(0, "q")]
    answered = {"messages": [question, {"role": "assistant", "content": "a"}]}
    assert load_examples([answered], need_response=False)[0].references == ("a",)
    assert "no column with the response (output, response, completion)" in error_of([{"instruction": "q"}])


def test_limit_reads_no_further(tmp_path: Path) -> None:
    """With a limit, the rest of a large file is not read."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\nbroken\n')
    assert len(load_examples(path, limit=1)) == 1
    assert "at least 1" in error_of(path, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "response": }', "line 3: not valid JSON (Expecting value, column 29)"),
        ('["a"]', "line 3: expected an object with named columns, got list ['a']"),
        ('[{"prompt": "a"}]', "got list [{'prompt': 'a'}]; use the suffix .json"),
        ('{"prompt": "a", "response": 4}', "line 3: 'response' must be a string, got int 4"),
        ('{"prompt": "a", "response": null}', "line 3: 'response' must be a string, got null"),
        ('{"prompt": {"x": 1}, "response": "b"}', "line 3: 'prompt' must be a string, got dict"),
        ('{"prompt": "a"}', "line 3: 'response' must be a string, got null"),
        ('{"prompt": "a", "response": []}', "line 3: 'response' is an empty list"),
        ('{"prompt": "a", "response": ["b", 2]}', "line 3: 'response'[1] must be a string, got int 2"),
        ('{"prompt": "a", "response": "\\ud800"}', "line 3: 'response' is not valid Unicode"),
        ('{"prompt": ["a"], "response": "b"}', "line 3: 'prompt'[0] must be an object with role and content, got str"),
        ('{"prompt": [], "response": "b"}', "line 3: the turn before the answer in 'prompt' must be the user's"),
        (b'{"prompt": "\xff", "response": "b"}', "line 3: not UTF-8"),
        ("[" * 100_000, "line 3: not valid JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    """The message contains the line number of a malformed row. Blank lines count, as in an editor."""
    path = tmp_path / "data.jsonl"
    data = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n\n' + data + b"\n")
    error = error_of(str(path))
    assert error.startswith(f"{path}, line 3: ")
    assert message in error
    assert "the rows, " in error_of(str(path), name="the rows")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"prompt": "a"}', "a list of objects, got dict"),
        (
            "a.json",
            '{"prompt": "a"}\n{"prompt": "b"}\n',
            "line 2: not valid JSON (Extra data, column 1): correct it, or use the suffix .jsonl",
        ),
        ("a.json", '[{"prompt": "a", "response": "b"}, 3]', "row 1 (counting from 0): expected an object"),
        ("a.json", "[]", "is empty"),
        ("a.jsonl", "\n \n", "is empty"),
        ("a.csv", "prompt,response\n", "is empty"),
        ("a.csv", "", "is empty"),
        ("a.csv", 'prompt,response\n"a\nb",c\nd\n', "line 4: the number of fields differs"),
        ("a.csv", "prompt,response\na,b,c\n", "line 2: the number of fields differs"),
        ("a.csv", 'prompt,response\n"a"b,c\n', "line 2: not valid CSV"),
        ("a.parquet", "no", "cannot be read"),
        ("a.txt", "no", "cannot read .txt: use .json, .jsonl, .csv, .parquet"),
        ("a", "no", "cannot read a file without suffix"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    """Each kind of malformed file has its own message, which contains the path."""
    path = tmp_path / name
    path.write_text(content)
    error = error_of(str(path))
    assert str(path) in error
    assert message in error


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    """A missing file is not taken for a hub id, and the message about a missing column lists the columns."""
    for wrong in ("rows.jsonl@train[:50%]", "rows.jsonl@[-2:]", "rows.jsonl@test"):
        with pytest.raises(UserError, match=r"the rows of a file are given as rows\.jsonl@\[start:stop\]"):
            load_examples(wrong)
    for missing in ("data/valid.jsonl", "none.jsonl@[2:4]", tmp_path / "nothing"):
        assert f"{missing}: cannot be read (FileNotFoundError: No such file" in error_of(missing)
    assert f"{tmp_path}: cannot be read" in error_of(str(tmp_path))
    assert "is empty" in error_of([])
    assert "is empty" in error_of(datasets.Dataset.from_list([]))
    path = str(write(tmp_path / "data.jsonl", ROWS))
    for option in ("prompt", "response", "input"):
        error = error_of(path, **{option: "answer"})
        assert f"{path} has no column 'answer'" in error
        assert f"data.{option}" in error
        assert "prompt, response, source" in error
    assert "no column with the prompt" in error_of([{"text": "a"}])
    assert "its columns are: text" in error_of(datasets.Dataset.from_list([{"text": "a"}]))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        ("hello", "'messages' must be a list of turns"),
        ([{"role": "assistant", "content": "a"}], "must be the user's"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
            "'messages'[1] content must be a string, got null",
        ),
        ([{"content": "a"}], "'messages'[0] role must be a string, got null"),
        (["a"], "'messages'[0] must be an object"),
    ],
)
def test_malformed_conversations_are_named(messages: list[Any], message: str) -> None:
    """A conversation without an answer, or with an answer to no question, is refused with a message."""
    assert message in error_of([{"messages": messages}])
