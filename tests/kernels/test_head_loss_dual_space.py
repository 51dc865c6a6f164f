"""Test the criteria of the student and teacher spaces: chunks against plain torch on all tokens at once."""

import pytest
import torch

from dwakd.batch import OutputHead
from dwakd.kernels.head_loss import (
    HeadRows,
    WithPrediction,
    forward_kl,
    head_loss,
    teacher_space,
)
from dwakd.kernels.head_loss.dual_space import ForwardKlSpace, StudentSpace
from dwakd.losses.divergences import DIVERGENCES


def rows(count, *, learns, vocab=300):
    generator = torch.Generator().manual_seed(count)
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (9, vocab))
    return HeadRows(hidden.requires_grad_(learns), OutputHead(weight), torch.tensor([4, 5]))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("budget", [1, 10**9])
def test_teacher_space_of_any_divergence(name, budget):
    """Values per token, predictions and gradients are the same in one chunk and in nine."""
    results = []
    for impl in ("naive", "chunked"):
        sides = [rows(1, learns=True), rows(2, learns=False)]
        criterion = WithPrediction(teacher_space(2.0, DIVERGENCES[name]), side=1)
        output = head_loss(sides, criterion, by_row=True, impl=impl, budget=budget)
        (output.loss * torch.arange(9)).sum().backward()
        results.append((output.loss.detach(), output.statistics["prediction"], sides[0].hidden.grad))
        torch.testing.assert_close(output.statistics["prediction"], sides[1].head.logits(sides[1].hidden).argmax(-1))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("space", [StudentSpace, ForwardKlSpace])
@pytest.mark.parametrize("budget", [1, 10**9])
def test_targets_and_weights_of_the_projected_side(space, budget):
    """The projected side may have its own targets, and each token its own weight, including 0."""
    targets, labels = torch.arange(9), torch.arange(9) * 7 % 300
    weights = torch.tensor([0, 1, 2, 0.5, 0, 1, 1, 3, 0], dtype=torch.float64)

    def weigh(statistics, lengths):
        return statistics["projected_weight"] * statistics["entropy"] + statistics["right"]

    results = []
    for impl, kind in (("naive", StudentSpace), ("chunked", space)):
        sides = [rows(1, learns=True), rows(2, learns=True)]
        sides[1] = HeadRows(sides[1].hidden, sides[0].head, sides[1].lengths)
        labels[3] = sides[0].head.logits(sides[1].hidden[3:4]).argmax()
        criterion = kind(
            targets,
            2.0,
            {"ce": 0.5, "t2s_ce": 0.3, "kd_student": 0.2},
            divergence=forward_kl,
            weigh=weigh,
            whole_examples=True,
            projected_targets=labels,
            projected_weights=weights,
        )
        output = head_loss(sides, criterion, impl=impl, budget=budget)
        output.loss.backward()
        results.append((output.loss.detach(), output.terms, *(side.hidden.grad for side in sides)))
        values = torch.nn.functional.cross_entropy(sides[1].head.logits(sides[1].hidden), labels, reduction="none")
        torch.testing.assert_close(output.terms["t2s_ce"], (weights * values).sum().detach())
        assert output.statistics["right"][3]
    torch.testing.assert_close(*results)
