"""Test that answers depend only on the model and the options, not on the batch or the model's generation settings."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import Example
from dwakd.errors import UserError
from dwakd.evaluation.generate import (
    SeededSampling,
    generate_answers,
    generate_batch,
    group_prompts,
    plan_batches,
    streams,
)
from dwakd.evaluation.options import DecodingOptions, GenerationOptions
from tests.builders import FAMILIES, byte_bpe, tiny_model

VOCAB = 420  # larger than the tokenizer, as in Qwen's models
EXAMPLES = [
    Example(0, "Hi"),
    Example(1, "Which is larger, 12 or 7?"),
    Example(2, "Name three colours.", input="Red and green are taken."),
    Example(3, "Привет, мир!"),
    Example(4, "The quick brown fox jumps over the lazy dog, and then?"),
]


def answers_of(model: Any, encoder: TextEncoder, examples: list[Example], **options: Any) -> list[str]:
    """Generate short answers without a progress bar."""
    chosen = GenerationOptions(**{"max_new_tokens": 8, **options})
    return generate_answers(model, encoder, examples, chosen, progress=False)


class EndsAt(TextEncoder):
    """Encoder whose answers also end at the given tokens."""

    extra: tuple[int, ...] = ()

    @property
    def end_token_ids(self) -> list[int]:
        return [*super().end_token_ids, *self.extra]


@pytest.fixture(scope="module")
def encoder() -> EndsAt:
    return EndsAt(byte_bpe(), "plain")


def greedy_ids(model: Any, encoder: TextEncoder, example: Example, steps: int) -> list[int]:
    """Choose the likeliest tokens one by one, without batch, padding and cache."""
    prompt = encoder.prompt_ids(example)
    ids: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            token = int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax())
            if token in encoder.end_token_ids:
                break
            ids.append(token)
    return ids


def greedy_by_hand(model: Any, encoder: TextEncoder, example: Example, steps: int) -> str:
    return encoder.tokenizer.decode(greedy_ids(model, encoder, example, steps), skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_greedy_answers_equal_single_ones(family: str, encoder: TextEncoder) -> None:
    """Greedy answers in a batch equal those of single prompts."""
    model = tiny_model(family, VOCAB, tie_word_embeddings=False)
    answers = answers_of(model, encoder, EXAMPLES, seed=None, batch_size=5)
    assert answers == [greedy_by_hand(model, encoder, example, 8) for example in EXAMPLES]
    assert len(set(answers)) > 1


def test_sampled_answers_do_not_depend_on_the_batch(encoder: TextEncoder) -> None:
    """Sampled answers do not depend on the batch size or on the other rows."""
    model = tiny_model("llama", VOCAB)
    state = torch.get_rng_state()
    answers = answers_of(model, encoder, EXAMPLES, seed=10, batch_size=5)
    assert torch.equal(torch.get_rng_state(), state), "evaluation between two training steps must not shift dropout"
    assert answers == answers_of(model, encoder, EXAMPLES, seed=10, batch_size=2)
    assert answers[:2] == answers_of(model, encoder, EXAMPLES[:2], seed=10, batch_size=5)
    assert answers != answers_of(model, encoder, EXAMPLES, seed=20, batch_size=5)
    twins = answers_of(model, encoder, [EXAMPLES[0]] * 2, seed=10)
    assert twins[0] != twins[1], "each row has its own random numbers"


def test_repeated_ngrams_are_banned_in_prompt_and_answer(encoder: TextEncoder) -> None:
    """The published evaluation bans n-grams of prompt and answer, in sampled and greedy answers alike."""
    size, steps = 2, 24
    model = tiny_model("llama", VOCAB)
    with torch.no_grad():  # logits that hardly depend on the context repeat n-grams quickly
        model.get_output_embeddings().weight.mul_(5)
    for example in EXAMPLES:
        prompt = encoder.prompt_ids(example)
        ids: list[int] = []
        with torch.no_grad():
            while len(ids) < steps:
                logits = model(torch.tensor([prompt + ids])).logits[0, -1]
                text = prompt + ids
                logits[[after for before, after in pairwise(text) if before == text[-1]]] = -torch.inf
                token = int(logits.argmax())
                if token in encoder.end_token_ids:
                    break
                ids.append(token)
        expected = encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()
        settings: dict[str, Any] = {"max_new_tokens": steps, "no_repeat_ngram_size": size}
        assert answers_of(model, encoder, [example], seed=None, **settings) == [expected]
    plain, banned = (
        answers_of(model, encoder, EXAMPLES, seed=10, max_new_tokens=steps, no_repeat_ngram_size=n) for n in (0, size)
    )
    assert plain != banned
    assert banned == answers_of(model, encoder, EXAMPLES, seed=10, batch_size=2, **settings)
    # the draws are the same, so an answer that repeats nothing stays as it is
    assert answers_of(model, encoder, EXAMPLES, seed=10, max_new_tokens=steps, no_repeat_ngram_size=200) == plain


@pytest.mark.parametrize(("seed", "temperature"), [(None, 1.0), (10, 0.5)])
def test_ends_and_log_probabilities(encoder: EndsAt, seed: int | None, temperature: float) -> None:
    """A filter by likelihood needs that of the teacher itself, whatever the temperature, and with the end token."""
    model = tiny_model("llama", VOCAB)
    options = GenerationOptions(seed=seed, temperature=temperature, max_new_tokens=8, batch_size=5)
    (batch,) = plan_batches(model, encoder, EXAMPLES, options)
    first = generate_batch(model, encoder, batch, options)
    assert not any(answer.ended for answer in first)
    encoder.extra = (first[1].ids[5],)
    try:
        answers = generate_batch(model, encoder, batch, options)
    finally:
        end, encoder.extra = encoder.extra[0], ()
    assert [answer.ended for answer in answers] == [end in answer.ids for answer in first]
    for prompt, answer in zip(batch.prompts, answers, strict=True):
        new = [*answer.ids, *([end] if answer.ended else [])]
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        expected = log_probs.gather(1, torch.tensor(new)[:, None]).mean().item()
        assert answer.log_prob == pytest.approx(expected, abs=1e-4)


def test_saved_generation_settings_do_not_leak(encoder: TextEncoder) -> None:
    """The model's saved generation settings, such as Qwen's repetition penalty, have no effect."""
    model = tiny_model("gpt2", VOCAB)
    clean = [answers_of(model, encoder, EXAMPLES, seed=seed) for seed in (3, None)]
    saved = GenerationConfig(
        do_sample=True, temperature=0.2, top_p=0.3, top_k=2, repetition_penalty=9.0, max_length=4, num_beams=2
    )
    model.generation_config = saved
    leaky = [answers_of(model, encoder, EXAMPLES, seed=seed) for seed in (3, None)]
    assert leaky == clean
    assert model.generation_config is saved


def test_answers_end_at_every_end_token(encoder: EndsAt) -> None:
    """An answer ends at any of the end tokens."""
    model = tiny_model("llama", VOCAB)
    ids = [greedy_ids(model, encoder, example, 8) for example in EXAMPLES]
    encoder.extra = (ids[1][3],)
    try:
        answers = answers_of(model, encoder, EXAMPLES, seed=None)
        assert answers == [greedy_by_hand(model, encoder, example, 8) for example in EXAMPLES]
        stop = ids[1].index(ids[1][3])
        assert answers[1] == encoder.tokenizer.decode(ids[1][:stop]).strip()
    finally:
        encoder.extra = ()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_answers_stay_within_the_positions(family: str, encoder: TextEncoder) -> None:
    """Answers end at the model's last position, beyond which learned positions raise an IndexError."""
    positions = {"gpt2": "n_positions"}.get(family, "max_position_embeddings")
    lengths = [len(encoder.prompt_ids(example)) for example in EXAMPLES]
    model = tiny_model(family, VOCAB, **{positions: max(lengths) + 2})
    answers = answers_of(model, encoder, EXAMPLES, seed=None)
    limits = [min(8, max(lengths) + 2 - length) for length in lengths]
    assert min(limits) == 2
    assert max(limits) == 8
    expected = [greedy_by_hand(model, encoder, example, limit) for example, limit in zip(EXAMPLES, limits, strict=True)]
    assert answers == expected
    full = tiny_model(family, VOCAB, **{positions: max(lengths)})
    longest = EXAMPLES[lengths.index(max(lengths))]
    with pytest.raises(UserError, match=rf"the examples, row {longest.index} .*{max(lengths)} pos"):
        answers_of(full, encoder, EXAMPLES, seed=0)


