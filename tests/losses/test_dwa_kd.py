"""Test DWA-KD against the specification's vectors and a literal float64 implementation."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from dwakd.kernels import head_loss
from dwakd.kernels.head_loss import entropy
from dwakd.losses import DwaKdLoss, TeacherScale, Widths
from dwakd.losses.alignment import soft_dtw_divergences
from dwakd.losses.attention import Focus, Projectors, cross_model_attention
from dwakd.losses.band import Band
from dwakd.losses.record import recording
from dwakd.losses.weights import student_weights, teacher_weights
from tests.losses import reference
from tests.losses.builders import OPTIONS, random_examples, random_heads, side

VECTORS = sorted((Path(__file__).parents[1] / "vectors").glob("*.json"))
MAPS = ("query", "t2s", "s2t", "embedding_t2s")


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def loss_with_maps(widths, maps, **options):
    loss = DwaKdLoss(widths=widths, **options).double()
    with torch.no_grad():
        for name in MAPS:
            getattr(loss.projectors, name).weight.copy_(maps[name]["weight"])
            getattr(loss.projectors, name).bias.copy_(maps[name]["bias"])
    return loss


def our_terms_and_gradients(examples, heads, maps, **options):
    """Return the terms, and the gradients of the student's head, hidden states, target embeddings and maps."""
    leaves = [e[key].requires_grad_() for e in examples for key in ("student_hidden", "student_out")]
    student_head = heads[0].requires_grad_()
    widths = Widths(heads[0].shape[1], heads[1].shape[1], heads[0].shape[1], heads[1].shape[1])
    loss = loss_with_maps(widths, maps, **options)
    output = loss(side(examples, "student", student_head), side(examples, "teacher", heads[1]))
    parameters = dict(loss.projectors.named_parameters())
    gradients = torch.autograd.grad(output.loss, [student_head, *leaves, *parameters.values()])
    return (
        output.terms,
        gradients[0],
        gradients[1 : 1 + len(leaves)],
        dict(zip(parameters, gradients[1 + len(leaves) :], strict=True)),
    )


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("impl", "head"), [("naive", "naive"), ("cpu", "chunked"), ("cpu", "row_by_row")])
def test_vectors_of_the_specification(path, impl, head, monkeypatch):
    """Every term and every gradient equals the published test vectors."""
    if head == "naive":
        monkeypatch.setattr("dwakd.losses.dwa_kd.head_loss", partial(head_loss, impl="naive"))
    if head == "row_by_row":
        monkeypatch.setattr("dwakd.losses.dwa_kd.head_loss", partial(head_loss, budget=1))
    content = json.loads(path.read_text())
    examples = [
        {key: torch.tensor(v) if key.endswith("target") else double(v) for key, v in e.items()}
        for e in content["examples"]
    ]
    maps = {name: {k: double(v) for k, v in m.items()} for name, m in content["projectors"].items()}
    options = {OPTIONS[name]: value for name, value in content["options"].items()}
    heads = (double(content["student_head"]), double(content["teacher_head"]))
    terms, head, rows, projectors = our_terms_and_gradients(examples, heads, maps, impl=impl, **options)
    for name, value in content["terms"].items():
        assert terms[name].item() == pytest.approx(value, abs=1e-8), name
    expected = content["gradients"]
    torch.testing.assert_close(head, double(expected["student_head"]), atol=1e-8, rtol=1e-6)
    for index in range(len(examples)):
        hidden, embeddings = rows[2 * index], rows[2 * index + 1]
        torch.testing.assert_close(hidden, double(expected["student_hidden"][index]), atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(
            embeddings, double(expected["student_target_embeddings"][index]), atol=1e-8, rtol=1e-6
        )
    for name in MAPS:
        for part in ("weight", "bias"):
            torch.testing.assert_close(
                projectors[f"{name}.{part}"], double(expected["projectors"][name][part]), atol=1e-8, rtol=1e-6
            )


@pytest.mark.parametrize("seed", range(6))
def test_random_ragged_batches_equal_the_literal_reference(seed):
    """Terms and gradients equal the literal implementation on random ragged batches with several options."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [tuple(torch.randint(1, 14, (2,), generator=generator).tolist()) for _ in range(4)]
    options = [
        {},
        {"base": 0.3, "beta": 0.2, "gamma": 0.3},
        {"weight_student": False, "lam": 0.4},
        {"gate": False, "tau": 1.0},
        {"use_band": False, "weight_teacher": False},
        {"ce": 1.0, "kd": 0.0, "dtw": 1.0, "alpha": 0.0, "base": 1.0},
    ][seed]
    examples, heads = random_examples(lengths, seed=seed), random_heads(seed=seed)
    widths = Widths(6, 8, 6, 8)
    source = Projectors(widths, with_embedding=True).double()
    maps = {
        name: {
            part: getattr(getattr(source, name), part).detach().clone().requires_grad_() for part in ("weight", "bias")
        }
        for name in MAPS
    }
    renamed = {OPTIONS[name]: value for name, value in options.items()}
    terms, head, rows, projectors = our_terms_and_gradients(examples, heads, maps, **renamed)
    expected = reference.dwa_kd(examples, *heads, maps, **options)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(float(value), abs=1e-9), name
    leaves = [e[key] for e in examples for key in ("student_hidden", "student_out")]
    flat = {f"{name}.{part}": tensor for name, m in maps.items() for part, tensor in m.items()}
    gradients = torch.autograd.grad(
        expected["loss"], [heads[0], *leaves, *flat.values()], allow_unused=True, materialize_grads=True
    )
    ours = [head, *rows, *(projectors[name] for name in flat)]
    for got, wanted in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-6)


TINY = {
    "student_in": [[1, 0], [0, 1]],
    "student_out": [[0, 1], [1, 1]],
    "student_hidden": [[0.5, -0.5], [1, 0]],
    "teacher_in": [[1, 0], [0, 1], [1, -1]],
    "teacher_out": [[0, 1], [1, -1], [-1, 0]],
    "teacher_hidden": [[1, 2], [0, -1], [2, 0]],
}
TINY_HEADS = ([[1, 0], [0, 1], [-1, -1]], [[1, 1], [1, -1], [0, 1], [-1, 0]])


def tiny(**options):
    """Return the hand-sized example of the specification, in which all maps are the identity."""
    example = {name: double(value) for name, value in TINY.items()}
    example |= {"student_target": torch.tensor([0, 1]), "teacher_target": torch.tensor([0, 0, 0])}
    sizes = {"query": 4, "t2s": 2, "s2t": 2, "embedding_t2s": 2}
    maps = {
        name: {"weight": torch.eye(n, dtype=torch.float64), "bias": torch.zeros(n, dtype=torch.float64)}
        for name, n in sizes.items()
    }
    heads = tuple(double(head) for head in TINY_HEADS)
    loss = loss_with_maps(Widths(2, 2, 2, 2), maps, **options)
    return loss, side([example], "student", heads[0]), side([example], "teacher", heads[1])


def test_cross_model_attention_of_the_specification():
    """Attention weights, projected states and standard deviations equal those of the specification."""
    loss, student, teacher = tiny()
    scale = TeacherScale.of(teacher)
    torch.testing.assert_close(scale.std, double([0.834847, 1.211060, 0.894427]), atol=1e-6, rtol=0)
    with recording() as recorded:
        crossed = cross_model_attention(student, teacher, loss.projectors, scale)
    expected = double([[0.583006, 0.096685, 0.320309], [0.461715, 0.461715, 0.076570]])
    torch.testing.assert_close(recorded["attention"][0][0], expected, atol=1e-6, rtol=0)
    expected = double([[0.760355, 1.426690], [0.938305, 0.381248]])
    torch.testing.assert_close(crossed.t2s_hidden, expected, atol=1e-6, rtol=0)
    expected = double([[0.677296, -0.322704], [0.884069, -0.115931], [0.571124, -0.428876]])
    torch.testing.assert_close(crossed.s2t_hidden, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"loss": 1.716970 * 2, "weighted_kd": 3.102201}),
        ({"weight_normalisation": "entropy_then_gate"}, {"loss": 1.690533 * 2, "weighted_kd": 2.996452}),
        ({}, {"dtw_hidden": 1.552691, "dtw_embedding": 2.641821}),
        ({"gamma": 0.8}, {"dtw": 4.012571}),
        ({"band_base": 0.0, "band_entropy": 0.5}, {"dtw": 8.836983}),
        (
            {"band_base": 0.0, "band_entropy": 0.5, "variant": "authors", "student_divergence": "forward_kl"},
            {"dtw": 9.869616},
        ),
    ],
)
def test_end_to_end_values_of_the_specification(options, expected):
    """The terms of the hand-sized example equal the specification's, with the paper's options and the published code's."""
    loss, student, teacher = tiny(**options)
    terms = {name: 2 * value.item() for name, value in loss(student, teacher).terms.items()}
    terms["weighted_kd"] = terms["t2s_ce"] + terms["kd_student"] + terms["kd_teacher"]
    terms["dtw"] = terms["dtw_hidden"] + terms["dtw_embedding"]
    for name, value in expected.items():
        assert terms[name] == pytest.approx(value, abs=2e-6), name


def test_weights_of_the_specification():
    """Token weights equal the specification's, with the entropy rescaled before or after the gate is applied."""
    entropies, gate, three = double([0.5, 2, 1]), double([0.9, 0.5, 0.2]), torch.tensor([3])
    torch.testing.assert_close(
        student_weights(entropies, gate, three), double([0.818182, 1.818182, 0.363636]), atol=1e-6, rtol=0
    )
    authors = student_weights(entropies, gate, three, normalise="entropy_then_gate")
    torch.testing.assert_close(authors, double([0.385714, 0.857143, 0.171429]), atol=1e-6, rtol=0)
    weights = teacher_weights(double([1, 3]), 151936, torch.tensor([2]))
    torch.testing.assert_close(weights, double([1.100693, 0.899307]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("use_entropy", [True, False])
def test_weights_are_rescaled_over_the_tokens_that_are_kept(use_entropy):
    """Tokens that are left out have weight 0, and the others have the same sum as without them."""
    entropies, gate, three = double([2, 2, 2]), double([0.5, 0.25, 1]), torch.tensor([3])
    options = {"use_entropy": use_entropy, "kept": torch.tensor([True, False, True])}
    authors = student_weights(entropies, gate, three, normalise="entropy_then_gate", **options)
    torch.testing.assert_close(authors, double([0.75, 0, 1.5]))
    torch.testing.assert_close(student_weights(entropies, gate, three, **options), double([1, 0, 2]))
    torch.testing.assert_close(
        student_weights(entropies, gate, three, use_gate=False, **options), double([1.5, 0, 1.5])
    )


def test_certain_student_gives_zero_weights():
    """If the student is certain at all tokens of an example, the weights of this example are 0, not NaN."""
    weights = student_weights(double([0, 0, 1, 3]), double([1, 1, 0.5, 0.5]), torch.tensor([2, 2]))
    torch.testing.assert_close(weights, double([0, 0, 0.5, 1.5]))


def test_uniform_teacher_gives_zero_weights():
    """A uniform teacher has weight 0. Rounding errors of 1 - H / log V must not be rescaled."""
    log_probs = torch.zeros(6, 50257).log_softmax(-1)
    assert teacher_weights(entropy(log_probs), 50257, torch.tensor([6])).abs().sum() == 0


def test_band_of_the_specification():
    """The band equals the specification's, in which token indices begin at 1."""
    attention = double([[[0.7, 0.2, 0.1, 0], [0.1, 0.2, 0.3, 0.4]]])
    lengths = (torch.tensor([2]), torch.tensor([4]))
    penalty = Band.around(Focus.of(attention), *lengths, base=0.5, entropy_factor=0.5).penalties(4)
    assert penalty[0].tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert Band.around(Focus.of(attention), *lengths).penalties(4).sum() == 0


@pytest.mark.parametrize(("gamma", "expected"), [(2.0, 0.715442), (0.8, 0.447470), (0.1, 0.297758)])
def test_divergence_of_sequences(gamma, expected):
    """The Soft-DTW divergence has the published value.

    It is symmetric, is 0 for a sequence with itself, and depends neither on the norms of the vectors nor on the
    direction of both sequences.
    """
    x, y = double([[1, 0], [0, 1], [1, 1]]), double([[1, 0], [1, 1]])
    three, two = torch.tensor([3]), torch.tensor([2])

    def divergence(a, b, n, m):
        return soft_dtw_divergences([(a, b)], n, m, gamma=gamma)[0].item()

    assert divergence(x, y, three, two) == pytest.approx(expected, abs=1e-6)
    assert divergence(y, x, two, three) == pytest.approx(expected, abs=1e-6)
    assert divergence(x * double([[3], [0.2], [7]]), y, three, two) == pytest.approx(expected, abs=1e-6)
    assert divergence(x.flip(0), y.flip(0), three, two) == pytest.approx(expected, abs=1e-6)
    assert divergence(x, x.clone(), three, three) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-24, 2e-23, 1e-16, 1e-8])
def test_embeddings_of_untrained_tokens_have_no_gradient(size):
    """Some checkpoints have embeddings near 0 for tokens that were never trained, such as the end token of a chat template.

    The gradient of a cosine is 1 / norm, so such a token would decide the gradient of a whole batch.
    """
    x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x[:3], size * x[3:]]).requires_grad_()
    (value,) = soft_dtw_divergences([(x, y)], *[torch.tensor([4])] * 2, gamma=1.0)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.isfinite().all()
    assert gradient[3].eq(0).all()
    assert 0.01 < gradient.norm() < 10
    (zero,) = soft_dtw_divergences([(torch.cat([x[:3], 0 * x[3:]]), y)], *[torch.tensor([4])] * 2, gamma=1.0)
    torch.testing.assert_close(value, zero)


