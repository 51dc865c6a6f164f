"""Test `dwakd inspect` on recipes and on trained runs of tiny models."""

import itertools
import json
import math
import re

import pytest
import torch
from markupsafe import escape

from dwakd.inspection.computed import expected_path
from dwakd.inspection.inspect import inspect_recipe, sections
from dwakd.losses.record import record, recording
from dwakd.recipe.recipe import load_recipe
from dwakd.report.page import render_page
from dwakd.training.run import train
from tests.command_line import make_workspace, one_sentence, run
from tests.inspection.builders import workspace

EVIL = '<script>alert("1")</script> [bold]x[/bold] \x1b[31m שלום 12'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A workspace with a row of markup, a control character and right-to-left text."""
    path = workspace(tmp_path_factory.mktemp("inspect"))
    with (path / "data.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"prompt": EVIL, "response": EVIL}))
    return path


def trained(folder, name, *overrides):
    """Train a run once, and return its folder."""
    if not (folder / name).exists():
        recipe = load_recipe(folder / "recipe.yaml", ["training.disable_tqdm=true", "data.limit=12", *overrides])
        train(recipe, folder / name)
    return folder / name


def test_mistakes_before_training(folder):
    """Common mistakes are named before anybody waits for a training."""
    found = inspect_recipe(load_recipe(folder / "recipe.yaml", ["data.max_length=17", "data.max_prompt_length=16"]))
    names = [name for name, _ in found.findings]
    # the configs of the tiny models end at token 1, and their tokenizers at token 0
    assert {"chat template not used", "answer cut", "end token"} <= set(names)
    assert "text changed" not in names


def test_a_tokenizer_of_the_wrong_class(tmp_path):
    """Transformers reads this Unigram tokenizer as Qwen2's, which drops spaces and digits without an error."""
    found = inspect_recipe(load_recipe(make_workspace(tmp_path) / "recipe.yaml"))
    assert any(name == "text changed" and "teacher" in text for name, text in found.findings)


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_bos_tokens(folder, bos, tmp_path):
    """A BOS token on one side, and a BOS token that an option removed, are different mistakes."""
    from tests.builders import bpe_byte_fallback, tiny_model

    tokenizer = bpe_byte_fallback()
    tokenizer.backend_tokenizer.post_processor = _template_processor()
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    recipe = load_recipe(folder / "recipe.yaml", [f"data.bos={bos}", f"teacher.model={tmp_path / 'llama'}"])
    names = {name for name, _ in inspect_recipe(recipe).findings}
    assert ("BOS on one side only" in names, "BOS missing" in names) == (bos == "auto", bos == "never")


def _template_processor():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("dwa_kd", ["loss.method=dwa_kd"]),
        ("dskd", ["loss.method=dskd"]),
        ("dwa_kd_v2", ["loss.method=dwa_kd_v2"]),
        ("sum", ["loss=[{method: dwa_kd, variant: recommended}, {method: alm}]"]),
    ],
)
def test_what_a_trained_loss_computed(folder, name, overrides):
    """The maps and weights are those of the loss: each token's attention sums to 1, a path begins and ends in the corners."""
    path = trained(folder, name, *overrides)
    found = inspect_recipe(load_recipe(path / "dwakd-recipe.yaml"), path, rows=4)
    for row, (first, *_) in found.rows:
        lengths = [len(side.tokens) for side in row.sides]
        for title, table in first.maps.items():
            assert list(table.shape) == lengths
            if "attention" in title:
                torch.testing.assert_close(table.sum(1), torch.ones(lengths[0]))
            else:
                torch.testing.assert_close(table[[0, -1], [0, -1]], torch.ones(2))
        assert all(len(values) == lengths[side] for side, _, values in first.values)
        weights = [values for side, title, values in first.values if title == "weight in kd_student" and "dwa" in name]
        assert all(sum(values) in (0, pytest.approx(lengths[0], rel=1e-4)) for values in weights)
    assert {"sum": 2}.get(name, 1) == len(found.rows[0][1])


