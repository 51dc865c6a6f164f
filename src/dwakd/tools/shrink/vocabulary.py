"""Train a tokenizer like another one with a chosen vocabulary size, and initialise embeddings for its tokens.

Only the vocabulary changes. Normaliser, pre-tokeniser, decoder, post-processor, special tokens and template are kept.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dwakd.errors import UserError

_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_BYTE_SCORE = -100.0  # so low that a literal "<0x0A>" in a text is never read as a byte token
_CHARACTER_COVERAGE = 0.9995  # SentencePiece's default: rarer characters fall back to bytes


def train_tokenizer(tokenizer: Any, texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer like `tokenizer` with a vocabulary learnt from `texts`.

    An added token is kept if it is a named special token, is used by the chat template or the post-processor, or
    occurs in the texts. Reserved and unused tokens are removed. Byte tokens are kept if the old tokenizer falls back
    to bytes. The result has fewer than `vocab_size` tokens if the texts do not contain enough.

    Raises:
        UserError: the tokenizer is not a fast BPE, Unigram or WordPiece tokenizer, or `vocab_size` is too small for
            the alphabet and the special tokens.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state["model"]["type"]
    if kind not in ("BPE", "Unigram", "WordPiece"):
        raise UserError(
            f"a tokenizer of the kind {kind} cannot be retrained: use a model with a BPE, Unigram or WordPiece tokenizer"
        )
    kept = _kept_tokens(tokenizer, state, texts)
    byte_tokens = _BYTE_TOKENS if state["model"].get("byte_fallback") else []
    trained = _trained(state, kept + byte_tokens, texts, vocab_size)
    _check_size(len(trained.get_vocab()), vocab_size)
    _renew_vocabulary(state, json.loads(trained.to_str())["model"], kept)
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    settings = ("model_max_length", "padding_side", "truncation_side", "model_input_names")
    new = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        extra_special_tokens=[token for token in map(str, tokenizer.extra_special_tokens) if token in kept],
        clean_up_tokenization_spaces=False,
        **{name: getattr(tokenizer, name) for name in settings},
        **named,
    )
    new.chat_template = tokenizer.chat_template
    return new


def old_tokens_of(old: Any, new: Any) -> list[list[int]]:
    """Return, for each token id of `new`, the old tokens from whose embeddings it is initialised.

    This is the old token with the same string if there is one, since both tokenizers write bytes and spaces the same
    way, or else the old tokenisation of that string. The list is empty if the old tokenizer cannot represent the
    string: some vocabularies lack bytes that never occur in UTF-8, and those of WordPiece lack characters.
    """
    old_vocab, model = old.get_vocab(), old.backend_tokenizer.model
    new_vocab = new.get_vocab()
    sources: list[list[int]] = [[] for _ in range(max(new_vocab.values()) + 1)]
    for token, index in new_vocab.items():
        sources[index] = [old_vocab[token]] if token in old_vocab else _pieces(token, model, old_vocab)
    return sources


def averaged_rows(
    table: Float[Tensor, " old_vocab *width"], sources: Sequence[Sequence[int]]
) -> Float[Tensor, " new_vocab *width"]:
    """Average the old embeddings named by `old_tokens_of`, or all of them for a token without sources."""
    table = table.detach()
    mean = table.mean(dim=0)
    return torch.stack([table[source].mean(dim=0) if source else mean for source in sources])


def _pieces(token: str, model: Any, old_vocab: dict[str, int]) -> list[int]:
    """Tokenise a token's string with the old model, without normaliser and pre-tokeniser."""
    prefix = getattr(model, "continuing_subword_prefix", None) or ""
    if not (prefix and token.startswith(prefix)):
        return [piece.id for piece in model.tokenize(token)]
    ids, rest = [], token.removeprefix(prefix)
    while rest:  # WordPiece's longest match, starting inside a word
        piece = next((rest[:end] for end in range(len(rest), 0, -1) if prefix + rest[:end] in old_vocab), "")
        if not piece:
            return []
        ids.append(old_vocab[prefix + piece])
        rest = rest.removeprefix(piece)
    return ids


def _kept_tokens(tokenizer: Any, state: dict[str, Any], texts: Sequence[str]) -> list[str]:
    """Return the special tokens to keep, in the order of their old ids, the unknown token first."""
    vocab, model = tokenizer.get_vocab(), state["model"]
    needed = set(tokenizer.all_special_tokens) - set(tokenizer.extra_special_tokens)
    mentions = [json.dumps(state["post_processor"], ensure_ascii=False), str(tokenizer.chat_template or "")]
    for token in {added["content"] for added in state["added_tokens"]} - needed:
        if any(token in text for text in (*mentions, *texts)):
            needed.add(token)
    unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
    kept = sorted(needed - {unknown}, key=lambda token: int(vocab[token]))
    return [unknown, *kept] if unknown is not None else kept


