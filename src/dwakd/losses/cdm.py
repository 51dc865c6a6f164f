"""CDM: align tokens by spelling and entropy, and match the candidate tokens at each position (arXiv 2502.11104)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dwakd.batch import ModelSide
from dwakd.kernels.head_loss import Chunk, Criterion, forward_kl, head_loss
from dwakd.losses.base import DistillationLoss, Terms, constant_rows, head_rows
from dwakd.losses.columns import cross_entropy, entropy
from dwakd.losses.dynamic_mapping import TokenMap, mean_columns, means_at, top_tokens, warp
from dwakd.losses.options import Count, MethodOptions, Rate, Softening, Weight
from dwakd.losses.pair import ModelPair
from dwakd.losses.scale import TeacherScale

MASKED = -1e4


class CdmOptions(MethodOptions):
    needs_models = "pair"
    method: Literal["cdm"] = "cdm"
    ce_weight: Weight = Field(0.9, description="Weight alpha of the cross-entropy. The published options use 0.9.")
    kd_weight: Weight = Field(0.1, description="Weight of the term `kd`. The published options use 1 - alpha = 0.1.")
    temperature: Softening = 0.8
    top_k: Count = Field(100, description="Number of candidates of each model; at most the size of its vocabulary.")
    threshold: Rate = Field(
        0.3,
        description="Candidates match if their edit distance divided by the sum of their lengths is below this value.",
    )


class CdmLoss(DistillationLoss[CdmOptions]):
    """Align tokens and match likely next tokens at every step, and compare the distributions over the matched tokens.

        L = ce_weight CE + kd_weight sum_g KL(t_g || s_g)

    Groups g come from dynamic time warping over the tokens that the models read. The cost of a pair of positions is the edit
    distance of their tokens times f^s f^t with f = floor(3 sigmoid(4e - 2) + 3), where e is the entropy at the position,
    scaled to 0 to 1 within the sequence. Positions that the path pairs without a diagonal step are one group, and the logits
    of a group are the mean of theirs. The candidates of a group are the top_k tokens of each model. A candidate is matched
    with the token of equal spelling in the other vocabulary. If there is none, it is matched with the nearest in spelling of
    those candidates of the other model that have none either. t_g and s_g are softmax(logits of matched tokens / tau).

    Gradient: the student's hidden states and head, through the logits of the candidates. Groups and candidates are constants.

    References:
        Chen et al. 2025. Their code, pppa2019/ContexualDynamicMapping, is known to us from ports only. The ports divide only
        the student's logits by the temperature, so that their minimum is not where the models agree; here both are divided.
        They list a pair twice if both of its tokens are candidates; here it is listed once. They take the mean over groups
        and candidates; here the weights of an example's groups sum to its student tokens. The token read at the first
        position belongs to the prompt and counts as equal on both sides.
    """

    options_type = CdmOptions
    terms: ClassVar[tuple[str, ...]] = ("ce", "kd")

    def __init__(self, *, pair: ModelPair, **options: Any) -> None:
        super().__init__(**options)
        self.vocabularies = pair.vocabularies
        self.token_map = TokenMap(pair, self.options.threshold)

    def compute(self, student: ModelSide, teacher: ModelSide, scale: TeacherScale, ce_weight: float) -> Terms:
        return Terms.of(
            head_loss([head_rows(student), constant_rows(teacher)], MappedCandidates(self, student, teacher, ce_weight))
        )


class MappedCandidates(Criterion):
    """Compute `ce` at each student token, and `kd` as a sum over groups."""

    unit = "examples"

    def __init__(self, loss: CdmLoss, student: ModelSide, teacher: ModelSide, ce_weight: float) -> None:
        super().__init__({"ce": ce_weight, "kd": loss.options.kd_weight})
        self.options, self.token_map, self.targets = loss.options, loss.token_map, student.target_ids
        self.lengths = [side.lengths.cpu() for side in (student, teacher)]
        self.texts = loss.token_map.read_texts((student, teacher))

    def terms(self, logits: Sequence[Tensor], chunk: Chunk, weights: Tensor | None) -> dict[str, Tensor]:
        assert chunk.examples is not None
        columns = [logits[0].t(), logits[1].detach().t()]
        texts = [texts[rows] for texts, rows in zip(self.texts, chunk.rows, strict=True)]
        lengths = [lengths[chunk.examples] for lengths in self.lengths]
        sizes, shares = warp([entropy(side) for side in columns], texts, lengths)
        tops = [
            top_tokens(mean_columns(side.detach(), size), self.options.top_k)
            for side, size in zip(columns, sizes, strict=True)
        ]
        ids, counts = self.token_map.pairs(*tops)
        log_q, log_p = (
            (means_at(side, size, tokens).masked_fill(~counts, MASKED) / self.options.temperature).log_softmax(-1)
            for side, size, tokens in zip(columns, sizes, ids, strict=True)
        )
        ce = cross_entropy(columns[0], self.targets[chunk.rows[0]])
        return {"ce": ce, "kd": (shares * forward_kl(log_p, log_q)).sum()}
