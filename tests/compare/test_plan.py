"""Test that each run of a comparison has the right method, options, data and seeds."""

import pytest

from dwakd.compare.plan import Cell, Variant, search_of, sft_row, variants_of
from dwakd.errors import UserError
from dwakd.losses import METHODS
from tests.compare.builders import ROWS, recipe


def rows_of(given=None, *, ablation=False):
    given = given or recipe()
    return {variant.name: variant for variant in variants_of(given, given.compare, ablation=ablation)}


def test_rows_change_the_recipe():
    """A row keeps the options of the recipe's method, unless it changes the method."""
    recipes = {name: row.recipe(recipe()) for name, row in rows_of().items()}
    assert list(recipes) == list(ROWS)
    assert recipes["sft"].loss_options == {}
    assert (recipes["dskd"].method, recipes["dskd"].loss_options) == ("dskd", {"kd_rate": 0.3})
    assert recipes["dwa_kd"].loss_options == {"temperature": 3.0, "dtw_weight": 0.1}
    assert [recipes[name].data.train for name in ("sft", "more data")] == ["train.jsonl", "more.jsonl"]
    assert recipes["more data"].training == {"learning_rate": 2e-3}
    assert recipes["dwa_kd + alm"].content()["loss"] == ROWS["dwa_kd + alm"]["loss"]
    one = Cell(rows_of()["dskd"], 7).recipe(recipe())
    assert (one.training["seed"], one.training["data_seed"], one.compare) == (7, 7, None)


def test_methods_are_rows_of_their_own_and_select_rows():
    """`compare.methods` contains names of rows, or of methods without a row."""
    found = rows_of(recipe(compare={"methods": ["dskd", "uld", "dwa_kd"], "rows": {"dskd": ROWS["dskd"]}}))
    assert {name: row.recipe(recipe()).loss_options for name, row in found.items()} == {
        "dskd": {"kd_rate": 0.3},
        "uld": {},
        "dwa_kd": {"temperature": 3.0},
    }
    every = rows_of(recipe(compare={}))
    assert every.keys() == METHODS.keys() - {"kd"}


def test_a_sum_in_the_recipe_is_kept_and_replaced():
    """A row can replace the recipe's sum by a method, or change one part of the sum."""
    rows = {"alm": {"loss.method": "alm"}, "half": {"loss.2.weight": 0.5}, "sum": {}}
    losses = [{"method": "dwa_kd"}, {"method": "alm"}]
    base = recipe(loss=losses, compare={"rows": rows})
    found = {name: row.recipe(base).content()["loss"] for name, row in rows_of(base).items()}
    assert found == {"alm": {"method": "alm"}, "half": [losses[0], {**losses[1], "weight": 0.5}], "sum": losses}


def test_runs_that_cannot_use_a_cache_have_none():
    """A cache contains no attention, no answers of the student and no stream, so runs that need these do not use it."""
    cached = recipe(teacher={"model": "teacher", "cache": "folder"})
    sra = {
        weights: Variant("sra", {"loss.method": "sra", "loss.span_weights": weights})
        for weights in ("attention", "uniform")
    }
    caches = [Cell(variant, 1).recipe(cached).teachers[0].cache for variant in sra.values()]
    assert caches == [None, "folder"]
    sampled = Variant("on-policy", {"loss.method": "alm", "training.lmbda": 0.5})
    assert Cell(sampled, 1).recipe(cached).teachers[0].cache is None
    streamed = Variant("stream", {"data.streaming": True, "training.max_steps": 2})
    assert Cell(streamed, 1).recipe(cached).teachers[0].cache is None
    half = recipe(teacher={"model": "teacher", "cache_dtype": "bfloat16"})
    assert Cell(sra["attention"], 1).recipe(half).teachers[0].cache_dtype is None


def test_the_default_rows_of_on_policy_training():
    """Methods that cannot train on sampled answers would refuse the whole comparison."""
    loss = {"method": "dwa_kd", "variant": "recommended"}
    given = {share: recipe(loss=loss, compare={}, training={"lmbda": share}) for share in (0.0, 0.5, 1.0)}
    names = {share: rows_of(one).keys() for share, one in given.items()}
    assert names[0.5] == names[0] - {"sft", "min_ed", "dskd"}, "the recipe has the recommended form of dwa_kd"
    assert names[1] == names[0.5] - {"dwa_kd"}


def test_ablation_rows_switch_what_their_names_say():
    """Each row of the ablation turns off what its name says."""
    variants = rows_of(ablation=True)
    rows = {name: variant.recipe(recipe()) for name, variant in variants.items()}
    assert len(rows) == 6
    assert rows["dskd"].method == "dskd"
    assert rows["dwa_kd without gate"].loss_options == {"temperature": 3.0, "gate": False}
    assert rows["dskd + dtw"].loss.band is False
    assert rows["dskd + banded dtw"].loss.dtw_hidden is True
    assert len({Cell(variant, 1).name for variant in variants.values()}) == 6


def test_the_row_to_compare_with_is_sft_on_the_given_data():
    """The baseline is the row `sft`, or else the first row with this method on the recipe's data."""
    variants = list(rows_of().values())
    assert sft_row(variants, recipe()) == "sft"
    assert sft_row(variants[1:], recipe()) is None
    plain = Variant("baseline", {"loss.method": "sft"})
    assert sft_row([*variants[1:], plain], recipe()) == "baseline"


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls.options_type.needs_teacher])
def test_every_method_has_a_share_of_distillation_to_search(method):
    """The search varies a weight of distillation for every method that has one."""
    found = [row.recipe(recipe()).loss_options for row in search_of(Variant(method, {"loss.method": method}), recipe())]
    before = Variant(method, {"loss.method": method}).recipe(recipe()).loss_options
    changed = [options.items() - before.items() for options in found]
    assert len(found) == 6
    (name,) = {name for options in changed for name, _ in options}
    assert len({options[name] for options in found}) == 2