def _trained(state: dict[str, Any], fixed: list[str], texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer with the pipeline of `state`, without special tokens; `fixed` get the first ids."""
    blank = {**state, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    is_unigram, falls_back = state["model"]["type"] == "Unigram", state["model"].get("byte_fallback")
    alphabet: list[str] = []
    if '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["normalizer"]]):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    elif is_unigram and falls_back:  # otherwise a literal "<0x0A>" in a text could become a line feed
        alphabet = sorted(set("".join(_BYTE_TOKENS)))
    tokenizer = Tokenizer.from_str(json.dumps(blank))
    if splitters := _splitters(state):
        existing = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer is not None else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(existing + splitters)
    if falls_back:
        texts = _without_rare_characters(texts)
    if is_unigram:  # its trainer rejects a small vocabulary without naming the minimum; others exceed the size
        _check_size(len(fixed) + len(_alphabet(tokenizer, texts) | set(alphabet)), vocab_size)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    options = {"new_special_tokens": fixed, "initial_alphabet": alphabet, "show_progress": False}
    return wrapped.train_new_from_iterator(texts, vocab_size, len(texts), **options).backend_tokenizer


def _check_size(minimum: int, vocab_size: int) -> None:
    if minimum > vocab_size:
        raise UserError(
            f"vocab_size (--vocab-size) is {vocab_size}, but the special tokens and the alphabet of these texts alone "
            f"need {minimum} tokens: use a larger size"
        )


def _alphabet(tokenizer: Tokenizer, texts: Sequence[str]) -> set[str]:
    """Return the characters of the texts after normaliser and pre-tokeniser."""
    normalise = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    split = tokenizer.pre_tokenizer.pre_tokenize_str if tokenizer.pre_tokenizer else lambda text: [(text, None)]
    return {character for text in texts for piece, _ in split(normalise(text)) for character in piece}


def _splitters(state: dict[str, Any]) -> list[Any]:
    """Return pre-tokenisers for the training only, which keep properties of the old vocabulary.

    SentencePiece has no pre-tokeniser, but none of its tokens crosses a word boundary. In many vocabularies every
    digit is a separate token.
    """
    model = state["model"]
    cuts: list[Any] = []
    if model.get("byte_fallback"):
        spaces = pre_tokenizers.Split(Regex("▁+"), "merged_with_next")
        cuts += [pre_tokenizers.Split(Regex("\n+"), "isolated"), spaces]
    pieces = model["vocab"] if isinstance(model["vocab"], dict) else [piece for piece, _ in model["vocab"]]
    added = {token["content"] for token in state["added_tokens"]} | set(_BYTE_TOKENS)
    numbers = any(re.search("[0-9]{2}", piece) for piece in pieces if piece not in added)
    if not numbers and model["type"] != "WordPiece":
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    return cuts


def _without_rare_characters(texts: Sequence[str]) -> list[str]:
    counts = sorted((count, character) for character, count in Counter(chain.from_iterable(texts)).items())
    totals = list(accumulate(count for count, _ in counts))
    pairs = zip(counts, totals, strict=True)
    rare = {ord(item[1]): None for item, total in pairs if total <= (1 - _CHARACTER_COVERAGE) * totals[-1]}
    return [text.translate(rare) for text in texts]


def _renew_vocabulary(state: dict[str, Any], trained: dict[str, Any], kept: list[str]) -> None:
    """Put the new vocabulary into the old pipeline and update every token id."""
    model = state["model"]
    if trained["type"] == "Unigram":
        model["vocab"] = [[piece, _BYTE_SCORE if piece in _BYTE_TOKENS else score] for piece, score in trained["vocab"]]
        ids = {piece: index for index, (piece, _) in enumerate(model["vocab"])}
        model["unk_id"] = None if model.get("unk_id") is None else 0
    else:
        ids = trained["vocab"]
        model.update({name: trained[name] for name in ("vocab", "merges") if name in trained})
    added = [{**token, "id": ids[token["content"]]} for token in state["added_tokens"] if token["content"] in kept]
    state.update(added_tokens=sorted(added, key=lambda token: int(token["id"])), truncation=None, padding=None)
    _renew_ids(state["post_processor"] or {}, ids)


def _renew_ids(post_processor: dict[str, Any], ids: dict[str, int]) -> None:
    """Update the ids of template, BERT and RoBERTa processors, including those inside a sequence."""
    for inner in post_processor.get("processors", []):
        _renew_ids(inner, ids)
    for special in (post_processor.get("special_tokens") or {}).values():
        special["ids"] = [ids[token] for token in special["tokens"]]
    for name in {"cls", "sep"} & post_processor.keys():
        token = post_processor[name][0]
        post_processor[name] = [token, ids[token]]
