"""The frozen teacher, online or cached. It is not part of the trained module: never wrapped, saved or in train mode."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dwakd.batch import ModelSide, OutputHead, TokenBatch
from dwakd.cache.build import Engine, ModelEngine, open_or_build
from dwakd.cache.fingerprint import DATE, adapter_digest, fingerprint, row_key, weights_digest
from dwakd.cache.manifest import MANIFEST, Manifest, check_folder
from dwakd.cache.store import Cache, CacheRequest, local_folder, open_complete
from dwakd.cache.vllm import VllmEngine
from dwakd.data.collator import FindPlace
from dwakd.data.encoded import EncodedPairs
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import response_room
from dwakd.errors import UserError
from dwakd.evaluation.generate import max_positions
from dwakd.models.checks import check_packing
from dwakd.models.head import embedding_table, output_head, table_and_head
from dwakd.models.loading import load_causal_lm, load_tokenizer, on_device
from dwakd.models.parallel import is_tensor_parallel, states_with_ranks
from dwakd.models.rows import select_side, teacher_states
from dwakd.recipe.checks import refuse_cached_attention, refuse_cached_sampling
from dwakd.recipe.training import DistillConfig
from dwakd.training.inputs import load_pair

Sets = dict[str, EncodedPairs | None]
"""The encoded data sets "train" and "eval"."""


class Teacher(ABC):
    """Compute the teacher's side of a batch.

    `OnlineTeacher` runs the model. `CachedTeacher` reads stored hidden states, which are the same to the last bit in float32
    on a CPU. `dwakd.training.served.ServedTeacher` gets log-probabilities from a server.
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

    def check_method(self, args: DistillConfig) -> None:  # noqa: B027 (most teachers give all that a method needs)
        """Raise UserError if the configured method needs something that this teacher does not give."""

    @abstractmethod
    def prepare(self, encoder: TextEncoder, args: DistillConfig, sets: Sets) -> None:
        """Called once before training with the data sets, as `encoder` has encoded them for this teacher."""

    @abstractmethod
    def states(self, tokens: TokenBatch) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"] | None]:
        """Return the final hidden states of the response positions, and the attention to them if the method needs it."""

    def side(self, tokens: TokenBatch) -> ModelSide:
        """Return the teacher's side of a batch, on the device of its tokens and without gradient."""
        hidden, attention = self.states(tokens)
        device = tokens.input_ids.device  # with a device map, the last layer and the head may be on another one
        ends = (
            hidden.to(device),
            attention if attention is None else attention.to(device),
            self.table.detach().to(device),
        )
        return select_side(tokens, *ends, self.head.to(device))


