"""Test alignments and values of DSKD and DWA-KD against a literal float64 implementation, and for reading the label."""

import dataclasses

import pytest
import torch

import dwakd
from dwakd.errors import UserError
from dwakd.losses import DskdLoss, DwaKdLoss, TeacherScale, Widths, method_options
from tests.builders import tiny_model
from tests.losses import reference
from tests.losses.builders import OPTIONS, WIDTHS, random_examples, random_heads, side
from tests.training.builders import TOKENIZERS

LENGTHS = [(6, 9), (8, 4), (1, 2), (5, 5)]
ENDS = [
    ([2, 3, 5, 9, 12, 12], [1, 2, 3, 4, 5, 7, 9, 12, 12]),
    ([1, 2, 3, 4, 5, 6, 7, 7], [4, 6, 7, 7]),
    ([3], [1, 3]),
    ([2, 4, 6, 8, 9], [1, 3, 5, 7, 9]),  # only the starts of the responses agree
]
FORMS = [
    {"variant": "recommended"},
    {"variant": "recommended", "entropy_weights": False, "gate": False, "teacher_weights": False},
    {"variant": "recommended", "gate": False, "temperature": 2.0, "band_base": 0.4},
    {"alignment": "bytes"},
    {"alignment": "attention", "values": "hidden"},
    {"alignment": "causal_attention", "values": "hidden", "band_base": 0.3},
    {"alignment": "causal_attention", "values": "hidden_and_target", "gate": False},
]


def examples_with_ends(seed=0):
    examples = random_examples(LENGTHS, seed=seed)
    for example, ends in zip(examples, ENDS, strict=True):
        example["student_ends"], example["teacher_ends"] = map(torch.tensor, ends)
    return examples


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_and_gradients_of_a_literal_twin(form):
    """Terms and gradients of the student and of the maps equal the literal implementation."""
    torch.manual_seed(1)
    loss = DwaKdLoss(widths=WIDTHS, **form).double()
    examples, heads = examples_with_ends(), random_heads()
    leaves = [e[key].requires_grad_() for e in examples for key in ("student_hidden", "student_out")]
    leaves += [heads[0].requires_grad_(), *loss.parameters()]
    output = loss(side(examples, "student", heads[0]), side(examples, "teacher", heads[1]))
    maps = {name: dict(part.named_parameters()) for name, part in loss.projectors.named_children()}
    options = {short: getattr(loss.options, name) for short, name in OPTIONS.items()}
    where = {name: getattr(loss.options, name) for name in ("alignment", "values")}
    expected = reference.dwa_kd(examples, *heads, maps, **options, **where)
    for name, value in expected.items():
        assert output.terms[name].item() == pytest.approx(float(value.detach()), abs=1e-9), name
    pairs = (torch.autograd.grad(total, leaves, retain_graph=True) for total in (output.loss, expected["loss"]))
    for got, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-6)


def test_without_the_teacher_space():
    """Without the term of the teacher's space, all other terms are unchanged."""
    torch.manual_seed(1)
    loss = DwaKdLoss(widths=WIDTHS, variant="recommended").double()
    other = DwaKdLoss(widths=WIDTHS, variant="recommended", teacher_space=False).double()
    other.load_state_dict(loss.state_dict())
    examples, heads = examples_with_ends(), random_heads()
    both = [one(side(examples, "student", heads[0]), side(examples, "teacher", heads[1])) for one in (loss, other)]
    assert both[0].terms.keys() - both[1].terms.keys() == {"kd_teacher"}
    torch.testing.assert_close(both[0].loss - 0.1 * both[0].terms["kd_teacher"], both[1].loss)


@pytest.mark.parametrize("alignment", ["attention", "causal_attention", "bytes"])
@pytest.mark.parametrize("off", [{"teacher_space": False}, {"dtw_weight": 0.0}, {"kd_weight": 0.0}], ids=str)
def test_every_trained_map_takes_part_in_the_loss(alignment, off):
    """DistributedDataParallel ends a run in which a trained parameter is not used."""
    loss = DwaKdLoss(widths=WIDTHS, alignment=alignment, values="hidden", **off).double()
    examples, heads = examples_with_ends(), random_heads()
    loss(side(examples, "student", heads[0]), side(examples, "teacher", heads[1])).loss.backward()
    assert all(map_.grad is not None for map_ in loss.parameters() if map_.requires_grad)


def test_dskd_by_bytes_is_dwa_kd_without_weights_and_alignment():
    """Without weights and Soft-DTW, DWA-KD has the loss of DSKD without its mask for the same alignment."""
    torch.manual_seed(1)
    shared = {"alignment": "bytes", "values": "hidden", "temperature": 1.5}
    dskd = DskdLoss(widths=WIDTHS, accuracy_mask=False, kd_rate=0.3, **shared).double()
    weights = {"entropy_weights": False, "gate": False, "teacher_weights": False, "dtw_weight": 0.0}
    dwa_kd = DwaKdLoss(widths=WIDTHS, ce_weight=0.7, kd_weight=0.3, **weights, **shared).double()
    dwa_kd.projectors.load_state_dict(dskd.projectors.state_dict())
    examples, heads = examples_with_ends(), random_heads()
    outputs = [
        loss(side(examples, "student", heads[0]), side(examples, "teacher", heads[1])) for loss in (dskd, dwa_kd)
    ]
    for name, value in outputs[0].terms.items():
        torch.testing.assert_close(outputs[1].terms[name], value)


