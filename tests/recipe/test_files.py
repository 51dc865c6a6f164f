"""Test that recipe files are read strictly."""

import pytest

from dwakd.errors import UserError
from dwakd.recipe.files import apply_override, parse_yaml, read_recipe, read_saved_recipe


def test_numbers_and_words_are_what_they_look_like():
    """5e-4 is read as a number and `no` as a word, unlike in YAML 1.1."""
    read = parse_yaml("{a: 5e-4, b: no, c: true, d: 1.0e-3, e: '1'}")
    assert read == {"a": 5e-4, "b": "no", "c": True, "d": 1e-3, "e": "1"}
    assert parse_yaml("[010, 08, 1:30, 0, -7, 1_000, 0x1f]") == ["010", "08", "1:30", 0, -7, 1000, 31]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"student: [", "recipe .*recipe.yaml is not valid YAML: line 1, column 11: "),
        (b"student: \x01", "not valid YAML: (?!.*unicode string)"),
        (b"student: \xff", "not valid YAML"),
        (b"loss: {method: sft}\nloss: {method: uld}", "loss is given twice"),
        (b"- student", "must contain sections"),
        (b"", "must contain sections"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content, message, tmp_path):
    """A file that is not a recipe is refused, and so are repeated sections."""
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"is a folder: name a recipe"):
        read_recipe(tmp_path)


UNREADABLE = [
    "2024-99-99",
    "!!timestamp x",
    "!!bool maybe",
    "!!int abc",
    "!!int ''",
    "!!float x",
    "0b_",
    "9" * 4301,
    "0x" + "f" * 4301,
]
UNREADABLE += [
    "[" * 1000,
    "!!set [a]",
    "!!map x",
    "!!omap x",
    "{[a]: 1}",
    "{? {a: b} : 1}",
    "!!binary é",
    "=",
    "!!python/name:os.system x",
    r'"\U00110000"',
    r'"\UA0000000"',
]


@pytest.mark.parametrize("value", UNREADABLE)
def test_a_value_that_its_tag_does_not_allow_is_refused_in_one_line(value, tmp_path):
    """A mistyped date or a number without digits ends with a sentence instead of a traceback of PyYAML."""
    (tmp_path / "recipe.yaml").write_text(f"student:\n  model: {value}\n", encoding="utf-8")
    with pytest.raises(UserError, match="not valid YAML: ") as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="the value is not valid YAML"):
        apply_override({}, f"student.model={value}")


def test_the_place_of_a_value_that_its_tag_does_not_allow(tmp_path):
    """The message names line and column, and the fix."""
    (tmp_path / "recipe.yaml").write_text("data:\n  train: 2024-99-99\n")
    with pytest.raises(
        UserError, match=r"line 2, column 10: '2024-99-99' is not a valid timestamp: .*quote it as text"
    ):
        read_recipe(tmp_path / "recipe.yaml")


def test_overrides_change_and_add_options(tmp_path):
    """Overrides change and add options. Their values are parsed as in the file."""
    (tmp_path / "recipe.yaml").write_text("loss: {method: sft}\ntraining:\nteacher: [{model: a}, {model: b}]\n")
    overrides = ["loss.method=uld", "training.learning_rate=5e-4", "student.peft.r=4", "compare.methods=[sft, uld]"]
    overrides += ["teacher.2.weight=3", "teacher.1={model: c}"]
    assert read_recipe(tmp_path / "recipe.yaml", overrides) == {
        "teacher": [{"model": "c"}, {"model": "b", "weight": 3}],
        "loss": {"method": "uld"},
        "training": {"learning_rate": 5e-4},
        "student": {"peft": {"r": 4}},
        "compare": {"methods": ["sft", "uld"]},
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperature", "must look like section.option=value"),
        ("loss..a=1", "must look like section.option=value"),
        ("teacher.model=x", r"teacher is a list here, of 1: write teacher\.1 for the first"),
        ("teacher.0.model=x", "teacher is a list here"),
        ("teacher.2.model=x", "teacher is a list here"),
        ("loss.method.a=1", "loss\.method is no section"),
        ("loss.method=[", "not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_applied(override, message):
    """An override that cannot be applied is refused with a message."""
    with pytest.raises(UserError, match=message):
        apply_override({"teacher": [{"model": "a"}], "loss": {"method": "sft"}}, override)


@pytest.mark.parametrize(("content", "reason"), [("", "no section data"), ("data: {train: [", "line 1, column 16")])
def test_a_damaged_saved_recipe_is_named_with_the_fix(content, reason, tmp_path):
    """If a saved recipe is incomplete or empty, as after a crash, the message names it and the fix."""
    (tmp_path / "saved.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"saved.yaml is damaged \(.*{reason}.*; remove it"):
        read_saved_recipe(tmp_path / "saved.yaml", fix="remove it")