class OnlineTeacher(Teacher):
    """Run the teacher on each batch. A teacher with tensor parallelism runs the batches of all processes.

    Args:
        model: a causal language model. It is put into eval mode and frozen.
        with_attention: whether to compute `ModelSide.attention`. `prepare` sets it to what the method needs.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, with_attention: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.with_attention, self.packed = with_attention, False
        self.divided = is_tensor_parallel(model)
        """Whether the processes run the model together, so that all of them have to call `states`."""
        self._ends = table_and_head(model) if self.divided else None  # gathered once

    def prepare(self, encoder: TextEncoder, args: DistillConfig, sets: Sets) -> None:
        self.with_attention, self.packed = args.method_options.needs_attention, args.padding_free
        if self.packed:
            check_packing(self.model)
        if self.divided and args.teacher_key is not None:
            raise UserError(
                "data.teacher_key: the processes run a teacher with tp_plan together, but may have no rows for it"
            )
        _check_positions(self.model, args, sets)

    @property
    def head(self) -> OutputHead:  # type: ignore[override]
        return (output_head(self.model) if self._ends is None else self._ends[1]).detached()

    @property
    def table(self) -> Float[Tensor, "vocab embedding"]:  # type: ignore[override]
        return embedding_table(self.model) if self._ends is None else self._ends[0]

    def states(self, tokens: TokenBatch) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, " tokens"] | None]:
        if self.divided:
            return states_with_ranks(self.model, tokens, attention=self.with_attention, packed=self.packed)
        if self.model.device != tokens.input_ids.device:
            on_device(self.model, tokens.input_ids.device)
        return teacher_states(self.model, tokens, attention=self.with_attention, packed=self.packed)


class CachedTeacher(Teacher):
    """Read the teacher's hidden states from a cache; load only its output head and its embedding table.

    `prepare` builds a cache that does not exist, with the teacher in memory during the build, and continues a build
    that was interrupted. It refuses a cache of another teacher, tokenizer, template, truncation or data.

    Args:
        folder: folder of the cache, or the fsspec URL of a complete one.
        model: name or folder of the teacher; `adapter`, `revision`, `dtype` and `trust_remote_code` as in `load_causal_lm`,
            as all arguments that are not listed here.
        cache_dtype: dtype of the stored hidden states; the teacher's own by default, which stores them exactly.
        tokenizer: tokenizer of the teacher; by default the one that belongs to the model.
        engine: what runs the teacher to build the cache, `transformers` or `vllm`.

    Raises:
        UserError: the teacher is not given by name.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Any,
        *,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        cache_dtype: torch.dtype | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        engine: str = "transformers",
        **loading: Any,
    ) -> None:
        if not isinstance(model, str):
            raise UserError(
                "teacher_cache requires a teacher given by name or folder, because its layers are not loaded"
            )
        if loading.get("tp_plan") is not None:
            raise UserError("tp_plan cannot be combined with a teacher cache: leave it out")
        self.folder = local_folder(folder)
        self.name, self.adapter, self.dtype, self.cache_dtype = model, adapter, dtype, cache_dtype
        self.engine = engine
        self._options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._loading = loading
        self.tokenizer = tokenizer or load_tokenizer(model, **self._options)
        self.cache: Cache
        """The open cache, available after `prepare`, like `head` and `table`."""

    @property
    def date(self) -> str | None:
        """The date that chat templates printed when the cache was built; None if there is no cache yet."""
        built = (self.folder / MANIFEST).is_file()
        return Manifest.load(self.folder).fingerprint.get(DATE) or None if built else None

    def check_method(self, args: DistillConfig) -> None:
        refuse_cached_attention(args.method_options)
        refuse_cached_sampling(args.lmbda)

    def prepare(self, encoder: TextEncoder, args: DistillConfig, sets: Sets, *, repair: bool = False) -> None:
        """Build or verify the cache of these data sets, then load the teacher's head and embedding table.

        With `repair`, damaged files are built again instead of refused.

        Raises:
            UserError: see `dwakd.cache.build.open_or_build`.
        """
        check_folder(self.folder)  # before the teacher's files are hashed, which takes a while
        request = self._request(encoder, args, sets)
        self.cache = open_or_build(self.folder, request, lambda: self._engine(args, sets), repair=repair)
        gc.collect()  # frees the teacher's layers, if they were loaded
        self.table, self.head = self.cache.teacher()
        self.find_place = partial(find_place, self.cache)

    def check(self, encoder: TextEncoder, args: DistillConfig, sets: Sets) -> Cache:
        """Verify every byte of the cache, and that it was built from these data sets; raise UserError otherwise."""
        request = self._request(encoder, args, sets)
        cache = open_complete(self.folder, progress=not args.disable_tqdm)
        cache.check_source(request)
        return cache

    def _request(self, encoder: TextEncoder, args: DistillConfig, sets: Sets) -> CacheRequest:
        if not sets and args.teacher_key is not None:
            raise UserError(
                f"no row names the teacher {self.name} in the column {args.teacher_key!r} (data.teacher_key), so its cache "
                "would be empty: remove the teacher"
            )
        return CacheRequest(
            sets={role: pairs for role, pairs in sets.items() if pairs is not None},
            fingerprint=fingerprint(encoder, bos=args.bos, max_length=args.max_length, **self._identity()),
            names={"teacher": self.name, "teacher.adapter": self.adapter or "none", "tokenizer": self.name},
            dtype=self.cache_dtype,
            rank=args.process_index,
            world_size=args.world_size,
            progress=not args.disable_tqdm,
        )

    def _identity(self) -> dict[str, Any]:
        """Return what identifies the teacher in the fingerprint of its cache."""
        return {
            "teacher": weights_digest(self.name, **self._options),
            "adapter": None if self.adapter is None else adapter_digest(self.adapter),
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self._loading.get("quantization_config"),
        }

    def _engine(self, args: DistillConfig, sets: Sets) -> Engine:
        """Load the teacher to build the cache."""
        if self.engine == "vllm":
            if self.adapter is not None or args.world_size > 1 or self._loading.get("quantization_config"):
                raise UserError(
                    "dwakd cache --engine vllm runs in one process, which uses all GPUs, and without teacher.adapter and "
                    "teacher.quantization_config: start it without torchrun, and name a merged or quantised model"
                )
            longest = max(len(row.teachers[0].ids) for pairs in filter(None, sets.values()) for row in pairs.rows)
            return VllmEngine(self.name, self.dtype, longest, **self._options)
        options = self._options | self._loading
        model = load_causal_lm(self.name, adapter=self.adapter, dtype=self.dtype, **options)
        model = on_device(load_pair(model, self.tokenizer, args, "teacher_processing_class")[0], args.device)
        return ModelEngine(_check_positions(model, args, sets))

    def states(self, tokens: TokenBatch) -> tuple[Float[Tensor, "tokens hidden"], None]:
        device = tokens.input_ids.device
        if self.table.device != device:
            tied = self.table is self.head.weight
            self.head = self.head.to(device)
            self.table = self.head.weight if tied else self.table.to(device)
        assert tokens.cache_places is not None
        return self.cache.read(tokens.cache_places).to(device, self.head.weight.dtype, non_blocking=True), None


def _check_positions(model: Any, args: DistillConfig, sets: Sets) -> Any:
    """Return the teacher, or raise UserError if a row with a teacher prompt has more tokens than it has positions."""
    positions = max_positions(model)
    for pairs in filter(None, sets.values()):
        if not args.lmbda and max(pairs.lengths(1), default=0) <= positions:
            continue
        for row in pairs.rows:
            side, length = row.teachers[0], row.teachers[0].length
            if args.lmbda:  # the student's own answers may be longer
                length = side.num_prompt + response_room(side.num_prompt, args.max_length, args.max_prompt_length)
            if length > positions:
                raise UserError(
                    f"{pairs.source}, {row.place}: prompt and response have up to {length} tokens for the teacher, which has "
                    f"only {positions} positions: shorten the row's prompt for the teacher"
                )
    return model


def find_place(cache: Cache, example_id: int, features: dict[str, Any]) -> int:
    """Return the index of a row in the cache, given its features for the teacher; raise UserError if it has none."""
    ids = [*features["input_ids"], features["target_ids"][-1]]
    place = cache.index.places.get(row_key(ids, len(ids) - sum(features["response_mask"])))
    if place is None:
        raise UserError(
            f"teacher cache {cache.folder} does not contain row {example_id} (counting from 0) of the data set "
            "to evaluate; give this data set as eval_dataset when the cache is built"
        )
    return place
