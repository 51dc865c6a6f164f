"""Test answers with tool calls and reasoning: the student learns exactly what its chat template writes for them."""

import logging
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.rows import Example
from dwakd.data.sources import load_examples
from dwakd.errors import UserError
from tests.builders import bpe_byte_fallback, byte_bpe
from tests.data.chat import gemma_like
from tests.data.test_chat import ANSWER, ASK, MISTRAL, PLAIN, QWEN3, R1, TOOLS, say

CALLS = "{% for c in m.tool_calls or [] %}"
_QWEN = QWEN3.replace(
    "{{ ns.c + '<|im_end|>",
    "{{ ns.c }}" + CALLS + "{{ '\n' if ns.c }}{{ '<tool_call>\n' + c.function|tojson + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>",
)
LLAMA3 = (
    "{{ bos_token }}{% if tools %}{{ '[' + tools|tojson + ']' }}{% endif %}{% for m in messages %}"
    "{{ '<|head|>' + m.role + '<|/head|>\n\n' }}{% if m.tool_calls %}{% if m.tool_calls|length > 1 %}"
    "{{ raise_exception('only one call') }}{% endif %}{% set f = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' + f.arguments|tojson + '}' }}"
    "{% else %}{{ m.content|trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
MISTRAL_TOOLS = MISTRAL.replace(
    "{% else %}{{ ' ' + m.content|trim + eos_token }}",
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% elif m.tool_calls %}"
    "{{ '[TOOL_CALLS][' }}" + CALLS + "{{ c.function|tojson }}{% endfor %}{{ ']' + eos_token }}"
    "{% else %}{{ ' ' + m.content|trim + eos_token }}",
)  # fmt: skip
CALL = {"type": "function", "id": "c1", "function": {"name": "rain", "arguments": {"place": 'Bø "x"', "days": 3}}}
SHOWN = '{"name": "rain", "arguments": {"place": "Bø \\"x\\"", "days": 3}}'
CALLING = say("assistant", None, tool_calls=[CALL])
THINKING = {**ANSWER, "reasoning_content": "2 and 2"}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot_id|>", "[TOOL_CALLS]"]


