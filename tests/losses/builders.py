"""Build random batches for tests of losses, and map the names of options in the test vectors to dwakd's names."""

import sys
from typing import Any

import torch
from torch import Tensor

from dwakd.batch import ModelSide, OutputHead
from dwakd.losses import ModelPair, Widths

WIDTHS = Widths(6, 8, 6, 8)
OPTIONS = {
    "tau": "temperature",
    "gamma": "gamma",
    "base": "band_base",
    "beta": "band_entropy",
    "alpha": "band_blend",
    "lam": "band_penalty",
    "ce": "ce_weight",
    "kd": "kd_weight",
    "dtw": "dtw_weight",
    "weight_student": "entropy_weights",
    "weight_teacher": "teacher_weights",
    "gate": "gate",
    "use_band": "band",
}


def smallest_pair() -> ModelPair:
    """Return a pair with one token and width 1 on each side, for tests of options."""
    head = OutputHead(torch.ones(1, 1))
    return ModelPair(Widths(1, 1, 1, 1), (b"a",), (b"a",), head, head)


def side(examples: list[dict[str, Tensor]], name: str, head: Tensor) -> ModelSide:
    """Pack one side of a list of examples."""
    lengths = torch.tensor([len(e[f"{name}_target"]) for e in examples])
    return ModelSide(
        hidden=torch.cat([e[f"{name}_hidden"] for e in examples]),
        input_embeddings=torch.cat([e[f"{name}_in"] for e in examples]),
        target_embeddings=torch.cat([e[f"{name}_out"] for e in examples]),
        target_ids=torch.cat([e[f"{name}_target"] for e in examples]),
        lengths=lengths,
        byte_ends=torch.cat(
            [e.get(f"{name}_ends", torch.arange(1, int(n) + 1)) for e, n in zip(examples, lengths, strict=True)]
        ),
        head=OutputHead(head),
        attention=torch.cat([e[f"{name}_hidden"].detach().abs().sum(-1) for e in examples]),
        aligned_rows=torch.cat([e["aligned"] for e in examples])
        if name == "teacher" and "aligned" in examples[0]
        else None,
    )


def random_examples(
    lengths: list[tuple[int, int]], *, seed: int = 0, widths: Widths = WIDTHS, vocabularies=(11, 13)
) -> list[dict[str, Tensor]]:
    """Return the tensors of a ragged batch of responses in float64."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for s_len, t_len in lengths:
        example: dict[str, Any] = {}
        for name, count, hidden, embedding, vocabulary in (
            ("student", s_len, widths.student_hidden, widths.student_embedding, vocabularies[0]),
            ("teacher", t_len, widths.teacher_hidden, widths.teacher_embedding, vocabularies[1]),
        ):
            for key, width in (("hidden", hidden), ("in", embedding), ("out", embedding)):
                example[f"{name}_{key}"] = torch.randn(count, width, dtype=torch.float64, generator=generator)
            example[f"{name}_target"] = torch.randint(0, vocabulary, (count,), generator=generator)
        example["aligned"] = torch.arange(s_len).where(
            (torch.arange(s_len) % 4 != 2) & (torch.arange(s_len) < t_len), -1
        )
        examples.append(example)
    return examples


def random_heads(*, seed: int = 0, widths: Widths = WIDTHS, vocabularies=(11, 13)) -> tuple[Tensor, Tensor]:
    """Return the weights of a student's and a teacher's head in float64."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return (
        torch.randn(vocabularies[0], widths.student_hidden, dtype=torch.float64, generator=generator),
        torch.randn(vocabularies[1], widths.teacher_hidden, dtype=torch.float64, generator=generator),
    )


def pair_of(heads: tuple[Tensor, Tensor], *, widths: Widths = WIDTHS) -> ModelPair:
    """Return a pair in which each token is a letter.

    The teacher's letters begin at d, and the last token of each side ends a text.
    """
    s_vocab, t_vocab = len(heads[0]), len(heads[1])
    return ModelPair(
        widths,
        (*(bytes([97 + index]) for index in range(s_vocab - 1)), None),
        (*(bytes([100 + index]) for index in range(t_vocab - 1)), None),
        OutputHead(heads[0]),
        OutputHead(heads[1]),
        (s_vocab - 1, t_vocab - 1),
    )


def use_kernels(monkeypatch, **kernels):
    """Replace kernels by name in all modules of `dwakd.losses`."""
    for module in [module for name, module in sys.modules.items() if name.startswith("dwakd.losses.")]:
        for name, kernel in kernels.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, kernel)
