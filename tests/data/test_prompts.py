"""Test prompt texts and end tokens of each template."""

from typing import Any

import pytest

from dwakd.data.encoding import TextEncoder
from dwakd.data.prompts import Prompts
from dwakd.data.rows import Example
from dwakd.data.templates import TEMPLATES
from dwakd.errors import UserError
from tests.builders import byte_bpe
from tests.data.chat import chatml, gemma_like


def render_prompt(example: Example, template: str, tokenizer: Any) -> str:
    return Prompts(template, tokenizer).render(example)


def end_token_id(tokenizer: Any, template: str) -> int:
    return Prompts(template, tokenizer).end_token_id()


PLAIN = Example(0, "Add.", response="3")
WITH_INPUT = Example(0, "Add.", "1 2", "3")
TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
)


def test_alpaca_is_the_literature_s_prompt() -> None:
    """The Alpaca prompt is the one that the paper uses. Otherwise, results would not be comparable."""
    assert render_prompt(PLAIN, "alpaca", None) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert render_prompt(WITH_INPUT, "alpaca", None) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


def test_plain_and_format_strings() -> None:
    """Templates insert the texts of a row. Braces in a row are not placeholders."""
    assert render_prompt(PLAIN, "plain", None) == "Add.\n"
    assert render_prompt(WITH_INPUT, "plain", None) == "Add.\n1 2\n"
    assert render_prompt(WITH_INPUT, "{{Q}} {instruction} [{input}]", None) == "{Q} Add. [1 2]"
    assert render_prompt(Example(0, "{input} {x}", "{0}"), "plain", None) == "{input} {x}\n{0}\n"


def test_earlier_turns_stand_before_the_instruction() -> None:
    """Templates other than `chat` show earlier turns before the instruction."""
    only_system = Example(0, "Add.", history=TURNS[:1])
    assert render_prompt(only_system, "plain", None) == "Be brief.\n\nAdd.\n"
    whole = Example(0, "Add.", history=TURNS)
    assert render_prompt(whole, "plain", None) == "Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Add.\n"


def test_chat_is_the_model_s_own() -> None:
    """Student and teacher each read the conversation in the format of their own chat template."""
    row = Example(0, "Add.", "1 2", history=TURNS[1:])
    assert render_prompt(row, "chat", chatml()) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_prompt(row, "chat", gemma_like()) == (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nAdd.\n1 2<end_of_turn>\n<start_of_turn>model\n"
    )


def test_end_token_is_what_the_chat_template_writes() -> None:
    """The end token is the one that the chat template writes after an answer."""
    for tokenizer, token in ((chatml(), "<|im_end|>"), (gemma_like(), "<end_of_turn>")):
        assert end_token_id(tokenizer, "chat") == tokenizer.convert_tokens_to_ids(token)
        assert end_token_id(tokenizer, "alpaca") == tokenizer.eos_token_id
        assert tokenizer.eos_token_id != tokenizer.convert_tokens_to_ids(token)


def test_end_token_of_templates_that_write_none() -> None:
    """Ordinary text after an answer is not an end token. Llama 2 writes a space before its end token."""
    tokenizer = byte_bpe()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\nend\n' }}{% endfor %}"
    assert end_token_id(tokenizer, "chat") == tokenizer.eos_token_id
    tokenizer = chatml()
    tokenizer.chat_template = "{% for m in messages %}[INST]{{ m['content'] }} <|im_end|>{% endfor %}"
    assert end_token_id(tokenizer, "chat") == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no-such", f"data.template 'no-such' is unknown: use {', '.join(TEMPLATES)}, chat, or a format string"),
        ("{instruction} {context}", "unknown placeholder {context}"),
        ("{instruction.__class__}", "unknown placeholder {instruction.__class__}"),
        ("{instruction!r}", "unknown placeholder {instruction!r}"),
        ("{instruction:>9}", "unknown placeholder {instruction:>9}"),
        ("{} {instruction}", "unknown placeholder {}"),
        ("{instruction", "data.template '{instruction'"),
        ("Context: {input}", "data.template 'Context: {input}'"),
    ],
)
def test_malformed_templates_are_refused(template: str, message: str) -> None:
    """Unknown names, unknown placeholders and templates without the instruction are refused."""
    with pytest.raises(UserError) as caught:
        render_prompt(PLAIN, template, None)
    assert message in str(caught.value)


def test_chat_without_a_template_or_with_one_that_refuses() -> None:
    """The message names the model without a chat template, or the row that a template refuses."""
    tokenizer = byte_bpe()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template: use data\.template: alpaca"):
        render_prompt(PLAIN, "chat", tokenizer)
    with pytest.raises(UserError, match=r"^row 7 \(counting from 0\): .*no system role here"):
        render_prompt(Example(7, "Add.", history=TURNS), "chat", gemma_like())


def test_no_end_of_sequence_token_is_refused() -> None:
    """A tokenizer without an end-of-sequence token is refused, because the student could not learn to stop."""
    tokenizer = byte_bpe()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        TextEncoder(tokenizer, "alpaca")
