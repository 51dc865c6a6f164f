"""Test that `dwakd eval --draft-for` counts what transformers' universal assisted decoding accepts."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from dwakd.data.encoding import TextEncoder
from dwakd.data.rows import Example
from dwakd.errors import UserError
from dwakd.evaluation.draft import Draft, check_prompts, count_accepted, evaluate_draft
from tests.builders import SAMPLE_TEXTS, byte_bpe, tiny_model, unigram_byte_fallback
from tests.command_line import one_sentence, run

LEARNED = SAMPLE_TEXTS[0]
PROMPTS = ["The quick brown", "The quick brown fox jumps over the"]


@torch.enable_grad()
def learner(family: str, tokenizer: Any, seed: int, steps: int) -> PreTrainedModel:
    """Return a model that has learned a text almost by heart."""
    model = tiny_model(family, len(tokenizer), seed=seed).train()
    ids = torch.tensor([[*tokenizer(LEARNED, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def pair() -> Draft:
    """Return a draft that knows the text less well than its target and has a smaller vocabulary."""
    tokenizer, own = byte_bpe(), byte_bpe(vocab_size=300)
    draft, target = learner("llama", own, 1, 15), learner("gpt2", tokenizer, 2, 60)
    return Draft(draft, own, target, TextEncoder(tokenizer, "plain"))


def greedy(model: PreTrainedModel, ids: list[int], count: int, end: int) -> list[int]:
    """Return the most probable next tokens, up to the end token, without a cache."""
    new: list[int] = []
    while len(new) < count and end not in new:
        new.append(int(model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    return new


def literal(pair: Draft, ids: list[int], lookahead: int, max_new_tokens: int) -> tuple[int, int, int]:
    """Count calls, proposed and accepted tokens by the definition: all text is encoded again in each step."""
    tokenizer, own = pair.encoder.tokenizer, pair.tokenizer
    answer = greedy(pair.target, ids, max_new_tokens, tokenizer.eos_token_id)
    calls, proposed, accepted, done = 0, 0, 0, 0
    while done < len(answer):
        known = own(tokenizer.decode([*ids, *answer[:done]]), add_special_tokens=False)["input_ids"]
        text = own.decode([*known, *greedy(pair.model, known, lookahead, own.eos_token_id)], skip_special_tokens=True)
        candidates = tokenizer(text)["input_ids"][len(ids) + done :]
        matched = 0
        while matched < min(len(candidates), len(answer) - done - 1) and candidates[matched] == answer[done + matched]:
            matched += 1
        calls, proposed, accepted, done = calls + 1, proposed + len(candidates), accepted + matched, done + matched + 1
    return calls, proposed, accepted


@torch.no_grad()
@pytest.mark.parametrize("lookahead", [1, 5])
def test_counts_are_those_of_the_definition(pair: Draft, lookahead: int) -> None:
    """The reported speed-up would be wrong if calls, proposed or accepted tokens were counted in another way."""
    for prompt in PROMPTS:
        ids = pair.encoder.prompt_ids(Example(0, prompt))
        found = count_accepted(pair, ids, lookahead, 24)
        assert found[:3] == literal(pair, ids, lookahead, 24)
        assert found.answer == greedy(pair.target, ids, 24, pair.encoder.end_token_id)  # only the speed changes
        assert 0 < found.accepted < found.proposed


@torch.no_grad()
def test_sentencepiece_drafts_are_accepted_as_often_as_by_the_definition(pair: Draft) -> None:
    """Drafts with the tokenizer of another family would look worse than they are, for example due to `▁` or `Ġ`.

    The number of proposed tokens differs, because transformers encodes only the last tokens again.
    """
    own = unigram_byte_fallback(prefix_space=False, vocab_size=390)
    other = pair._replace(model=learner("llama", own, 1, 15), tokenizer=own)
    for prompt in PROMPTS:
        ids = other.encoder.prompt_ids(Example(0, prompt))
        found, expected = count_accepted(other, ids, 3, 24), literal(other, ids, 3, 24)
        assert (found.calls, found.accepted) == (expected[0], expected[2])
        assert found.accepted > 0


def test_the_target_accepts_its_own_drafts(pair: Draft) -> None:
    """A draft with the same vocabulary needs no second tokenizer, and a copy of the target is accepted completely."""
    same = pair._replace(model=copy.deepcopy(pair.target), tokenizer=pair.encoder.tokenizer)
    scores = evaluate_draft(same, [Example(0, PROMPTS[0])], lookahead=4, max_new_tokens=10, progress=False)
    assert scores.acceptance_rate.mean == 100
    assert scores.target_calls == 2
    assert scores.accepted.mean == 4


def test_scores_are_quotients_of_sums(pair: Draft) -> None:
    """A mean of the prompts' means would weigh a prompt of one call as much as one of a hundred calls."""
    examples = [Example(row, prompt) for row, prompt in enumerate(PROMPTS)]
    scores = evaluate_draft(pair, examples, max_new_tokens=24, progress=False)
    counts = [count_accepted(pair, ids, 5, 24) for ids in pair.encoder.prompt_ids_batch(examples)]
    calls, proposed, accepted = (sum(column) for column in list(zip(*counts, strict=True))[:3])
    assert (scores.target_calls, scores.accepted.n) == (calls, 2)
    assert scores.accepted.mean == pytest.approx(accepted / calls)
    assert scores.acceptance_rate.mean == pytest.approx(100 * accepted / proposed)
    ratios = sorted(one.accepted / one.calls for one in counts)
    assert scores.accepted.interval == pytest.approx((ratios[0], ratios[1]))  # of two prompts, often the same one twice
    assert pair.model.generation_config.num_assistant_tokens is None  # the models keep their own settings