def test_trained_maps_are_used(folder):
    """Maps with other weights give another attention; otherwise the page would show an untrained loss."""
    from safetensors.torch import load_file, save_file

    path = trained(folder, "dwa_kd", "loss.method=dwa_kd")
    recipe, file = load_recipe(path / "dwakd-recipe.yaml"), path / "distillation" / "maps.safetensors"
    before, again = (inspect_recipe(recipe, path, rows=1).rows[0][1][0].maps["cross-model attention"] for _ in range(2))
    torch.testing.assert_close(before, again)
    state = load_file(file)
    save_file({name: value * 3 for name, value in state.items()}, file)
    after = inspect_recipe(recipe, path, rows=1).rows[0][1][0].maps["cross-model attention"]
    save_file(state, file)
    assert not torch.allclose(before, after)


def test_the_expected_path():
    """The heat map is the mean over all monotone alignments, weighted by exp(-cost / gamma)."""
    cost, gamma, lengths = torch.tensor([[[0.3, 0.8], [0.1, 0.5]]]), 0.7, torch.tensor([2])
    paths = [[(0, 0), (1, 1)], [(0, 0), (0, 1), (1, 1)], [(0, 0), (1, 0), (1, 1)]]
    shares = [math.exp(-sum(float(cost[0][cell]) for cell in path) / gamma) for path in paths]
    expected = torch.zeros(2, 2)
    for path, share in zip(paths, shares, strict=True):
        for cell in path:
            expected[cell] += share / sum(shares)
    torch.testing.assert_close(expected_path(cost, gamma, lengths, lengths)[0], expected)


def test_text_of_the_data_is_escaped(folder, monkeypatch, capsys):
    """Neither a page nor the terminal may run what a row contains."""
    pytest.importorskip("altair")
    path = trained(folder, "dwa_kd", "loss.method=dwa_kd")
    monkeypatch.setattr("dwakd.inspection.inspect.load_recipe", lambda *_: load_recipe(folder / "recipe.yaml"))
    page = render_page("Inspection", sections(path, row=12))
    assert str(escape('<script>alert("1")</script>')) in page
    assert '<script>alert("1")' not in page
    assert not re.search(r'class="token"[^>]*>[^<]*<(?!/span)', page), "a token is not escaped"
    assert 'class="pairs" dir="auto"' in page
    code, out, _ = run(monkeypatch, capsys, "inspect", folder / "recipe.yaml", "--row", 12)
    assert code == 0
    assert "\x1b" not in out
    assert "[bold]x[/bold]" in out


def test_a_text_with_two_tokenizers(folder, tmp_path, monkeypatch, capsys):
    """A pair of tokenizers can be compared before there is a recipe, and the page is written as a whole."""
    pytest.importorskip("altair")
    names = ("--student", folder / "student", "--teacher", folder / "teacher")
    code, out, _ = run(monkeypatch, capsys, "inspect", "--text", "Number 12.", *names)
    assert (code, "numbers of two or more digits" in out, "prompt of" in out) == (0, True, False)
    code, out, _ = run(monkeypatch, capsys, "inspect", "--text", "Number 12.", *names, "-o", tmp_path / "a.html")
    assert (code, [path.name for path in tmp_path.iterdir()]) == (0, ["a.html"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give either a recipe"),
        (["--text", "a"], "give either a recipe"),
        (["recipe.yaml", "--student", "x"], "give either a recipe"),
        (["student"], "has no dwakd-recipe.yaml"),
        (["recipe.yaml", "--row", "99"], "numbered 0 to 12"),
        (["recipe.yaml", "data.responses=teacher", "generate.output=none.jsonl"], "run dwakd generate"),
    ],
)
def test_mistakes_of_the_user(folder, monkeypatch, capsys, arguments, expected):
    """Each mistake is answered by one sentence."""
    monkeypatch.chdir(folder)
    code, _, err = run(monkeypatch, capsys, "inspect", *arguments)
    assert (code, expected in one_sentence(err)) == (2, True), err


def test_nothing_is_recorded_outside_a_block():
    """A training must not keep tensors of past steps."""
    with recording() as found:
        for value in itertools.repeat(1, 2):
            record(value=value)
    record(value=3)
    assert found == {"value": [1, 1]}
