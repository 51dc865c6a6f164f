"""Test that each run of a comparison has the right method, options and seeds."""

import pytest

from dwakd.compare.plan import Cell, Variant, search_of, variants_of
from dwakd.errors import UserError
from dwakd.losses import METHODS
from tests.compare.builders import recipe


def test_each_method_gets_its_own_options():
    """Options of the section `loss` apply only to the method of the recipe."""
    found = {variant.name: variant for variant in variants_of(recipe(), recipe().compare, ablation=False)}
    assert found["dwa_kd"].options == {"temperature": 3.0}
    assert found["dskd"].options == {"kd_rate": 0.3}
    assert found["sft"].options == {}
    one = Cell(found["dskd"], 7).recipe(recipe())
    assert (one.method, one.loss_options) == ("dskd", {"kd_rate": 0.3})
    assert (one.training["seed"], one.training["data_seed"], one.compare) == (7, 7, None)


def test_options_of_the_comparison_stand_above_the_loss_section():
    """An option in the section `compare` overrides the same option in `loss` and leaves the others unchanged."""
    changed = recipe(compare={"methods": ["dwa_kd"], "options": {"dwa_kd": {"dtw_weight": 0.1}}})
    (variant,) = variants_of(changed, changed.compare, ablation=False)
    assert variant.options == {"temperature": 3.0, "dtw_weight": 0.1}


def test_a_run_that_reads_attention_has_no_cache():
    """Runs of methods that read attention do not use the cache, which contains no attention."""
    cached = recipe(teacher={"model": "teacher", "cache": "folder"})
    caches = [
        Cell(Variant("sra", "sra", {"span_weights": weights}), 1).recipe(cached).teachers[0].cache
        for weights in ("attention", "uniform")
    ]
    assert caches == [None, "folder"]
    half = recipe(teacher={"model": "teacher", "cache_dtype": "bfloat16"})
    assert Cell(Variant("sra", "sra", {}), 1).recipe(half).teachers[0].cache_dtype is None


def test_ablation_rows_switch_what_their_names_say():
    """Each row of the ablation turns off what its name says."""
    rows = {variant.name: variant for variant in variants_of(recipe(), recipe().compare, ablation=True)}
    assert len(rows) == 6
    assert rows["dwa_kd without gate"].options == {"temperature": 3.0, "gate": False}
    assert rows["dskd + dtw"].options["band"] is False
    assert "dtw_hidden" not in rows["dskd + banded dtw"].options
    assert len({Cell(variant, 1).name for variant in rows.values()}) == 6


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls.options_type.needs_teacher])
def test_every_method_has_a_share_of_distillation_to_search(method):
    """The search varies a weight of distillation for every method that has one."""
    options = [variant.options for variant in search_of(Variant(method, method, {}))]
    assert len(options) == 6
    (name,) = {name for option in options for name in option}
    assert len({option[name] for option in options}) == 2


def test_the_search_is_the_same_for_every_method():
    """The search tries the same number of candidates for every method."""
    sft, dskd, dwa_kd = (search_of(variant) for variant in variants_of(recipe(), recipe().compare, ablation=False))
    assert (len(sft), len(dskd), len(dwa_kd)) == (3, 6, 6)
    assert {variant.options["kd_rate"] for variant in dskd} == {0.3, 0.15}
    rates = {Cell(variant, 1, search=True).recipe(recipe()).training["learning_rate"] for variant in sft}
    assert rates == {0.000333, 0.001, 0.003}
    assert Cell(sft[0], 1, search=True).recipe(recipe()).evaluation.test == []


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"methods": ["dwakd"]}, r"unknown method 'dwakd' in compare\.methods; valid ones"),
        ({"methods": ["sft"], "options": {"dskd": {}}}, r"compare\.options names dskd"),
        ({"methods": ["dskd"], "options": {"dskd": {"tau": 1}}}, r"unknown option compare\.options\.dskd\.tau"),
        (
            {"methods": ["dskd"], "options": {"dskd": {"kd_rate": "a"}}},
            r"compare\.options\.dskd\.kd_rate must be a number",
        ),
        ({"methods": ["dskd"], "options": {"dskd": 3}}, r"compare\.options\.dskd must be a section with options"),
    ],
)
def test_mistakes_show_before_anything_runs(section, message):
    """Invalid options are reported before the first run starts."""
    with pytest.raises(UserError, match=message):
        variants_of(recipe(compare=section), recipe(compare=section).compare, ablation=False)


def test_the_ablation_reads_all_options():
    """Options of methods that are not in the ablation are accepted but validated."""
    section = {"methods": ["alm", "dwa_kd"], "options": {"alm": {}, "dskd": {"kd_rate": 0.3}}}
    changed = recipe(compare=section)
    rows = {variant.name: variant for variant in variants_of(changed, changed.compare, ablation=True)}
    assert rows["dskd"].options == {"kd_rate": 0.3}
    changed = recipe(compare={**section, "options": {"alm": {"tau": 1}}})
    with pytest.raises(UserError, match="unknown option"):
        variants_of(changed, changed.compare, ablation=True)