def test_command(
    pair: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes scores with the signature of both models, and does not replace those of other options."""
    for name, parts in {"draft": pair[:2], "target": (pair.target, pair.encoder.tokenizer)}.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    command = ("eval", tmp_path / "draft", "-d", data, "--draft-for", tmp_path / "target", "--template", "plain")
    code, out, _ = run(monkeypatch, capsys, *command, "--max-new-tokens", 24)
    assert code == 0
    (file,) = (tmp_path / "draft" / "draft").iterdir()
    assert file.name.endswith("test.draft.json")
    found = json.loads(file.read_text())
    expected = evaluate_draft(pair, [Example(row, prompt) for row, prompt in enumerate(PROMPTS)], max_new_tokens=24)
    assert found["accepted"]["mean"] == expected.accepted.mean
    assert f"{expected.accepted.mean:.2f}" in out
    assert found["signature"]["lookahead"] == 5
    assert found["signature"]["target"]["sha256"] != found["signature"]["draft"]["sha256"]
    code, _, err = run(monkeypatch, capsys, *command, "--max-new-tokens", 24, "--lookahead", 2)
    assert code != 0
    assert "lookahead 5 before, 2 now" in one_sentence(err)
    code, _, err = run(monkeypatch, capsys, *command, "--max-new-tokens", 100_000)
    assert code == 2
    assert "test.jsonl, row 0 (counting from 0): the prompt and 100000 new tokens may need" in one_sentence(err)
    for option, value in {"--top-p": 0.9, "--text": "x.jsonl"}.items():
        code, _, err = run(monkeypatch, capsys, *command, option, value)
        assert (code, one_sentence(err)) == (2, f"error: --draft-for does not use {option}: leave it out")


def test_different_vocabularies_of_the_same_size_are_refused(pair: Draft) -> None:
    """transformers would read the ids of one vocabulary as tokens of the other, so that nothing is accepted."""
    other = byte_bpe(SAMPLE_TEXTS[3:])
    model = tiny_model("llama", len(pair.encoder.tokenizer))
    assert len(other) == len(pair.encoder.tokenizer)
    with pytest.raises(UserError, match="different vocabularies of the same size, 400"):
        evaluate_draft(pair._replace(model=model, tokenizer=other), [Example(0, "a")], progress=False)


def test_a_prompt_that_the_draft_cannot_read_is_refused(pair: Draft) -> None:
    """transformers fails on a prompt without a token, after the prompts before it."""
    reads_nothing = pair._replace(tokenizer=lambda text: {"input_ids": []})
    with pytest.raises(UserError, match=r"row 3 .*: the draft's tokenizer makes no token of the prompt"):
        check_prompts(reads_nothing, [Example(3, "a")], 4)
