"""The language of recipes: what every form means, that it survives YAML, and what its mistakes are called."""

import json
from functools import partial

import pytest
import yaml

from probe.errors import RecipeError, UsageError
from recipes.cli import main
from recipes.language import parse
from recipes.language.area import Words, within
from recipes.language.guide import Guide
from recipes.language.meaning import needs
from recipes.language.operator import BUILT_IN, Bias, Edited, Fork, Transfer
from recipes.language.recipe import Recipe
from recipes.language.span import Every, Last, Progress, Ramp, chosen
from tests.recipes import written
from tests.recipes.line import refused
from tests.recipes.written import TOP, loaded


@pytest.fixture
def load(tmp_path):
    return partial(loaded, tmp_path)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, range(10)),
        (3, [3]),
        ([2, 5], [2, 3, 4]),
        ({"only": [7, 1]}, [1, 7]),
        ({"progress": [0, 0.3]}, [0, 1, 2]),
        ({"progress": [0.25, 1]}, range(3, 10)),
        ({"first": 2}, [0, 1]),
        ({"last": 2}, [8, 9]),
        ({"every": 4}, [0, 4, 8]),
        ({"every": 4, "from": 3}, [3, 7]),
    ],
)
def test_a_span_chooses(load, written, expected):
    edit = load(f"edits: [{{op: skip, layers: {json.dumps(written)}}}]").edits[0]
    assert chosen(edit.layers, 10, "edits.0.layers", "layers") == tuple(expected)


@pytest.mark.parametrize("span", [10, (9, 11), Last(last=11), Every(every=1, start=10)])
def test_a_span_past_the_end_is_refused(span):
    with pytest.raises(UsageError, match=r"edits.0.layers must lie within \[0, 10\), the layers of this run. Got "):
        chosen(span, 10, "edits.0.layers", "layers")


def test_a_span_that_chooses_nothing_is_refused():
    with pytest.raises(UsageError, match="must choose some of the 10 steps of this run"):
        chosen(Progress(progress=(0.31, 0.39)), 10, "edits.0.steps", "steps")


def test_prompts_have_names_in_order(load):
    recipe = load("output: {show: [source, target]}")
    assert recipe.prompt_names == ("source", "target")
    assert recipe.texts == ("a red cat", "a blue dog")
    assert recipe.shown == (0, 1)
    plain = load("", top="schema_version: 1\nname: mine\nprompts: [a cat, a dog]\n")
    assert plain.prompt_names == ("0", "1")
    assert plain.shown == (1,)
    assert plain.prompt_index("1") == 1


def test_python_and_yaml_build_the_same_recipe(load):
    made = Recipe(
        schema_version=1,
        name="mine",
        prompts={"source": "a red cat", "target": "a blue dog"},
        masks={"hole": {"box": [0, 0, 2, 2]}},
        edits=[
            Transfer(tensors="qkv", source="source", prompts=["target"], gate={"not": "hole"}, steps=(0, 5)),
            Bias(amount=float("-inf"), columns=Words(word="cat"), prompts=["source"], strength=Ramp(first=0, last=1)),
            Fork(variant=Edited(edited=[Bias(amount=1.0)]), layers=Last(last=2)),
        ],
        guides=[Guide(weight=2.0, perturb=[{"op": "identity", "layers": {"every": 2, "from": 1}}])],
    )
    written = load(
        """
masks: {hole: {box: [0, 0, 2, 2]}}
edits:
  - {op: transfer, tensors: qkv, source: source, prompts: [target], gate: {not: hole}, steps: [0, 5]}
  - {op: bias, amount: -.inf, columns: {word: cat}, prompts: [source], strength: {from: 0, to: 1}}
  - {op: fork, variant: {edited: [{op: bias, amount: 1}]}, layers: {last: 2}}
guides:
  - {weight: 2, perturb: [{op: identity, layers: {every: 2, from: 1}}]}
"""
    )
    assert written == made
    assert load(parse.dump(made), top="") == made


@pytest.mark.parametrize("seed", range(written.SEEDS))
def test_a_random_recipe_survives_yaml(load, seed):
    made = Recipe.model_validate(written.some_recipe(seed))
    assert load(parse.dump(made), top="") == made


def test_the_random_recipes_use_every_operator():
    used = {edit["op"] for seed in range(written.SEEDS) for edit in written.some_recipe(seed)["edits"]}
    assert used == set(BUILT_IN) == set(written.KEYS)


@pytest.mark.parametrize("name", parse.names())
def test_a_shipped_recipe_survives_yaml(load, name):
    recipe = parse.load(name)
    assert load(parse.dump(recipe), top="") == recipe


def test_parts_of_an_area_are_found(load):
    area = load("edits: [{op: skip, rows: {any: [{not: video}, {all: [text]}]}}]").edits[0].rows
    assert [part for part in within(area) if isinstance(part, str)] == ["video", "text"]


def test_a_list_of_prompts_or_prompts_by_name_replace_each_other(load):
    assert load("", "prompts=[a cat]").prompt_names == ("0",)
    assert load("", "prompts.target=a cat").texts == ("a red cat", "a cat")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("sampler: {seed: 4, steps: 20}", ()),
        ("sampler: {noise: each}", ()),
        ("sampler: {scheduler: ddim}", ("loop",)),
        ("latents: [{op: nudge}]", ("loop",)),
        ("guides: [{weight: 1, perturb: [{op: rotate, drop: true}]}]", ("loop", "RoPE")),
        ("edits: [{op: transfer, source: '0', mapping: {move: [0, 1, 0]}, positions: target}]", ("RoPE",)),
        ("edits: [{op: transfer, source: {itself: true}, mapping: {move: [0, 1, 0]}}]", ()),
    ],
)
def test_a_recipe_tells_what_it_needs_of_a_model(load, text, expected):
    one = "schema_version: 1\nname: mine\nprompts: [a cat]\n"
    assert needs(load(text, top=one)) == expected
    assert needs(load(text.replace("'0'", "source"))) == (*expected, "two prompts")


def test_the_schema_describes_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["recipes", "schema"])
    schema = json.loads(capsys.readouterr().out)
    parts = {**schema["$defs"], "Recipe": schema}
    assert {operator.__name__ for operator in BUILT_IN.values()} <= set(parts)
    fields = [
        (f"{of}.{name}", field) for of, part in parts.items() for name, field in part.get("properties", {}).items()
    ]
    bare = [name for name, field in fields if not {"description", "const", "$ref"} & set(field)]
    assert bare == []


def test_many_files_are_validated_and_the_wrong_one_is_named(capsys, tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(TOP)
    bad.write_text(f"{TOP}edits: [5]")
    assert "bad.yaml, line 4: edits.0 must be" in refused(capsys, ["recipes", "validate", str(good), str(bad)], 2)


def test_plain_data_is_validated_without_lines():
    with pytest.raises(RecipeError, match="^here: edits.0.amount must be given"):
        parse.validate(yaml.safe_load(TOP) | {"edits": [{"op": "bias"}]}, "here")
