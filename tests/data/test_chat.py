"""Test chat templates like those of published models: prompt and answer are exactly what the template writes."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils as clock

from dwakd.data.encoding import TextEncoder
from dwakd.data.pairs import encode_pairs
from dwakd.data.rows import Example
from dwakd.data.sources import load_examples
from dwakd.errors import UserError
from tests.builders import bpe_byte_fallback
from tests.data.chat import chatml

OPEN, CLOSE = "<|im_start|>", "<|im_end|>\n"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PLAIN = "{% for m in messages %}" + _TURN + "{% endfor %}" + _PROMPT
NO_PROMPT = "{% for m in messages %}" + _TURN + "{% endfor %}"
CHANNEL = (  # gpt-oss: an answer begins with its channel
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ('[final]' if m.role == 'assistant' else '') + ': ' + m.content"
    " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
R1 = (  # DeepSeek-R1's distilled models: the generation prompt opens a reasoning section, which is removed from answers
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
QWEN3 = (  # the last answer has a reasoning section, which may be empty; those of earlier answers are dropped
    "{% for m in messages %}{% set ns = namespace(r=m.reasoning_content or '', c=m.content) %}"
    "{% if '</think>' in ns.c %}{% set ns.r = ns.c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set ns.c = ns.c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + ns.r + '\n</think>\n\n' }}{% endif %}"
    "{{ ns.c + '<|im_end|>\n' }}{% endfor %}" + _PROMPT
)
MISTRAL = (  # writes a space before an answer, and the system text in the last user turn only
    "{% set loop_messages = messages[1:] if messages[0].role == 'system' else messages %}{% for m in loop_messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (messages[0].content + '\n\n' if loop.last and messages[0].role == 'system'"
    " else '') + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}"
)
TOOLS = (
    "{% if tools %}{{ 'TOOLS ' + tools|tojson + '\n' }}{% endif %}{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.name }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function|tojson + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + _PROMPT
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y %H:%M') + '\n' }}" + PLAIN
CALL = {"type": "function", "function": {"name": "rain_gauge", "arguments": {"place": "Bergen"}}}
GAUGE = [{"name": "rain_gauge"}]


def say(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


ASK, ANSWER = say("user", "2 + 2?"), say("assistant", "Four.")


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = chatml()
    tokenizer.chat_template = template
    return tokenizer


def trained(row: dict[str, Any] | Example, template: str, name: str = "chat") -> tuple[str, str]:
    """Return the text of a row that the model reads and the text that it is trained to write."""
    examples = [row] if isinstance(row, Example) else load_examples([row])
    side = encode_pairs(examples, TextEncoder(with_template(template), name)).rows[0].student
    decode = with_template(template).decode
    return decode(side.ids[: side.num_prompt]), decode(side.ids[side.num_prompt :])


@pytest.mark.parametrize("template", [PLAIN, NO_PROMPT, CHANNEL, R1, QWEN3, MISTRAL, TOOLS])
@pytest.mark.parametrize("turns", [[ASK], [say("system", "Add."), say("user", "Hi"), say("assistant", "Ho"), ASK]])
def test_prompt_and_answer_are_what_the_template_writes(template: str, turns: list[dict[str, Any]]) -> None:
    """Prompt and answer together equal the text that the template writes for the whole conversation."""
    prompt, answer = trained({"messages": [*turns, ANSWER]}, template)
    full = with_template(template).apply_chat_template([*turns, ANSWER], tokenize=False)
    if template == MISTRAL and len(turns) > 1:  # only the prompt contains the system text
        assert (prompt, answer) == (
            "[INST] Hi[/INST] Ho<|endoftext|>[INST] Add.\n\n2 + 2?[/INST] ",
            "Four.<|endoftext|>",
        )
    else:
        assert full.startswith(prompt + answer)
        assert answer.startswith("Four.")


@pytest.mark.parametrize(
    "template", [R1, QWEN3, QWEN3.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")]
)
@pytest.mark.parametrize(
    "answer",
    ["Four.", "<think>\n2 and 2\n</think>\n\nFour.", "<think>2 and 2</think>Four.", "2 and 2\n</think>\n\nFour."],
)
def test_thoughts_are_opened_and_closed_once(template: str, answer: str) -> None:
    """A plain answer is not placed in an open reasoning section, and an answer with reasoning gets no second one."""
    prompt, learnt = trained(Example(0, "2 + 2?", response=answer), template)
    assert prompt.startswith(f"{OPEN}user\n2 + 2?{CLOSE}{OPEN}assistant\n")
    assert learnt.removesuffix("<|im_end|>") == answer
    assert (
        (prompt + learnt).count("<think>")
        == (prompt + learnt).count("</think>")
        == (1 if template != R1 else "think" in answer)
    )


def test_a_space_before_answers_is_read_once() -> None:
    """SentencePiece writes a space before every answer, so the prompt does not end with one."""
    tokenizer = bpe_byte_fallback()
    tokenizer.chat_template = MISTRAL
    encoder = TextEncoder(tokenizer, "chat")
    assert encoder.prompt_text(Example(0, "Hi")).endswith("[/INST]")
    byte_level = TextEncoder(with_template(MISTRAL), "chat")
    assert byte_level.prompt_text(Example(0, "Hi")).endswith("[/INST] ")


def test_white_space_of_answers_stays_theirs() -> None:
    """The header before an answer is complete, also if the template trims white space from answers."""
    for template in (PLAIN, PLAIN.replace("m.content", "m.content|trim")):
        prompt, answer = trained(Example(0, "Hi", response="\n Ho \n"), template)
        assert (prompt, answer) == (f"{OPEN}user\nHi{CLOSE}{OPEN}assistant\n", "\n Ho \n<|im_end|>")


def test_altered_answers_are_refused() -> None:
    """A template that changes an answer is refused, because the student would learn a text that it never writes."""
    with pytest.raises(UserError, match="does not write an assistant's answer"):
        TextEncoder(with_template(PLAIN.replace("m.content", "m.content|upper")), "chat")
    encoder = TextEncoder(with_template(PLAIN.replace("m.content", "m.content|replace('Four', 'Five')")), "chat")
    with pytest.raises(UserError, match=r"^row 3 \(counting from 0\): .*the answer"):
        encoder.prompt_ids(Example(3, "2 + 2?", response="Four."))


LOOK = say("assistant", "rain_gauge", tool_calls=[CALL])
SHOWN = {
    "tools": {"messages": [ASK, ANSWER], "tools": GAUGE},
    "tools as JSON": {"messages": [ASK, ANSWER], "tools": '[{"name": "rain_gauge"}]'},
    "tools of a prompt that is a string": {"prompt": "2 + 2?", "response": "Four.", "tools": GAUGE},
    "documents": {"messages": [ASK, ANSWER], "documents": [{"text": "rain_gauge"}]},
    "tool_calls": {"messages": [ASK, say("assistant", None, tool_calls=[CALL]), say("tool", "4"), ANSWER]},
    "content beside tool_calls": {"messages": [ASK, LOOK, say("tool", "4"), ANSWER]},
    "name": {"messages": [say("user", "2 + 2?", name="rain_gauge"), ANSWER]},
    "system": {"messages": [ASK, ANSWER], "system": "rain_gauge"},
    "from and value": {"conversations": [{"from": "human", "value": "rain_gauge"}, {"from": "gpt", "value": "Yes."}]},
    "text parts": {"messages": [say("user", [{"type": "text", "text": "rain_gauge"}]), ANSWER]},
}  # fmt: skip


@pytest.mark.parametrize("what", SHOWN)
def test_everything_before_the_answer_is_read(what: str) -> None:
    """Prompts contain tools, documents, calls, names and system texts of the row."""
    assert "rain_gauge" in trained(SHOWN[what], TOOLS)[0]


@pytest.mark.parametrize("template", [PLAIN, "alpaca"])
@pytest.mark.parametrize("what", ["tools", "documents", "tool_calls", "name", "tools of a prompt that is a string"])
def test_parts_that_a_template_leaves_out_are_refused(what: str, template: str) -> None:
    """A row is refused if the template omits a part of it."""
    with pytest.raises(UserError, match=rf"{what.split()[0]}.* row 0|row 0 .*{what.split()[0]}"):
        trained(SHOWN[what], PLAIN, "alpaca" if template == "alpaca" else "chat")


def test_turns_that_a_template_leaves_out_are_refused() -> None:
    """A row is refused if the template omits a turn, as those of Phi-3 and Zephyr do. Empty turns may be omitted."""
    template = (
        "{% for m in messages %}{% if m.role != 'system' and (m.role != 'tool') %}"
        + _TURN
        + "{% endif %}{% endfor %}"
        + _PROMPT
    )
    with pytest.raises(UserError, match=r"'content' of turn 0 \(role 'system'"):
        trained({"messages": [say("system", "Add."), ASK, ANSWER]}, template)
    with pytest.raises(UserError, match=r"'content' of turn 1 \(role 'tool'"):
        trained({"messages": [ASK, say("tool", "4"), ANSWER]}, template)
    with pytest.raises(UserError, match=r"'content' of turn 1 \(role 'tool'"):
        trained(
            {"messages": [ASK, say("tool", "4"), ANSWER], "system": "Add."}, template.replace("!= 'system'", "!= 'x'")
        )
    with pytest.raises(UserError, match=r"'content' of the column 'system'"):
        trained({"messages": [ASK, ANSWER], "system": "Add."}, template)
    trained({"messages": [say("system", ""), ASK, ANSWER]}, template)


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "c1", "function": {"name": name, "arguments": arguments}}


def calls(*made: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [say("user", "Bergen?"), say("assistant", None, tool_calls=[*made]), say("tool", "4"), ANSWER]}


FIRST_CALL = TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
NAMES_ONLY = TOOLS.replace("c.function|tojson", "c.function.name")
LAST_SYSTEM = (
    "{% set ns = namespace(s='') %}{% for m in messages if m.role == 'system' %}{% set ns.s = m.content %}{% endfor %}"
    "{{ ns.s }}{% for m in messages if m.role != 'system' %}" + _TURN + "{% endfor %}" + _PROMPT
)
PARTLY = {
    "second call": (calls(CALL, call("wind", {"place": "Oslo"})), FIRST_CALL, "'tool_calls' of turn 1"),
    "same call again": (calls(CALL, CALL), FIRST_CALL, "'tool_calls' of turn 1"),
    "arguments": (calls(CALL), NAMES_ONLY, "'tool_calls' of turn 1"),  # the user's turn has the same word
    "number in arguments": (calls(call("wait", {"seconds": 317})), NAMES_ONLY, "'tool_calls' of turn 1"),
    "type in arguments": (calls(call("find", {"type": "museum"})), NAMES_ONLY, "'tool_calls' of turn 1"),
    "one system turn of two": (
        {"messages": [say("system", "Add."), say("system", "Be brief."), ASK, ANSWER]}, LAST_SYSTEM, "'content' of turn 0",
    ),
    "description of a tool": (
        {"messages": [ASK, ANSWER], "tools": [{"name": "sum", "description": "adds"}]},
        TOOLS.replace("tools|tojson", "tools[0].name"), "'tools'",
    ),
    "title of a document": (
        {"messages": [ASK, ANSWER], "documents": [{"title": "Sums", "text": "2 + 2"}]}, TOOLS, "'documents'",
    ),
    "a thought that equals the text": (
        {"messages": [ASK, {**ANSWER, "reasoning_content": "Four"}, ASK, ANSWER]}, PLAIN, "'reasoning_content' of turn 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PARTLY)
def test_parts_that_a_template_shows_partly_are_refused(what: str) -> None:
    """A row is refused if the template shows a part incompletely. Each row is checked, also after complete ones."""
    row, template, named = PARTLY[what]
    fine = {"messages": [ASK, ANSWER]}
    examples, encoder = load_examples([fine, row]), TextEncoder(with_template(template), "chat")
    with pytest.raises(UserError, match=f"row 1 .*{named}") as caught:
        encode_pairs(examples, encoder)
    assert str(caught.value).count("row 1") == 1


_ESCAPED = "".join(f"|replace({c!r}, '\\\\u{ord(c):04x}')" for c in "<>&'")


@pytest.mark.parametrize("written", ["c.function|tojson", f"c.function|tojson{_ESCAPED}", "c.function|string"])
def test_texts_are_found_as_templates_write_them(written: str) -> None:
    """Texts are found in the prompt if the template escapes quotes, line ends or other characters."""
    text = 'it\'s <b>\n"Bjørn" \\ & \u2028'
    row = calls(call("a", {"x": [text, 1.5, True, None]}), call("b", {"y": {"id": text}}))
    row["messages"][0]["content"] = f" {text}\n"
    encoder = TextEncoder(with_template(TOOLS.replace("c.function|tojson", written)), "chat")
    assert "Bjørn" in encoder.prompt_text(load_examples([row])[0])
    trained({"messages": [say("user", text), ANSWER]}, PLAIN.replace("m.content", "m.content|e"))


def test_arguments_given_as_a_string_are_written_once() -> None:
    """Arguments given as a JSON string are not encoded twice. Templates that expect the string get it."""
    given = '{"place":  "Bergen", "days": null}'
    text, row = '{"place": "Bergen", "days": null}', calls(call("rain_gauge", given))
    assert f'"arguments": {text}' in trained(row, TOOLS)[0]
    for written in (" }}{{ c.function.arguments }}{{ ", " + c.function.arguments + ", " ~ c.function.arguments ~ "):
        template = TOOLS.replace("c.function|tojson", f"c.function.name{written}''")
        assert f"<call>rain_gauge{given}</call>" in trained(row, template)[0]
    for other in ("[1]", "Bergen", '{"a": 1, "a": 2}'):
        assert json.dumps(other) in trained(calls(call("rain_gauge", other)), TOOLS)[0]


@pytest.mark.parametrize("thought", ["<think>\n2 and 2\n</think>\n\nFour.", "2 and 2</think>Four."])
def test_earlier_thoughts_inside_content_may_be_cut(thought: str) -> None:
    """Templates may remove reasoning from the content of earlier answers, but must show the rest."""
    row = {"messages": [ASK, say("assistant", thought), ASK, ANSWER]}
    for template in (R1, QWEN3):
        assert "2 and 2" not in trained(row, template)[0]
    assert "2 and 2" in trained(row, PLAIN)[0]
    with pytest.raises(UserError, match="'content' of turn 1"):
        trained({"messages": [ASK, say("assistant", f"Well <think>x</think>{thought}"), ASK, ANSWER]}, R1)


def test_earlier_thoughts_may_be_left_out() -> None:
    """A template may omit the reasoning_content of earlier turns as Qwen3's does, unless it ignores this key."""
    row = {"messages": [say("user", "Hi"), say("assistant", "Ho", reasoning_content="greet"), ASK, ANSWER]}
    assert "greet" not in trained(row, QWEN3)[0]
    with pytest.raises(UserError, match="'reasoning_content' of turn 1"):
        trained(row, PLAIN)


