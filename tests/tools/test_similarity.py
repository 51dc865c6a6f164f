"""Test that representation similarity averages hidden states over the same text on both sides."""

import json
import shutil

import pytest
import torch

from dwakd.data.encoding import TextEncoder
from dwakd.data.sources import load_examples
from dwakd.errors import UserError
from dwakd.recipe.files import RECIPE_FILE
from dwakd.tools.similarity import box_plot, cosine_structure, product_structure, structure_distances
from tests.builders import bpe_byte_fallback, byte_bpe, tiny_model
from tests.command_line import one_sentence, run

ROWS = [
    {"prompt": f"Name {word}.", "response": f"The {word} is é😀 and {word}"} for word in ("door", "cat", "sky", "sea")
]


def side(family, tokenizer, seed):
    return tiny_model(family, len(tokenizer), seed=seed), TextEncoder(tokenizer, "plain")


def test_equal_models_have_no_distance_and_others_have():
    """Equal models have distance 0, and different models a positive distance."""
    examples = load_examples(ROWS)
    one, same, other = (side("llama", byte_bpe(), seed) for seed in (1, 1, 2))
    equal = structure_distances(one, same, examples)
    assert max(*equal.cosine, *equal.product) < 1e-9
    assert len(equal.cosine) == len(ROWS)
    assert min(structure_distances(one, other, examples).cosine) > 1e-3


def test_spans_are_those_both_tokenisations_share_and_other_texts_change_nothing():
    """Spans are those that both tokenisations share, and the distances of a text do not depend on the other texts."""
    examples = load_examples(ROWS)
    student, teacher = side("llama", byte_bpe(), 1), side("gpt2", bpe_byte_fallback(), 2)
    whole, single = (structure_distances(student, teacher, rows) for rows in (examples, examples[2:3]))
    assert (whole.num_spans[2], whole.cosine[2]) == (single.num_spans[0], single.cosine[0])
    for example, count in zip(examples, whole.num_spans, strict=True):
        shared = [set(encoder.response_ids(example.response)[1]) for _, encoder in (student, teacher)]
        assert count == len(shared[0] & shared[1]) + 1  # the end tokens form one more span


def test_rows_without_room_are_those_of_the_file():
    """If no row has room for a response, the message names the file and an option of `dwakd similarity`."""
    sides = [side("llama", byte_bpe(), seed) for seed in (1, 2)]
    with pytest.raises(UserError, match=r"test\.jsonl: none of its 4 rows can be used .*; raise --max-length"):
        structure_distances(*sides, load_examples(ROWS), max_length=3, source="test.jsonl")


def test_matrices():
    """M_cos does not depend on the norms, and each row of M_prod sums to 1."""
    hidden = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(cosine_structure(hidden), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    torch.testing.assert_close(product_structure(hidden), torch.tensor([[25 / 33, 8 / 33], [8 / 12, 4 / 12]]))


def test_box_plot():
    """The quartiles are drawn at the right places of the scale."""
    assert box_plot((0.0, 0.2, 0.5, 0.7, 1.0), 1.0, 11) == "──▒▒▒█▒▒───"


def test_the_template_is_that_of_the_student(workspace, tmp_path, monkeypatch, capsys):
    """A student reads prompts as in its training; two students that were trained differently are not comparable."""
    options = [
        "--teacher",
        workspace / "teacher",
        "--data",
        workspace / "data.jsonl",
        "--output",
        tmp_path / "found.json",
    ]
    assert run(monkeypatch, capsys, "train", workspace / "recipe.yaml", "-o", tmp_path / "run")[0] == 0
    (tmp_path / "run[b]").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(monkeypatch, capsys, "similarity", "run[b]", *options)
    assert code == 0
    assert "run[b]" in out, "no markup"
    assert "difference of cosines between spans (M_cos)" in out
    assert json.loads((tmp_path / "found.json").read_text())["signature"]["template"] == "plain"
    code, out, _ = run(monkeypatch, capsys, "similarity", workspace / "student", tmp_path / "run", *options)
    assert code == 0, "a student without a recipe is read like the others"
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    saved = (tmp_path / "other" / RECIPE_FILE).read_text()
    (tmp_path / "other" / RECIPE_FILE).write_text(saved.replace("template: plain", "template: alpaca"))
    both = tmp_path / "run", tmp_path / "other"
    code, _, err = run(monkeypatch, capsys, "similarity", *both, *options)
    assert code == 2
    assert "the recipes of the students differ in data.template: choose one with --template" in one_sentence(err)
    assert run(monkeypatch, capsys, "similarity", *both, *options, "--template=plain")[0] == 0
