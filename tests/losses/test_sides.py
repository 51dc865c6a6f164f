"""Test that all methods refuse invalid sides with the same messages."""

import dataclasses

import pytest
import torch

from dwakd.kernels.checks import require
from dwakd.losses import METHODS, SeveralTeachers, TeacherScale, build_loss
from tests.losses.builders import WIDTHS, pair_of, random_examples, random_heads, side

LENGTHS = [(5, 5), (3, 3)]
TEACHERS = [name for name in METHODS if METHODS[name].options_type.needs_teacher]
PAIRED = ["min_ed", "gold", "x_token", "simct", "sra", "cdm", "dskd_v2", "dwa_kd_v2"]
ROWS = ("hidden", "input_embeddings", "target_embeddings", "target_ids", "byte_ends", "attention")
MAPPED = ["sra", "dskd", "dskd_v2", "dwa_kd", "dwa_kd_v2"]


def build(name):
    torch.manual_seed(0)
    return build_loss(name, {}, widths=WIDTHS, pair=pair_of(random_heads())).double()


def sides(lengths=LENGTHS, **options):
    examples, heads = random_examples(lengths, **options), random_heads()
    return [side(examples, name, head) for name, head in zip(("student", "teacher"), heads, strict=True)]


def changed(given, **fields):
    """Return a side with replaced tensors, without checking their shapes."""
    other = dataclasses.replace(given)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other


def wrong_sides(given, name):
    """Yield invalid sides, each with a pattern of the expected message."""
    target_ids = given.target_ids.clone()
    for value in (-100, -1, given.head.vocab_size):
        target_ids[3] = value
        yield dataclasses.replace(given, target_ids=target_ids.clone()), rf"{name}\.target_ids .* got {value}"
    for lengths in ([5, 2], [8, 0], [5, 4], [9, -1]):
        yield dataclasses.replace(given, lengths=torch.tensor(lengths)), rf"{name}\.lengths .* got \[{lengths[0]}, "
    rows = {field: getattr(given, field)[:0] for field in ROWS}
    yield (
        changed(given, **rows, lengths=torch.tensor([0, 0]), aligned_rows=None),
        f"{name}'s side has no response token",
    )
    for field in ("hidden", "target_embeddings", "byte_ends", "attention"):
        yield changed(given, **{field: getattr(given, field)[1:]}), rf"{name}\.{field} .*8 tokens.* 7"
    yield changed(given, hidden=torch.zeros(8, 7).double()), rf"{name}\.hidden .* 7"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrong", ["student", "teacher"])
def test_wrong_sides_are_named(name, wrong):
    """Invalid targets, lengths and shapes raise a ValueError that names the tensor and the value."""
    if name == "sft" and wrong == "teacher":
        pytest.skip("the teacher is ignored")
    loss, pair = build(name), dict(zip(("student", "teacher"), sides(), strict=True))
    loss(**pair)
    for bad, message in wrong_sides(pair[wrong], wrong):
        with pytest.raises(ValueError, match=message):
            loss(**{**pair, wrong: bad})


@pytest.mark.parametrize("name", TEACHERS)
def test_sides_of_other_examples_are_named(name):
    """Sides with different numbers of examples raise a ValueError with both numbers."""
    (student, _), (_, teacher) = sides(), sides([(5, 4), (2, 2), (1, 2)])
    with pytest.raises(ValueError, match="student's side has 2 examples and the teacher's side 3"):
        build(name)(student, teacher)


def test_one_tokenizer_gives_the_same_rows_in_each_example():
    """Methods for one tokenizer require equal lengths in each example, not only equal sums."""
    student, teacher = sides([(5, 3), (3, 5)])
    with pytest.raises(ValueError, match=r"\[3, 5\] and \[5, 3\]"):
        build("kd")(student, teacher)


@pytest.mark.parametrize("name", MAPPED)
def test_widths_of_the_maps_are_named(name):
    """Hidden states of another width than the maps raise a ValueError instead of an error of a matrix product."""
    loss, (student, teacher) = build(name), sides()
    for which, given in (("student", student), ("teacher", teacher)):
        width = given.head.hidden_size + 1
        head = dataclasses.replace(given.head, weight=torch.randn(given.head.vocab_size, width).double())
        wide = dataclasses.replace(given, head=head, hidden=torch.randn(8, width).double())
        pair = {"student": student, "teacher": teacher, which: wide}
        with pytest.raises(ValueError, match=rf"{which}\.hidden must have {width - 1} columns"):
            loss(**pair)


@pytest.mark.parametrize("name", ["dwa_kd", "dwa_kd_v2"])
def test_widths_of_embeddings_are_named(name):
    """Embeddings of another width than the maps raise a ValueError that names them."""
    loss, (student, teacher) = build(name), sides()
    narrow = dataclasses.replace(teacher, input_embeddings=torch.zeros(8, 2), target_embeddings=torch.zeros(8, 2))
    with pytest.raises(ValueError, match=r"teacher\.\w+_embeddings must have 8 columns.* 2"):
        loss(student, narrow)


@pytest.mark.parametrize("name", PAIRED)
def test_vocabularies_of_the_maps_are_named(name):
    """A head of another size than the token maps raises a ValueError with both sizes."""
    loss, (student, teacher) = build(name), sides()
    head = dataclasses.replace(teacher.head, weight=torch.cat([teacher.head.weight, torch.zeros(3, 8).double()]))
    with pytest.raises(ValueError, match=r"teacher\.head .*13.* 16"):
        loss(student, dataclasses.replace(teacher, head=head))


@pytest.mark.parametrize("name", ["uld", "dwa_kd"])
@pytest.mark.parametrize("gate", ["confidence", "weights"])
def test_other_numbers_of_teachers_are_named(name, gate):
    """Another number of teachers or scales than losses raises a ValueError instead of leaving some out."""
    module = SeveralTeachers([build(name), build(name)], gate=gate)
    student, teacher = sides()
    module(student, [teacher, teacher])
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match=f"teachers .*2.* got {count}"):
            module(student, [teacher] * count)
    with pytest.raises(ValueError, match=r"teacher_scale .*2.* got 1"):
        module(student, [teacher, teacher], teacher_scale=[TeacherScale.of(teacher)])
    target_ids = teacher.target_ids.clone().fill_(-100)
    with pytest.raises(ValueError, match="-100"):
        module(student, [teacher, dataclasses.replace(teacher, target_ids=target_ids)])


def test_devices_that_cannot_assert_are_read(monkeypatch):
    """On devices without asynchronous assertions, the values are read and checked on the host."""
    monkeypatch.setattr(torch, "_assert_async", lambda *arguments: (_ for _ in ()).throw(NotImplementedError))
    require(torch.tensor(True), "a number", lambda: 1)
    with pytest.raises(ValueError, match="a number, got 1"):
        require(torch.tensor(False), "a number", lambda: 1)