@pytest.mark.parametrize("form", [{"variant": "recommended"}, {"alignment": "bytes"}])
def test_states_of_any_widths(form):
    """The teacher's embeddings may be narrower than its hidden states only if the values do not include the target."""
    widths = Widths(6, 8, 6, 4)
    if "variant" in form:
        DwaKdLoss(widths=widths, **form)
    else:
        with pytest.raises(ValueError, match=r"widths are 4 and 8; set loss.values=hidden"):
            DwaKdLoss(widths=widths, **form)


def test_values_have_no_effect_with_one_position_for_both_models():
    """A user who sets `values` with `alignment: position` would believe that the label was added or left out."""
    for values in ("hidden", "hidden_and_target"):
        with pytest.raises(UserError, match=f"values={values} has no effect with alignment=position"):
            DskdLoss(widths=WIDTHS, alignment="position", values=values)
    assert method_options("dskd", {"alignment": "position"}).supports_sampled  # its values never contain the target


def test_sampled_responses_are_no_labels():
    """Responses that the student sampled are not used as labels, and methods that read the target do not support them."""
    loss = DwaKdLoss(widths=WIDTHS, variant="recommended", dtw_weight=0.0).double()
    examples, heads = examples_with_ends(), random_heads()
    sides = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    terms = loss(*sides).terms
    sampled = loss(dataclasses.replace(sides[0], sampled=True), sides[1])
    for name in ("kd_student", "kd_teacher"):
        assert sampled.terms[name] == terms[name] > 0
    assert terms["t2s_ce"] > 0
    assert sampled.terms["ce"] == sampled.terms["t2s_ce"] == 0
    torch.testing.assert_close(sampled.loss, 0.1 * (terms["kd_student"] + terms["kd_teacher"]))
    dskd = DskdLoss(widths=WIDTHS, kd_rate=0.1, alignment="bytes", values="hidden").double()
    without_mask = DskdLoss(widths=WIDTHS, **dskd.options.model_dump() | {"accuracy_mask": False}).double()
    without_mask.load_state_dict(dskd.state_dict())
    assert dskd(*sides).terms["kd_student"] < without_mask(*sides).terms["kd_student"]
    sampled = dskd(dataclasses.replace(sides[0], sampled=True), sides[1])
    torch.testing.assert_close(sampled.terms["kd_student"], without_mask(*sides).terms["kd_student"])
    supports = {
        "sft": False, "min_ed": False, "alm": True, "gold": True, "dskd": False, "dwa_kd": False, "dwa_kd_v2": True,
    }  # fmt: skip
    assert {name: method_options(name).supports_sampled for name in supports} == supports
    assert method_options("dwa_kd", {"variant": "recommended"}).supports_sampled


TEXTS = ("The old red house", ", near the hill, is warm 😀.", " was sold by my brother.")


@pytest.fixture(scope="module")
def two_sides():
    """Return the sides of two responses that begin with the same text, for tiny models with different tokenizers."""
    student, teacher = tiny_model("llama", len(TOKENIZERS[0]), seed=1), tiny_model("gemma2", len(TOKENIZERS[1]), seed=2)
    pairs = [
        dwakd.encode_rows([{"prompt": "Say it.", "response": TEXTS[0] + end}], *TOKENIZERS, template="plain")
        for end in TEXTS[1:]
    ]
    return [dwakd.paired_sides(student.double(), teacher.double(), dwakd.collate([one[0]])) for one in pairs]


def change(loss, two_sides):
    """Return the largest difference between the projected teacher states of the two responses before their texts differ."""
    end = len(TEXTS[0].encode())
    scale = TeacherScale.of(two_sides[0][1])
    rows = [loss.projected(*sides, scale).hidden[sides[0].byte_starts <= end] for sides in two_sides]
    ids = [sides[0].target_ids[sides[0].byte_ends <= end] for sides in two_sides]
    assert torch.equal(*ids)  # the tokenisation before the change is the same
    assert len(ids[0]) > 3
    assert len(rows[0]) == len(rows[1]) == len(ids[0]) + 1
    return float((rows[0] - rows[1]).detach().abs().max())


@pytest.mark.parametrize(
    ("options", "leaks"),
    [
        ({"variant": "recommended"}, False),
        ({"alignment": "causal_attention", "values": "hidden"}, False),
        ({"variant": "paper"}, True),
        ({"alignment": "attention", "values": "hidden"}, True),  # attention reads states after the label
        ({"alignment": "bytes", "values": "hidden_and_target"}, True),
        ({"alignment": "causal_attention", "values": "hidden_and_target"}, True),
    ],
    ids=str,
)
def test_whether_the_projected_teacher_reads_the_label(two_sides, options, leaks):
    """The projected teacher reads the label if and only if its states depend on text from the predicted byte on."""
    torch.manual_seed(0)
    student, teacher = two_sides[0]
    shapes = (
        (part.shape[1] for part in parts)
        for parts in ((student.hidden, teacher.hidden), (student.input_embeddings, teacher.input_embeddings))
    )
    widths = Widths(*(size for pair in shapes for size in pair))
    loss = DwaKdLoss(widths=widths, **options).double()
    assert (change(loss, two_sides) > 1e-6) is leaks


def test_unknown_alignment():
    """DWA-KD refuses the alignment by position, which requires one tokenizer."""
    with pytest.raises(UserError, match=r"alignment must be .*'bytes'.* got 'position'"):
        DwaKdLoss(widths=WIDTHS, alignment="position")