def test_the_search_is_the_same_for_every_row():
    """The search tries the same number of candidates for every row that distils."""
    found = {name: search_of(variant, recipe()) for name, variant in rows_of().items()}
    assert [len(variants) for variants in found.values()] == [3, 6, 6, 3, 6]
    assert {row.recipe(recipe()).loss.kd_rate for row in found["dskd"]} == {0.3, 0.15}
    for name, expected in (("sft", {0.000333, 0.001, 0.003}), ("more data", {0.000667, 0.002, 0.006})):
        rates = {Cell(variant, 1, search=True).recipe(recipe()).training["learning_rate"] for variant in found[name]}
        assert rates == expected
    assert Cell(found["sft"][0], 1, search=True).recipe(recipe()).evaluation.test == []
    sums = [row.recipe(recipe()) for row in found["dwa_kd + alm"]]
    assert {(row.loss.losses[0].kd_weight, row.loss.losses[1].alm_weight) for row in sums} == {(0.1, 100), (0.05, 50)}
    assert {row.data.train for row in sums} == {"more.jsonl"}
    assert len({Cell(row, 1).name for variants in found.values() for row in variants}) == 24


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"methods": ["dwakd"]}, r"unknown method 'dwakd' in compare\.methods; valid ones: sft"),
        ({"rows": {"a": {"loss.method": "dwakd"}}}, r"^compare\.rows\.a: loss\.method must be .*did you mean dwa_kd"),
        ({"rows": {"a": {"loss.method": "dskd", "loss.tau": 1}}}, r"^compare\.rows\.a: unknown option loss\.tau"),
        ({"rows": {"a": {"loss.2.weight": 1}}}, r"^compare\.rows\.a: unknown option loss\.2 of method dwa_kd"),
        ({"rows": {"a": {"loss": [{"method": "uld", "tau": 1}]}}}, r"^compare\.rows\.a: unknown option loss\.1\.tau"),
        ({"rows": {"a": {"data.trains": "x"}}}, r"^compare\.rows\.a: unknown option data\.trains; did you mean train"),
        ({"rows": {"a": {"training.learning_rate": "x"}}}, r"^compare\.rows\.a: training\.learning_rate must be"),
        ({"rows": {"a": {"training": {}}}}, r"^compare\.rows\.a\.training cannot be set"),
        ({"rows": {"a": {"training.seed": 3}}}, r"^compare\.rows\.a\.training\.seed cannot be set"),
        ({"rows": {"a": {"evaluation.seeds": 3}}}, r"^compare\.rows\.a\.evaluation\.seeds cannot be set"),
        ({"rows": {"a": {"data.eval": "x"}}}, r"^compare\.rows\.a\.data\.eval cannot be set"),
        ({"rows": {"a/b": {}}}, r"^compare\.rows\.a/b: a name consists of"),
        ({"rows": {"teacher 2": {}}}, r"^compare\.rows\.teacher 2: a name .* not that of a teacher"),
        ({"rows": {"a b": {}, "a_b": {}}}, "the rows 'a b' and 'a_b' would have the same folder"),
    ],
)
def test_mistakes_show_before_anything_runs(section, message):
    """Invalid rows are reported before the first run starts."""
    with pytest.raises(UserError, match=message):
        rows_of(recipe(compare=section))


def test_rows_with_commas_can_be_selected():
    """The command line separates names by commas, and the demo has the row "dwa_kd, paper"."""
    rows = {"dwa_kd, paper": {"loss.variant": "paper"}, "a, b, c": {}, "b": {}}
    chosen = ["sft", "dwa_kd", "paper", "b", "a", "b", "c"]
    assert list(rows_of(recipe(compare={"rows": rows, "methods": chosen}))) == ["sft", "dwa_kd, paper", "b", "a, b, c"]
    with pytest.raises(UserError, match=r"unknown method 'paper' in .*: 'dwa_kd, paper', 'a, b, c', b, sft"):
        rows_of(recipe(compare={"rows": rows, "methods": ["sft", "paper"]}))


def test_rows_that_are_not_selected_are_validated_too():
    """Rows that `compare.methods` does not select are validated too."""
    with pytest.raises(UserError, match="unknown option"):
        rows_of(recipe(compare={"methods": ["sft"], "rows": {"a": {"loss.tau": 1}}}))


def test_a_row_without_a_teacher_is_named():
    """A comparison of sft alone needs no teacher; a row of another method without one is named."""
    given = recipe(teacher=None)
    assert Cell(rows_of(given)["sft"], 1).recipe(given).teachers == []
    with pytest.raises(UserError, match=r"^compare\.rows\.dskd: method dskd needs a teacher"):
        Cell(rows_of(given)["dskd"], 1).recipe(given)


def test_the_ablation_of_a_recipe_with_a_warmup_of_the_gate():
    """Rows without a gate have no warm-up of it, which they would refuse."""
    loss = {"method": "dwa_kd", "weight_normalisation": "entropy_then_gate", "gate_warmup_steps": 5}
    found = rows_of(recipe(loss=loss), ablation=True)
    steps = {
        name: row.recipe(recipe(loss=loss)).loss.gate_warmup_steps for name, row in found.items() if name != "dskd"
    }
    assert {name for name, value in steps.items() if value} == {"dwa_kd"}
