"""The frozen teacher, which is not part of the trained module: it is never wrapped, saved or put into train mode."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dwakd.batch import ModelSide, OutputHead, TokenBatch
from dwakd.data.collator import FindPlace
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import EncodedPairs
from dwakd.losses import needs_attention
from dwakd.models.invariant import teacher_states
from dwakd.models.rows import embedding_table, output_head, select_side
from dwakd.training.config import DistillConfig

Sets = dict[str, EncodedPairs | None]
"""The encoded data sets "train" and "eval"."""


class Teacher(ABC):
    """Compute the teacher's side of a batch.

    `OnlineTeacher` runs the model. `dwakd.training.cached.CachedTeacher` reads stored hidden states, which are the same to
    the last bit in float32 on a CPU.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    """The teacher's tokenizer, if the teacher brings one."""
    head: OutputHead
    """The teacher's output head, a constant."""
    table: Float[Tensor, "vocab embedding"]
    """The teacher's input-embedding table."""
    find_place: FindPlace | None = None
    """The function that finds a row in the teacher's cache, if there is one."""

    @property
    def date(self) -> str | None:
        """The ISO date that chat templates have to print as today's date, if the teacher prescribes one."""
        return None

    @property
    def embedding_size(self) -> int:
        """Width of the teacher's input embeddings."""
        return self.table.shape[1]

    @abstractmethod
    def prepare(self, encoder: TextEncoder, args: DistillConfig, sets: Sets) -> None:
        """Called once before training with the data sets, as `encoder` has encoded them for this teacher."""

    @abstractmethod
    def states(self, tokens: TokenBatch) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"] | None]:
        """Return the final hidden states of the response positions, and the attention to them if the method needs it."""

    def side(self, tokens: TokenBatch) -> ModelSide:
        """Return the teacher's side of a batch, on the device of its tokens and without gradient."""
        hidden, attention = self.states(tokens)
        return select_side(tokens, hidden, attention, self.table.detach(), self.head)


class OnlineTeacher(Teacher):
    """Run the teacher on each batch.

    Args:
        model: a causal language model. It is put into eval mode and frozen.
        with_attention: whether to compute `ModelSide.attention`. `prepare` sets it to what the method needs.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, with_attention: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.with_attention = with_attention

    def prepare(self, encoder: TextEncoder, args: DistillConfig, sets: Sets) -> None:
        self.with_attention = needs_attention(args.method, args.loss_options)

    @property
    def head(self) -> OutputHead:  # type: ignore[override]
        return output_head(self.model).detached()

    @property
    def table(self) -> Float[Tensor, "vocab embedding"]:  # type: ignore[override]
        return embedding_table(self.model)

    def states(self, tokens: TokenBatch) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"] | None]:
        if self.model.device != tokens.input_ids.device:
            self.model.to(tokens.input_ids.device)
        return teacher_states(self.model, tokens, attention=self.with_attention)