def test_gamma_schedule_follows_optimiser_steps_and_is_saved():
    """The schedule of gamma follows the optimiser steps, and the state dict contains the step."""
    loss = DwaKdLoss(widths=Widths(4, 4, 4, 4), gamma=2.0, gamma_end=1.0, gamma_steps=10)
    seen = []
    for step in (0, 5, 10, 50):
        loss.set_step(step)
        seen.append(loss.gamma)
    assert seen == [2.0, 1.5, 1.0, 1.0]
    other = DwaKdLoss(widths=Widths(4, 4, 4, 4), gamma=2.0, gamma_end=1.0, gamma_steps=10)
    loss.set_step(5)
    other.load_state_dict(loss.state_dict())
    assert other.gamma == 1.5


def test_unweighted_and_unaligned_is_dskd_without_its_mask():
    """Without weights and Soft-DTW, DWA-KD has the loss of DSKD without its accuracy mask."""
    from dwakd.losses import DskdLoss

    examples, heads, widths = random_examples([(5, 6), (3, 2)]), random_heads(), Widths(6, 8, 6, 8)
    ours = DwaKdLoss(widths=widths, entropy_weights=False, gate=False, teacher_weights=False, dtw_weight=0.0).double()
    dskd = DskdLoss(widths=widths, accuracy_mask=False).double()
    dskd.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "step"})
    sides = side(examples, "student", heads[0]), side(examples, "teacher", heads[1])
    torch.testing.assert_close(ours(*sides).loss, dskd(*sides).loss)
