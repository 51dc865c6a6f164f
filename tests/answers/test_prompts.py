"""Prompts that also occur in a test set."""

import logging

from dwakd.answers.prompts import read_prompts, warn_of_overlap
from dwakd.evaluation.run import plan_evaluation
from tests.answers.builders import LABELLED, PROMPTS, changed, write_rows


def test_prompts_of_a_test_set_are_counted(models, tmp_path, caplog):
    """Training on the prompts of a test set makes its scores too good, even with the teacher's answers."""
    folder, recipe = models
    rows = [{"prompt": f"  {PROMPTS[n].upper()}\n", "response": "x"} for n in (1, 3)]
    test = write_rows(tmp_path / "test.jsonl", [*rows, {"prompt": "Something else?", "response": "x"}])
    both = {"prompts": [*recipe["generate"]["prompts"], str(folder / "labelled.jsonl")]}
    one = changed(recipe, generate=both, data={"eval": str(folder / "labelled.jsonl")}, evaluation={"test": [test]})
    sets = read_prompts(one)
    with caplog.at_level(logging.WARNING, "dwakd"):
        warn_of_overlap(one, sets, plan_evaluation(one))
    assert f"2 of the 46 prompts to answer also occur in {test}" in caplog.text
    assert f"{len(LABELLED)} of the 46 prompts to answer also occur in {folder / 'labelled.jsonl'}" in caplog.text
