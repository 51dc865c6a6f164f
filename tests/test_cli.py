"""Test the help of every command, and the commands that need no model."""

import io
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from dwakd.cli import main
from tests.command_line import make_workspace, one_sentence, run

COMMANDS = (
    *("train", "cache", "eval", "judge", "similarity", "report", "inspect", "compare", "shrink", "demo", "methods"),
    *("schema", "env"),
)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help(command, monkeypatch, capsys):
    """`--help` works for every command."""
    code, out, _ = run(monkeypatch, capsys, *command, "--help")
    assert code == 0
    assert "Usage" in out


def test_methods(monkeypatch, capsys):
    """`dwakd methods` shows complete names and allowed values in a terminal of 80 columns."""
    code, out, _ = run(monkeypatch, capsys, "methods")
    assert (code, "dwa_kd" in out) == (0, True)
    monkeypatch.setattr("dwakd.cli.tools.console", Console(width=80))
    code, out, _ = run(monkeypatch, capsys, "methods", "dwa_kd")
    assert re.search(r"band_blend +0\.7 .* a number at least", out)
    assert re.search(r"weight_normalisation +product .* product,", out)
    assert re.search(r"gate_warmup_steps +0 .* a whole number", out)
    assert re.search(r"gamma_end +null .* a number at least", out)
    assert "KD^stu = sum_i w_i D(p^{t->s}_i || p^s_i)" in out, "the formula as written"
    assert max(map(len, out.splitlines())) <= 80
    code, _, err = run(monkeypatch, capsys, "methods", "nothing")
    assert (code, "valid ones" in one_sentence(err)) == (2, True)


def test_schema(tmp_path, monkeypatch, capsys):
    """`dwakd schema` writes the JSON Schema to a file or to standard output."""
    code, out, _ = run(monkeypatch, capsys, "schema")
    assert code == 0
    assert run(monkeypatch, capsys, "schema", "-o", tmp_path / "recipe.json")[0] == 0
    schema = json.loads((tmp_path / "recipe.json").read_text(encoding="utf-8"))
    assert schema == json.loads(out)
    assert schema["properties"]["training"]["properties"]["learning_rate"]["description"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_message_that_the_terminal_cannot_print(encoding, tmp_path, monkeypatch):
    """A lone surrogate in the data, or a terminal without Unicode, must not replace the message by a traceback."""
    (tmp_path / "rows.jsonl").write_text('{"qu\\ud800": "a", "r\u00e9sponse": "b"}', encoding="utf-8")
    recipe, train = make_workspace(tmp_path) / "recipe.yaml", f"data.train={tmp_path / 'rows.jsonl'}"
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "argv", ["dwakd", "train", str(recipe), train, "-o", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    terminal.flush()
    assert ended.value.code == 2
    assert b"qu\\ud800" in terminal.buffer.getvalue()


def test_help_needs_no_torch():
    """`dwakd --help` does not import torch, which takes seconds."""
    script = "import sys, dwakd.cli; sys.argv = ['dwakd', 'train', '--help']; dwakd.cli.app(standalone_mode=False); "
    script += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