def test_batches_hold_every_row_once(encoder: TextEncoder) -> None:
    """The batches contain every row exactly once."""
    batches = plan_batches(
        tiny_model("gpt2", VOCAB), encoder, EXAMPLES, DecodingOptions(max_new_tokens=8, batch_size=2)
    )
    assert sorted(row for batch in batches for row in batch.rows) == [0, 1, 2, 3, 4]
    assert [len(batch.rows) for batch in batches] == [2, 2, 1]
    assert answers_of(tiny_model("gpt2", VOCAB), encoder, [], seed=0) == []


def test_answers_of_other_limits_share_a_batch(encoder: TextEncoder) -> None:
    """On-policy training limits each answer by its own prompt; batches of one limit would have one row each."""
    model = tiny_model("gpt2", VOCAB)
    prompts = [encoder.prompt_ids(example) for example in EXAMPLES]
    limits = [3, 5, 2, 8, 4]
    (batch,) = group_prompts(model, prompts, limits, 5)
    for row, answer in zip(
        batch.rows, generate_batch(model, encoder, batch, GenerationOptions(seed=None)), strict=True
    ):
        assert answer.ids == greedy_ids(model, encoder, EXAMPLES[row], limits[row])
        assert not answer.ended
    longest = max(map(len, prompts))
    small = tiny_model("gpt2", VOCAB, n_positions=longest + 6)
    assert [max(one.limits) for one in group_prompts(small, prompts, limits, 5)] == [5, 8]


