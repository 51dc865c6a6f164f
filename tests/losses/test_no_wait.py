"""Test that losses never read the value of a tensor on the host, which would make it wait for a GPU."""

import dataclasses

import pytest
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel

from dwakd.data.collator import collate
from dwakd.losses import Widths, alignment, build_loss
from dwakd.models.rows import response_side
from dwakd.training.teacher import OnlineTeacher

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
WIDTHS = Widths(16, 24, 16, 24)
WAITS = (DataDependentOutputException, DynamicOutputShapeException)


def features():
    """Return the features of two examples with different lengths on both sides."""
    rows = []
    for example, (prompt, own, other) in enumerate([(2, 5, 4), (3, 2, 6)]):
        student, teacher = (
            {
                "input_ids": list(range(prompt + count)),
                "target_ids": list(range(prompt + count)),
                "response_mask": [False] * prompt + [True] * count,
                "byte_ends": [0] * prompt + list(range(1, count + 1)),
            }
            for count in (own, other)
        )
        rows.append({"example_id": example, "student": student, "teachers": [teacher]})
    return rows


def model(width):
    config = GPT2Config(vocab_size=40, n_embd=width, n_layer=1, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def step(method, batch, options=None, change=lambda side: side):
    """Run both models, the loss and the backward pass on fake tensors, which have no values."""
    student = model(16)
    loss = build_loss(method, options, widths=WIDTHS)
    teacher = None if method == "sft" else OnlineTeacher(model(24)).side(*batch.teachers)
    loss(change(response_side(student, batch.student)), teacher).loss.backward()
    assert student.transformer.wte.weight.grad is not None


@pytest.fixture
def without_values(monkeypatch):
    """Use fake tensors. The kernel of Soft-DTW, which reads its input on a CPU, is replaced."""
    monkeypatch.setattr(alignment, "soft_dtw", lambda costs, *arguments, **options: costs.sum((1, 2)))
    with FakeTensorMode():
        yield


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sft", {}),
        ("dskd", {}),
        ("dwa_kd", {}),
        ("dwa_kd", {"band": False}),
        ("dwa_kd", {"entropy_weights": False}),
        ("dwa_kd", {"gamma_end": 1.0, "gamma_steps": 10}),
    ],
)
def test_a_step_reads_no_values(method, options, without_values):
    """A training step reads no value of a tensor."""
    step(method, collate(features()), options)


def test_reading_a_value_raises_an_error(without_values):
    """The fake tensors raise an error if a value is read, so that the test above can fail."""
    with pytest.raises(WAITS):
        step("dwa_kd", collate(features()), change=lambda side: dataclasses.replace(side, num_rows=None))
