"""SimCT: compare shared tokens and short units of several tokens that both tokenizers can write (arXiv 2605.07711)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from dwakd.align.offsets import ByteGroups, byte_groups, sum_by_group
from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, head_loss
from dwakd.losses.base import DistillationLoss, Terms, constant_rows, head_rows
from dwakd.losses.columns import Columns, cross_entropy
from dwakd.losses.divergences import DivergenceName, divergence
from dwakd.losses.options import MethodOptions, Rate, Skew, Softening
from dwakd.losses.pair import ModelPair
from dwakd.losses.scale import TeacherScale


class SimctOptions(MethodOptions):
    needs_models = "pair"
    variant_defaults = {"simple_ctkd": {"kd_rate": 0.5, "divergence": "forward_kl", "units": False}}  # noqa: RUF012
    method: Literal["simct"] = "simct"
    kd_rate: Rate = Field(
        1.0, description="Weight r of the comparison; the cross-entropy has 1 - r. The scripts use 1, simple_ctkd 0.5."
    )
    temperature: Softening = 1.0
    divergence: DivergenceName = Field(
        "reverse_kl", description="Divergence D. The scripts use reverse_kl, simple_ctkd forward_kl."
    )
    skew: Skew = 0.1
    units: bool = Field(True, description="Whether groups of several tokens are compared as well. simple_ctkd: false.")
    variant: Literal["paper", "simple_ctkd"] = Field(
        "paper",
        description="simple_ctkd is KDFlow's SimpleCTKD, which compares only tokens that both models write alike.",
    )


class SimctLoss(DistillationLoss[SimctOptions]):
    """Compare the models on the tokens that both vocabularies contain, and on the unit of text that comes next.

        L = (1 - r) CE + r sum_g D(softmax(z^t_g / tau) || softmax(z^s_g / tau))

    A group g is the smallest pair of token spans that start and end at the same bytes. z_g are the logits of a model at the
    first token of the group, over the tokens O that both vocabularies contain. If one of the spans has several tokens, they
    are a unit, which is a further entry of z_g: the mean logit of the unit's tokens in the text, each at its own position.
    The sum over groups is divided by the number of student tokens. Groups of one token on each side are the term `kd`,
    all others the term `units`, which the option `units` leaves out.

    Gradient: the student's hidden states and head.

    References:
        Sun et al. 2026. Official code: sunjie279/SimCT-, `SpanCrossTokenizerKD`. SimpleCTKD: songmzhang/KDFlow. The code ends
        a unit only behind a token that both models write alike, which becomes part of the unit; ours are the smallest
        units. The text after the last such token is left out there. Tokens match by their bytes.
    """

    options_type = SimctOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "kd", "units")
    student_ids: Int[Tensor, " shared"]
    teacher_ids: Int[Tensor, " shared"]

    def __init__(self, *, pair: ModelPair, **options: Any) -> None:
        super().__init__(**options)
        self.vocabularies = pair.vocabularies
        self.divergence = divergence(self.options.divergence, self.options.skew)
        for name, ids in zip(("student_ids", "teacher_ids"), pair.needed_shared_tokens("simct"), strict=True):
            self.register_buffer(name, ids, persistent=False)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        groups = byte_groups(student.byte_ends, student.lengths, teacher.byte_ends, teacher.lengths)
        criterion = SharedUnits(self, student.target_ids, teacher.target_ids, groups, ce_weight)
        return Terms.of(head_loss([head_rows(student), constant_rows(teacher)], criterion))


class SharedUnits(Criterion):
    """Compute `ce` at each student token, and `kd` and `units` as sums over the groups."""

    unit = "examples"

    def __init__(
        self,
        loss: SimctLoss,
        student_targets: Int[Tensor, " s_tokens"],
        teacher_targets: Int[Tensor, " t_tokens"],
        groups: ByteGroups,
        ce_weight: float,
    ) -> None:
        rate = loss.options.kd_rate
        super().__init__({"ce": ce_weight, "kd": rate, "units": rate if loss.options.units else 0.0})
        self.loss = loss
        self.sides = (
            (student_targets, groups.student, groups.student_last, loss.student_ids),
            (teacher_targets, groups.teacher, groups.teacher_last, loss.teacher_ids),
        )

    def targets_by_side(self) -> dict[int, Tensor]:
        return {index: side[0] for index, side in enumerate(self.sides)}

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        sizes = [last[rows].nonzero().squeeze(1) for (_, _, last, _), rows in zip(self.sides, chunk.rows, strict=True)]
        sizes = [ends.diff(prepend=ends.new_full((1,), -1)) for ends in sizes]
        is_unit = (sizes[0] > 1) | (sizes[1] > 1)
        own = self.log_probs(logits[0].t(), 0, chunk, sizes[0], is_unit)
        theirs = self.log_probs(logits[1].detach().t(), 1, chunk, sizes[1], is_unit)
        values = self.loss.divergence(theirs.t(), own.t())
        ce = cross_entropy(logits[0].t(), self.sides[0][0][chunk.rows[0]])
        used = is_unit if self.loss.options.units else torch.zeros_like(is_unit)
        return {"ce": ce, "kd": values[~is_unit].sum(), "units": values[used].sum()}

    def log_probs(
        self,
        columns: Columns,
        side: int,
        chunk: Chunk,
        sizes: Int[Tensor, " groups"],
        is_unit: Bool[Tensor, " groups"],
    ) -> Float[Tensor, "entries groups"]:
        """Return the log-probabilities of the shared tokens and of the unit of each group, which is -inf without a unit."""
        targets, groups, _, shared = self.sides[side]
        rows = chunk.rows[side]
        written = columns.gather(0, targets[rows][None]).squeeze(0)
        unit = sum_by_group(written, groups[rows] - groups[rows][0], len(sizes)) / sizes
        firsts = columns.index_select(1, sizes.cumsum(0) - sizes).index_select(0, shared)
        entries = torch.cat([firsts, unit.masked_fill(~is_unit, -torch.inf)[None]])
        return (entries / self.loss.options.temperature).log_softmax(0)