def test_modes_are_restored(encoder: TextEncoder) -> None:
    """Generation runs without dropout and then restores the train or eval mode of every module."""
    model = tiny_model("gpt2", VOCAB, resid_pdrop=0.5)
    answers = answers_of(model, encoder, EXAMPLES[:1], seed=0)
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert answers_of(model, encoder, EXAMPLES[:1], seed=0) == answers
    assert [module.training for module in model.modules()] == before
    assert True in before
    assert False in before


def test_adapters_are_active(encoder: TextEncoder) -> None:
    """The adapter of a LoRA student is active during generation."""
    plain = tiny_model("llama", VOCAB)
    untrained = answers_of(plain, encoder, EXAMPLES, seed=1)
    torch.manual_seed(0)
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = answers_of(model, encoder, EXAMPLES, seed=1)
    assert adapted == answers_of(model.merge_and_unload(), encoder, EXAMPLES, seed=1)
    assert adapted != untrained


def draw(logits: list[float], temperature: float = 1.0, top_p: float = 1.0, rows: int = 20_000) -> torch.Tensor:
    """Return how often each token is chosen by `rows` rows with their own streams."""
    sampler = SeededSampling(streams((10,), range(rows), 1, torch.device("cpu")), 3, temperature, top_p)
    scores = torch.tensor(logits).expand(rows, -1)
    chosen = sampler(torch.zeros(rows, 3, dtype=torch.long), scores)
    assert (chosen == 0).sum(dim=1).eq(1).all(), "exactly one token stays possible"
    return torch.bincount(chosen.argmax(dim=1), minlength=len(logits)) / rows


def test_sampling_follows_the_distribution() -> None:
    """Tokens are sampled with their probabilities, at any temperature and top-p."""
    probabilities = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.15, 0.05, 0.0])
    logits = probabilities.log()
    at_one, at_two, nucleus = draw(logits.tolist()), draw(logits.tolist(), 2.0), draw(logits.tolist(), top_p=0.75)
    # the standard error of 20,000 draws is at most 0.0036
    torch.testing.assert_close(at_one, probabilities, atol=0.015, rtol=0)
    torch.testing.assert_close(at_two, probabilities.sqrt() / probabilities.sqrt().sum(), atol=0.015, rtol=0)
    torch.testing.assert_close(nucleus, torch.tensor([0, 0.625, 0.375, 0, 0, 0, 0]), atol=0.015, rtol=0)
    assert at_one[probabilities == 0].sum() == 0


def test_streams_are_reproducible_and_extend() -> None:
    """With a higher limit of new tokens, a stream begins with the same random numbers."""
    device = torch.device("cpu")
    short, long = streams((10,), [3, 7], 5, device), streams((10,), [3, 7], 9, device)
    assert torch.equal(long[:, :5], short)
    assert torch.equal(streams((10,), [7], 5, device)[0], short[1])
    assert not torch.equal(streams((20,), [7], 5, device)[0], short[1])
