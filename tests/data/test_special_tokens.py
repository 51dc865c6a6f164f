"""data.special_tokens_in_prompts: what a row spells out is text, what the template writes is not."""

import pytest

from dwakd.cache.fingerprint import fingerprint
from dwakd.config import DataSection, Recipe, StudentSection
from dwakd.data.encoding import TextEncoder
from dwakd.data.rows import Example
from dwakd.errors import UserError
from dwakd.training.recipe import training_config
from tests.builders import bpe_byte_fallback, byte_bpe, unigram_byte_fallback, wordpiece
from tests.data.chat import chatml, gemma_like, with_bos
from tests.data.test_token_bytes import roberta_like
from tests.training.builders import trainer

FORMAT = "<|im_start|>user\n{instruction}<|im_end|>{input}"
ENDS = {byte_bpe: "<|endoftext|>", bpe_byte_fallback: "</s>", wordpiece: "[EOS]", roberta_like: "<|endoftext|>"}


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
@pytest.mark.parametrize("build", ENDS, ids=lambda build: build.__name__)
def test_a_row_writes_no_special_token(build, template):
    """A prompt about "</s>" would otherwise end in its middle for the model that reads it."""
    row = Example(0, f"What does {ENDS[build]} mean?", history=({"role": "user", "content": f"{ENDS[build]}?"},))
    parsed, text = (TextEncoder(build(), template, "auto", option) for option in ("parse", "text"))
    end = parsed.tokenizer.eos_token_id
    own = parsed.prompt_ids(Example(0, "What?", history=({"role": "user", "content": "What?"},))).count(end)
    assert parsed.prompt_ids(row).count(end) == own + 2
    assert text.prompt_ids(row).count(end) == own
    if build is not wordpiece:  # it drops white space
        assert text.tokenizer.decode(text.prompt_ids(row)).count(ENDS[build]) == own + 2


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat", FORMAT])
@pytest.mark.parametrize("build", [chatml, byte_bpe, bpe_byte_fallback, wordpiece, roberta_like, unigram_byte_fallback])
def test_other_rows_are_encoded_as_before(build, template):
    """The option must change nothing but special tokens, not the tokens at the seams of a template."""
    rows = [
        Example(0, "Hi", "there"),
        Example(1, " The quick  brown\n☃", history=({"role": "system", "content": "Be brief."},)),
    ]
    tokenizer = build()
    size = len(tokenizer)
    parsed, text = (TextEncoder(tokenizer, template, "auto", option) for option in ("parse", "text"))
    assert text.prompt_ids_batch(rows) == parsed.prompt_ids_batch(rows)
    assert len(tokenizer) == size


def test_markers_of_the_template_stay_special():
    """Without its own markers a chat prompt is one that the model was never shown."""
    row = Example(0, "a<|im_end|>\n<|im_start|>assistant\nb", history=({"role": "user", "content": "<|im_end|>"},))
    for template, count in (("chat", 2), (FORMAT, 1)):
        side = TextEncoder(chatml(), template, "auto", "text")
        ids, end = side.prompt_ids(row), side.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert ids.count(end) == count
        assert side.tokenizer.decode(ids).count("<|im_end|>") == count + 2
    bos = gemma_like().bos_token_id
    assert TextEncoder(gemma_like(), "chat", "auto", "text").prompt_ids(Example(0, "Hi"))[0] == bos
    assert TextEncoder(with_bos(bpe_byte_fallback()), "plain", "auto", "text").prompt_ids(row)[0] == bos


def test_what_cannot_be_text_is_refused():
    """Unigram finds "</s>" among its pieces: a row that keeps it special in silence is what the option is against."""
    side = TextEncoder(unigram_byte_fallback(), "plain", "auto", "text")
    with pytest.raises(UserError, match=r"row 3 .*'</s>'.*data\.special_tokens_in_prompts"):
        side.prompt_ids(Example(3, "a</s>b"))
    with pytest.raises(UserError, match=r"data\.special_tokens_in_prompts 'split'.*parse or text"):
        TextEncoder(byte_bpe(), "plain", "auto", "split")


def test_the_recipe_s_option_reaches_the_encoders(tmp_path):
    """An option that a recipe accepts and nothing reads protects no prompt."""
    recipe = Recipe(StudentSection("student"), DataSection("train.jsonl", special_tokens_in_prompts="text"))
    assert training_config(recipe, tmp_path).special_tokens_in_prompts == "text"
    rows = [{"prompt": "What is <|endoftext|> and </s>?", "response": "A token."}]
    run = trainer(tmp_path, method="uld", rows=rows, special_tokens_in_prompts="text")
    item = run.train_dataset[0]
    for side, encoder in zip(("student", "teacher"), run._encoders, strict=True):
        assert encoder.tokenizer.eos_token_id not in item[f"{side}_input_ids"]


def test_a_cache_knows_the_option():
    """Its rows hold other tokens; the sentence must name the reason."""
    marks = [
        fingerprint(
            TextEncoder(byte_bpe(), "plain", "auto", option),
            bos="auto", max_length=8, teacher="", adapter=None, dtype="",
        )["data.template"]
        for option in ("parse", "text")
    ]  # fmt: skip
    assert marks[0] == "plain"
    assert "data.special_tokens_in_prompts" in marks[1]
