"""A teacher whose layers are never loaded: its hidden states come from a cache."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dwakd.cache.build import Order, obtain
from dwakd.cache.fingerprint import DATE, adapter_digest, fingerprint, row_key, weights_digest
from dwakd.cache.manifest import MANIFEST, Manifest, check_folder
from dwakd.cache.store import Cache, open_whole
from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import EncodedPairs
from dwakd.errors import UserError
from dwakd.losses import needs_attention
from dwakd.models.head import OutputHead
from dwakd.models.loading import load_causal_lm, load_tokenizer
from dwakd.training.config import DistillConfig
from dwakd.training.inputs import load_pair
from dwakd.training.teacher import Collator, Teacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CachedTeacher(Teacher):
    """Reads the teacher's final hidden states from a folder; the rest of a teacher's rows are its head and embeddings.

    A folder that isn't there is built first, with the teacher in memory for as long as that takes; a build that was
    interrupted goes on; a cache that was built from another teacher, tokenizer, template, truncation or data is
    refused.

    Args:
        folder: of the cache.
        model: the teacher by name: anything `load_causal_lm` takes.
        adapter: a PEFT adapter to merge into it.
        revision: of a hub id.
        dtype: in which the teacher computes.
        trust_remote_code: see `load_causal_lm`.
        cache_dtype: in which hidden states are stored; the teacher's own by default, which is exact.
        tokenizer: the teacher's, if not the model's own.

    Raises:
        UserError: a teacher that is given loaded, an unknown dtype, or nothing to load.
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
        cache_dtype: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if not isinstance(model, str):
            raise UserError("teacher_cache needs the teacher by name: its layers are to stay on the disk")
        if cache_dtype not in (None, *DTYPES):
            raise UserError(f"unknown teacher.cache_dtype {cache_dtype!r}; valid ones: {', '.join(DTYPES)}")
        self.folder = Path(folder).expanduser()
        self.name, self.adapter, self.revision = model, adapter, revision
        self.dtype = dtype
        self.cache_dtype = None if cache_dtype is None else DTYPES[cache_dtype]
        self.trust_remote_code = trust_remote_code
        self.tokenizer = tokenizer or load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
        self._cache: Cache | None = None
        self._parts: tuple[Tensor, OutputHead] | None = None

    @property
    def cache(self) -> Cache:
        """The open cache; `prepare` opens it."""
        assert self._cache is not None, "prepare comes first"
        return self._cache

    @property
    def date(self) -> str | None:
        """The date that chat templates printed when the cache was built; None of a cache that is not there yet."""
        built = (self.folder / MANIFEST).is_file()
        return Manifest.load(self.folder).fingerprint.get(DATE) if built else None

    @property
    def head(self) -> OutputHead:
        assert self._parts is not None, "prepare comes first"
        return self._parts[1]

    @property
    def table(self) -> Float[Tensor, "vocab embedding"]:
        assert self._parts is not None, "prepare comes first"
        return self._parts[0]

    def prepare(
        self, encoder: TextEncoder, args: DistillConfig, sets: dict[str, EncodedPairs | None], *, mend: bool = False
    ) -> None:
        """Build or verify the cache of these sets, then load the teacher's head and embedding table.

        Args:
            encoder: the teacher's.
            args: device, ranks, truncation.
            sets: "train" and "eval".
            mend: build damaged shards anew instead of refusing them.

        Raises:
            UserError: see `dwakd.cache.build.obtain`.
        """
        check_folder(self.folder)
        self._cache = obtain(self.folder, self._order(encoder, args, sets), lambda: self._load(args), mend=mend)
        gc.collect()  # the teacher's layers, if they were needed, go now
        self._parts = self._cache.teacher()

    def check(self, encoder: TextEncoder, args: DistillConfig, sets: dict[str, EncodedPairs | None]) -> Cache:
        """Verify that the cache belongs to these sets and that every byte of it is as it was written.

        Raises:
            UserError: it doesn't belong, or names every file that is missing or damaged.
        """
        cache = open_whole(self.folder, progress=not args.disable_tqdm)
        order = self._order(encoder, args, sets)
        cache.check_belongs(order.fingerprint, order.names, order.sets)
        return cache

    @property
    def _options(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def _order(self, encoder: TextEncoder, args: DistillConfig, sets: dict[str, EncodedPairs | None]) -> Order:
        marks = fingerprint(
            encoder,
            bos=args.bos,
            max_length=args.max_length,
            teacher=weights_digest(self.name, **self._options),
            adapter=None if self.adapter is None else adapter_digest(self.adapter),
            dtype=str(self.dtype).removeprefix("torch."),
        )
        return Order(
            sets={role: pairs for role, pairs in sets.items() if pairs is not None},
            fingerprint=marks,
            names={"teacher": self.name, "teacher.adapter": self.adapter or "none", "tokenizer": self.name},
            dtype=self.cache_dtype,
            rank=args.process_index,
            world_size=args.world_size,
            progress=not args.disable_tqdm,
        )

    def _load(self, args: DistillConfig) -> nn.Module:
        model = load_causal_lm(self.name, adapter=self.adapter, dtype=self.dtype, **self._options)
        model, _ = load_pair(model, self.tokenizer, args, "teacher_processing_class")
        return model.to(args.device)

    def collator(self, collate: Collator) -> Collator:
        return CachingCollator(collate, self.cache)

    def states(self, batch: dict[str, Any]) -> tuple[Float[Tensor, "tokens hidden"], None]:
        device = batch["teacher_input_ids"].device
        if self.table.device != device:
            head, tied = self.head.to(device), self.table is self.head.weight
            self._parts = head.weight if tied else self.table.to(device), head
        places = batch["teacher_places"][: len(batch["teacher_input_ids"])]
        return self.cache.read(places).to(device, self.head.weight.dtype, non_blocking=True), None


def refuse_attention(method: str, options: dict[str, Any]) -> None:
    """Raise UserError if the method reads the teacher's attention, which no cache holds."""
    if needs_attention(method, options):
        raise UserError(
            f"method {method} reads the teacher's attention, which a cache doesn't hold; set "
            "loss.span_weights=uniform, or train without teacher.cache"
        )


class CachingCollator:
    """Collates a batch, notes where the cache has its rows, and has them read ahead.

    transformers collates at least one batch ahead of the step, and data-loader workers more.
    """

    def __init__(self, collate: Collator, cache: Cache) -> None:
        self.collate = collate
        self.cache = cache

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        places = [self._place(feature) for feature in features]
        self.cache.prefetch(places)
        return {**self.collate(features), "teacher_places": places}

    def _place(self, feature: dict[str, Any]) -> int:
        ids = [*feature["teacher_input_ids"], feature["teacher_target_ids"][-1]]
        place = self.cache.place(row_key(ids, len(ids) - sum(feature["teacher_response_mask"])))
        if place is None:
            raise UserError(
                f"teacher cache {self.cache.folder} does not hold row {feature['example_id']} (counting from 0) of the "
                "set to evaluate; give the set as eval_dataset when the cache is built"
            )
        return place
