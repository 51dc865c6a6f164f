"""Random batches of response rows, and the bridge between the vectors' names and ours."""

from typing import Any

import torch
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.losses import ModelPair, Widths
from dwakd.models.head import OutputHead

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


def side(examples: list[dict[str, Tensor]], name: str, head: Tensor) -> ModelSide:
    """Pack one side of a list of examples."""
    lengths = torch.tensor([len(e[f"{name}_target"]) for e in examples])
    return ModelSide(
        hidden=torch.cat([e[f"{name}_hidden"] for e in examples]),
        input_embeddings=torch.cat([e[f"{name}_in"] for e in examples]),
        target_embeddings=torch.cat([e[f"{name}_out"] for e in examples]),
        target_ids=torch.cat([e[f"{name}_target"] for e in examples]),
        lengths=lengths,
        byte_ends=torch.cat([torch.arange(1, int(n) + 1) for n in lengths]),
        head=OutputHead(head),
        aligned_rows=torch.cat([e["aligned"] for e in examples])
        if name == "student" and "aligned" in examples[0]
        else None,
    )


def random_examples(
    lengths: list[tuple[int, int]], *, seed: int = 0, widths: Widths = WIDTHS, vocabularies=(11, 13)
) -> list[dict[str, Tensor]]:
    """Response rows of a ragged batch in float64."""
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
        example["aligned"] = torch.arange(s_len).where(torch.arange(s_len) % 4 != 2, -1).clamp(max=t_len - 1)
        examples.append(example)
    return examples


def random_pair(*, widths: Widths = WIDTHS, vocabularies=(11, 13)) -> ModelPair:
    """What a method may know of the two models: some tokens spelled alike, some not, one special token each."""
    tokens = [
        (*(bytes([97 + (index * step) % 23]) * (1 + index % 2) for index in range(size - 1)), None)
        for size, step in zip(vocabularies, (1, 3), strict=True)
    ]
    heads = [OutputHead(head) for head in random_heads(widths=widths, vocabularies=vocabularies)]
    return ModelPair(widths, tokens[0], tokens[1], heads[0], heads[1], (vocabularies[0] - 1, vocabularies[1] - 1))


def random_heads(*, seed: int = 0, widths: Widths = WIDTHS, vocabularies=(11, 13)) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's head in float64."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return (
        torch.randn(vocabularies[0], widths.student_hidden, dtype=torch.float64, generator=generator),
        torch.randn(vocabularies[1], widths.teacher_hidden, dtype=torch.float64, generator=generator),
    )