def test_options_of_the_template() -> None:
    """`chat_template_kwargs` are passed to the template. Lists and objects that it does not show are refused."""
    switch = "{{ 'terse\n' if terse else '' }}{{ rules or '' }}" + PLAIN
    row = {"messages": [ASK, ANSWER], "chat_template_kwargs": {"terse": True, "rules": "Add.", "more": None}}
    assert trained(row, switch)[0].startswith("terse\nAdd.<|im_start|>")
    assert trained({**row, "chat_template_kwargs": {"terse": True}}, PLAIN) == trained(
        {"messages": [ASK, ANSWER]}, PLAIN
    )
    low = {**row, "chat_template_kwargs": {"reasoning_effort": "low", "rules": "Add.", "num": 3}}  # switches
    for name in ("chat", "alpaca"):
        assert trained(low, PLAIN, name) == trained({"messages": [ASK, ANSWER]}, PLAIN, name)
        with pytest.raises(UserError, match=r"row 0 .*'rules'"):
            trained({**row, "chat_template_kwargs": {"rules": ["Add."]}}, PLAIN, name)


def test_harmless_keys_are_no_reason_to_refuse() -> None:
    """Rows are accepted if their turns contain metadata such as sources, times and weights."""
    keys = {"id": "a", "timestamp": 3, "weight": None, "images": [], "tool_calls": None}
    row = {"messages": [{**ASK, **keys, "weight": 0}, {**ANSWER, **keys, "weight": 1}]}
    for name in ("chat", "alpaca"):
        assert trained(row, PLAIN, name) == trained({"messages": [ASK, ANSWER]}, PLAIN, name)


def test_the_date_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The date that a template prints can be fixed, so that prompts match a teacher cache or an earlier run."""
    real = clock.datetime
    encoder = TextEncoder(with_template(DATED), "chat", date="2024-07-26")
    today = TextEncoder(with_template(DATED), "chat")
    monkeypatch.setattr(clock, "datetime", type("Later", (), {"now": staticmethod(lambda: real(2031, 5, 6))}))
    assert encoder.prompt_text(Example(0, "Hi")).startswith("Today is 26 Jul 2024 00:00\n")
    assert today.prompt_text(Example(0, "Hi")).startswith(f"Today is {real.now():%d %b %Y} 00:00\n")
    assert TextEncoder(with_template(DATED), "chat").printed_date == "2031-05-06"
    assert TextEncoder(with_template(PLAIN), "chat").printed_date is None
    assert clock.datetime.now() == real(2031, 5, 6)