def tokenizer(template: str, build: Any = byte_bpe) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a chat template whose markers are special tokens, except those of calls and reasoning."""
    made: PreTrainedTokenizerFast = build()
    made.add_tokens([token for token in SPECIAL if token in template], special_tokens=True)
    made.add_tokens([token for token in ("<tool_call>", "</tool_call>", "<think>", "</think>") if token in template])
    made.chat_template = template
    return made


def example_of(*turns: dict[str, Any], **columns: Any) -> Example:
    return load_examples([{"messages": [*turns], **columns}])[0]


@pytest.mark.parametrize("build", [byte_bpe, bpe_byte_fallback])
@pytest.mark.parametrize("template", [_QWEN, LLAMA3, MISTRAL_TOOLS, TOOLS])
@pytest.mark.parametrize("before", [[ASK], [ASK, CALLING, say("tool", "4"), ANSWER, ASK]])
def test_a_call_is_learned_as_the_template_writes_it(template: str, build: Any, before: list[dict[str, Any]]) -> None:
    """Prompt and learned text together equal the conversation that the template writes, and the end token follows."""
    used = tokenizer(template, build)
    encoder = TextEncoder(used, "chat")
    example = encoder.with_response(example_of(*before, CALLING))
    turns = [*example.turns, say("assistant", "", tool_calls=[CALL])]
    full = used.apply_chat_template(turns, tokenize=False)
    prompt, text = encoder.prompt_text(example), example.response
    assert full.startswith(prompt + text)
    assert "rain" in text
    assert text.endswith(("}", "</tool_call>", "]", "</call>"))
    side = encode_pairs([example], encoder).rows[0].student
    learned = side.ids[side.num_prompt :].tolist()
    assert learned[-1] == encoder.end_token_id
    assert "".join(used.decode(learned[:-1]).split()) == "".join(text.split())  # SentencePiece may add a space
    assert side.byte_ends[-1] == len(text.encode())


def test_special_tokens_of_the_template_are_learned_as_special_tokens() -> None:
    """The student must learn the token [TOOL_CALLS] itself; its parser does not find a spelled-out one."""
    used = tokenizer(MISTRAL_TOOLS)
    row = encode_pairs([example_of(ASK, CALLING)], TextEncoder(used, "chat")).rows[0]
    assert row.student.ids[row.student.num_prompt] == used.convert_tokens_to_ids("[TOOL_CALLS]")
    assert row.text.startswith("[TOOL_CALLS][")
    plain = encode_pairs([Example(0, "Hi", response="[TOOL_CALLS]")], TextEncoder(used, "chat")).rows[0].student
    assert used.convert_tokens_to_ids("[TOOL_CALLS]") not in plain.ids


@pytest.mark.parametrize(
    "turn",
    [
        say("assistant", "Wait [TOOL_CALLS].", tool_calls=[CALL]),
        say("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"x": "<|endoftext|>"}}}]),
    ],
)
def test_special_tokens_of_a_row_are_not_mixed_with_those_of_the_template(turn: dict[str, Any]) -> None:
    """A row cannot smuggle an end token into an answer whose special tokens are parsed."""
    used = tokenizer(MISTRAL_TOOLS)
    with pytest.raises(UserError, match=r"row 0 .*(\[TOOL_CALLS\]|endoftext).*special token"):
        encode_pairs([example_of(ASK, turn)], TextEncoder(used, "chat"))


def test_reasoning_is_learned_as_the_template_writes_it() -> None:
    """Reasoning is learned inside <think>, which is opened once, whether the prompt or the answer opens it."""
    opened = _QWEN.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>\n' }}{% endif")
    for template, text in ((_QWEN, "<think>\n2 and 2\n</think>\n\nFour."), (opened, "2 and 2\n</think>\n\nFour.")):
        encoder = TextEncoder(tokenizer(template), "chat")
        example = encoder.with_response(example_of(ASK, THINKING))
        assert example.response == text
        assert (encoder.prompt_text(example) + text).count("<think>") == 1
    thought = {**CALLING, "reasoning_content": "Ask the gauge."}
    example = TextEncoder(tokenizer(_QWEN), "chat").with_response(example_of(ASK, thought))
    assert example.response == f"<think>\nAsk the gauge.\n</think>\n\n<tool_call>\n{SHOWN}\n</tool_call>"


@pytest.mark.parametrize(
    ("template", "turn", "message"),
    [
        (PLAIN, CALLING, "omits 'tool_calls' of the answer"),
        (PLAIN, THINKING, "omits 'reasoning_content' of the answer.*between <think> and </think>"),
        (TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), {**CALLING, "tool_calls": [CALL, CALL]}, "omits"),
        (R1, say("assistant", "<think>a</think>b", tool_calls=[CALL]), "omits 'content' of the answer"),
        (LLAMA3, {**CALLING, "tool_calls": [CALL, CALL]}, "only one call"),
        (TOOLS.replace("{{ '<|im_end|>", "{{ '<|call|>' if m.tool_calls else '<|im_end|>"), CALLING, "ends it with"),
        ("alpaca", CALLING, "'tool_calls', which only a chat template can show"),
        ("alpaca", THINKING, "'reasoning_content', which only a chat template can show"),
    ],
)  # fmt: skip
def test_an_answer_that_the_template_shows_partly_is_refused(template: str, turn: dict[str, Any], message: str) -> None:
    """A call or a thought that the template drops would be missing in what the student learns."""
    encoder = TextEncoder(tokenizer(template), "chat") if template != "alpaca" else TextEncoder(byte_bpe(), "alpaca")
    with pytest.raises(UserError, match=f"row 0 .*{message}"):
        encode_pairs([example_of(ASK, turn)], encoder)


def test_arguments_are_json_if_a_template_concatenates_them() -> None:
    """DeepSeek's templates add the arguments to a string, so arguments that are objects are written as JSON for them."""
    template = TOOLS.replace("c.function|tojson", "c.function.name + c.function.arguments")
    example = TextEncoder(tokenizer(template), "chat").with_response(example_of(ASK, CALLING))
    assert example.response == '<call>rain{"place": "Bø \\"x\\"", "days": 3}</call>'


@pytest.mark.parametrize("turn", [CALLING, THINKING, {**CALLING, "reasoning_content": "Ask."}])
def test_all_models_read_the_text_of_the_student(turn: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """The teacher reads the same characters after its own prompt, and a warning says that it would write others."""
    student = TextEncoder(tokenizer(_QWEN), "chat")
    same, other = TextEncoder(tokenizer(_QWEN, bpe_byte_fallback), "chat"), TextEncoder(tokenizer(LLAMA3), "chat")
    with caplog.at_level(logging.WARNING, "dwakd"):
        rows = encode_pairs([example_of(ASK, turn), example_of(ASK, ANSWER)], student, same).rows
        assert not caplog.records
        row = encode_pairs([example_of(ASK, turn), example_of(ASK, ANSWER)], student, same, other, source="a").rows[0]
    assert "a: in 1 of 1 answers" in caplog.text
    assert rows[0].text == row.text == student.with_response(example_of(ASK, turn)).response
    for encoder, side in zip((student, same, other), (row.student, *row.teachers), strict=True):
        read = encoder.tokenizer.decode(side.ids[side.num_prompt : -1])
        assert read.strip() == row.text
        assert side.byte_ends[-1] == len(row.text.encode())
    assert other.tokenizer.decode(row.teachers[1].ids[: row.teachers[1].num_prompt]).endswith("assistant<|/head|>\n\n")


def test_gemma_reads_a_call_as_text() -> None:
    """A teacher whose template knows no tool calls reads the student's text as the content of an answer."""
    teacher = TextEncoder(gemma_like(), "chat")
    row = encode_pairs([example_of(ASK, CALLING)], TextEncoder(tokenizer(_QWEN), "chat"), teacher).rows[0]
    assert teacher.tokenizer.decode(row.teachers[0].ids[: row.teachers[0].num_prompt]).endswith("model\n")
    assert SHOWN in row.text
