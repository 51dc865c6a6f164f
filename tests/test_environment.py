"""Test `dwakd env` and `dwakd --version`, also in a broken installation."""

import subprocess
import sys
from importlib import metadata

import pytest

from dwakd.cli import main
from dwakd.environment import PACKAGES, describe_environment, version_of


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dwakd", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out


def test_the_version_is_that_of_the_installed_package(monkeypatch, capsys):
    """`dwakd --version` prints the version of the installed package."""
    assert run(monkeypatch, capsys, "--version") == f"dwakd {metadata.version('dwakd')}\n"


def test_env_lists_every_version_and_the_hardware(monkeypatch, capsys):
    """The text has one list item per line, so that it can be pasted into an issue."""
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in run(monkeypatch, capsys, "env").splitlines())
    assert list(lines) == [*PACKAGES, "Python", "platform", "CPU", "GPU"]
    assert lines["torch"] == metadata.version("torch")
    assert all(lines.values())


def test_a_missing_package_and_a_broken_torch_are_part_of_the_report(monkeypatch):
    """The report states missing packages and a torch that cannot be imported."""
    assert version_of("dwakd-is-never-called-this") == "not installed"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch could not be imported" in describe_environment()


def test_env_is_quick():
    """`dwakd env` does not import transformers and peft, which takes many seconds."""
    code = "import sys, dwakd.cli, dwakd.environment as e; e.describe_environment(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"transformers", "peft", "datasets", "numba"} & set(loaded)
