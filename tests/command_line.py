"""Call the command line within the process of a test."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from dwakd.cli import main
from tests.builders import byte_bpe, tiny_model, unigram_byte_fallback

ROWS = [{"prompt": f"Say number {n}.", "response": f"It is number {n}."} for n in range(12)]


def run(monkeypatch, capsys, *arguments):
    """Return the exit code, standard output and standard error of a call of `dwakd`."""
    monkeypatch.setattr(sys, "argv", ["dwakd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def one_sentence(err):
    """Return the error message, which must be the only line of standard error that begins with error."""
    # If a progress bar of another test is still open, tqdm moves the cursor up after its own bar instead of to the left.
    lines = [line for line in err.replace("\x1b[A", "\n").splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def make_workspace(folder: Path) -> Path:
    """Save a tiny student, a tiny teacher, rows, and a recipe that trains two steps with them."""
    for name, family, tokenizer in (("student", "llama", byte_bpe()), ("teacher", "qwen2", unigram_byte_fallback())):
        tiny_model(family, len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    recipe = {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "data": {"train": str(folder / "data.jsonl"), "template": "plain"},
        "loss": {"method": "dwa_kd"},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
