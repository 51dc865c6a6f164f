"""Test that a recipe is validated as a whole before data or models are read."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dwakd.compare.plan import variants_of
from dwakd.errors import UserError
from dwakd.losses import METHODS
from dwakd.recipe.files import parse_yaml
from dwakd.recipe.recipe import load_recipe, recipe_from_dict, recipe_schema
from dwakd.recipe.sections import CompareSection
from dwakd.training.run import check_options

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
CONTENT: dict[str, Any] = {
    "student": {"model": "student"},
    "teacher": {"model": "teacher"},
    "data": {"train": "train.jsonl"},
}
EVAL = {"train": "train.jsonl", "eval": "valid.jsonl"}


def recipe(command="train", **sections):
    return recipe_from_dict({**CONTENT, **sections}, command)


def test_absent_sections_have_defaults():
    """An empty section, which is None in YAML, has the defaults."""
    read = recipe(loss=None, training=None, evaluation=None)
    assert (read.method, read.loss_options, read.training) == ("dwa_kd", {}, {})
    assert read == recipe(loss={}) == recipe(loss={"method": "dwa_kd"})
    assert read.evaluation.seeds == 5
    assert [teacher.model for teacher in read.teachers] == ["teacher"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository(path):
    """Every recipe of the repository is valid, for transformers too, and can be saved and read again."""
    read = load_recipe(path, ["training.bf16=false", "training.use_cpu=true"])
    check_options(read, "unused")
    variants_of(read, read.compare or CompareSection(methods=[read.method]), ablation=False)
    assert recipe_from_dict(parse_yaml(read.dump())) == read


def test_the_dump_contains_only_the_loss_options_that_were_given():
    """A saved recipe contains only the loss options that were given, because `variant` changes the defaults of others."""
    options = {"method": "uld", "variant": "dskd"}
    one, several = recipe(loss=options), recipe(loss=[{"method": "alm", "weight": 2.0}, options])
    assert (one.loss.uld_weight, several.loss.losses[1].uld_weight) == (0.5, 0.5)
    for read in (one, several):
        assert parse_yaml(read.dump())["loss"] == read.content()["loss"]
        assert recipe_from_dict(parse_yaml(read.dump())) == read
    assert one.content()["loss"] == options
    assert several.content()["loss"] == [{"method": "alm", "weight": 2.0}, options]
    assert several == recipe(loss={"method": "sum", "losses": several.content()["loss"]})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lose": {"method": "sft"}}, "unknown option lose; did you mean loss"),
        ({"learning_rate": 1}, r"^learning_rate is not a section of a recipe: use training\.learning_rate$"),
        ({"max_length": 1}, r"^max_length is not a section of a recipe: use data\.max_length$"),
        ({"data": 3}, "data must be a section with options, got 3"),
        ({"data": {}}, r"data\.train is missing"),
        ({"student": None}, "student is missing"),
        ({"loss": "uld"}, "loss must be a section with options.*, got 'uld'; write loss: {method: uld}"),
        ({"teacher": "T"}, "teacher must be .*, got 'T'; write teacher: {model: T}"),
        ({"loss": {"method": "dwakd"}}, r"loss\.method must be one of 'sft', .*did you mean dwa_kd"),
        ({"loss": {"method": 3}}, r"loss\.method must be one of 'sft'"),
        ({"loss": {"method": "sft", 1: 2}}, r"unknown option loss\.1 of method sft;"),
        (
            {"loss": {"temperatures": 2}},
            r"unknown option loss\.temperatures of method dwa_kd; did you mean temperature",
        ),
        ({"loss": {"method:kd": None}}, r"^unknown option loss\.method:kd of method dwa_kd"),
        ({"loss": {"temperature": -1}}, r"^loss\.temperature must be at least 0\.001, got -1"),
        ({"loss": {"gate": 5}}, r"^loss\.gate must be true or false, got 5"),
        ({"loss": {"impl": "cup"}}, r"^loss\.impl must be 'auto', 'naive', .* got 'cup'; did you mean cpu"),
        ({"loss": {"gate_warmup_steps": 3}}, "^loss: gate_warmup_steps requires weight_normalisation"),
        ({"teacher": 3}, "teacher must be a section with options or a list, got 3"),
        ({"teacher": {"model": "x", "weight": 0}}, r"^teacher\.weight must be at least"),
        ({"teacher": [{"model": "x"}, {"model": "y", "share": 1}]}, r"unknown option teacher\.2\.share"),
        ({"teacher": [{"model": "x"}, {"weight": 1}]}, r"^teacher\.2\.model is missing"),
        ({"teacher": None}, "method dwa_kd needs a teacher: add a teacher section"),
        ({"teacher": {"model": "x", "cache_dtype": "bfloat16"}}, r"cache_dtype requires teacher\.cache"),
        (
            {"teacher": {"model": "x", "cache": "c"}, "loss": {"method": "sra"}},
            r"method sra reads the teacher's attention.*loss\.span_weights=uniform",
        ),
        (
            {"teacher": {"model": "x", "cache": "c"}, "loss": [{"method": "alm"}, {"method": "sra"}]},
            r"method sra reads the teacher's attention.*loss\.2\.span_weights=uniform",
        ),
        ({"loss": [{"method": "alm"}, {"temperature": 1}]}, r"^loss\.2\.method is missing"),
        (
            {"loss": [{"method": "alm"}, {"method": "uld", "temperature": -1}]},
            r"^loss\.2\.temperature must be at least",
        ),
        ({"loss": [{"method": "alm"}, {"method": "dwakd"}]}, r"^loss\.2\.method must be .*did you mean dwa_kd"),
        ({"loss": [{"method": "alm"}, {"method": "alm"}]}, "^loss: each method .* alm is given twice"),
        ({"training": {"eval_strategy": "steps"}}, r"training\.eval_strategy .*set data\.eval"),
        ({"training": {"metric_for_best_model": "ce"}}, r"training\.metric_for_best_model .*set data\.eval"),
        ({"compare": {"seeds": [1, -1]}}, r"compare\.seeds\.2 must be at least 0, got -1"),
        ({"training": {"save_strategy": "best"}}, r"training\.save_strategy=best .*set data\.eval"),
        ({"data": EVAL, "training": {"metric_for_best_model": "foo"}}, "metric_for_best_model foo .*bits_per_byte"),
        ({"data": EVAL, "training": {"metric_for_best_model": "rouge_l"}}, r"requires training\.eval_rouge_l=true"),
    ],
)
def test_mistakes_are_named(sections, message):
    """Invalid recipes are refused with a message that names the option."""
    with pytest.raises(UserError, match=message):
        recipe(**sections)


def test_what_only_other_commands_can_use():
    """Some options are allowed for `dwakd compare` or `dwakd cache` only."""
    sections = {"loss": {"method": "sra"}, "teacher": {"model": "x", "cache": "c"}, "compare": {"methods": ["uld"]}}
    for command in ("cache", "compare"):
        assert recipe(command, **sections).method == "sra"
    with pytest.raises(UserError, match="attention"):
        recipe(**sections)
    with pytest.raises(UserError, match="attention"):
        recipe("compare", **sections).replace(compare=None)
    recipe("cache", teacher={"model": "x", "cache_dtype": "bfloat16"})
    assert recipe("compare", teacher=None, compare={"methods": ["sft"]}).teachers == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_match_the_schema(path):
    """The JSON Schema accepts every recipe of the repository."""
    jsonschema = pytest.importorskip("jsonschema")
    content = parse_yaml(path.read_text(encoding="utf-8"))
    for valid in (content, parse_yaml(load_recipe(path).dump())):
        jsonschema.Draft202012Validator(recipe_schema()).validate(valid)


def test_the_schema_describes_every_option():
    """The JSON Schema contains a description of every option, which editors show."""
    schema = recipe_schema()
    sections = [*schema["$defs"].values(), schema["properties"]["training"], schema]
    undescribed = {n for section in sections for n, item in section["properties"].items() if "description" not in item}
    assert undescribed <= {"method"}
    single, several = schema["properties"]["loss"]["anyOf"]
    for methods, optional in (
        (single["discriminator"]["mapping"], {"dwa_kd"}),
        (several["items"]["discriminator"]["mapping"], {"sum"}),  # in a list, each item names its method
    ):
        assert methods.keys() | {"sum"} == {*METHODS, "sum"}
        required = {name for name, place in methods.items() if "required" in schema["$defs"][place.split("/")[-1]]}
        assert required == methods.keys() - optional
    assert "weight" in schema["$defs"]["AlmPart"]["properties"]
    assert "weight" not in schema["$defs"]["AlmOptions"]["properties"]


def test_an_override_of_the_method_names_how_to_replace_the_section(tmp_path):
    """The options of the recipe's own method remain, and another method may not have them."""
    content = {**CONTENT, "loss": {"method": "dwa_kd", "variant": "recommended"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"unknown option loss\.variant of method sft; .*write 'loss={method: sft}'"):
        load_recipe(tmp_path / "recipe.yaml", ["training.max_steps=1", "loss.method=sft"])
    assert load_recipe(tmp_path / "recipe.yaml", ["loss={method: sft}"]).method == "sft"
    with pytest.raises(UserError, match=r"of method dwa_kd; [^']*$"):
        load_recipe(tmp_path / "recipe.yaml", ["loss.tau=1"])
