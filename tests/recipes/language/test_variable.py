"""Variables and settings: what ${name} and --set key=value stand for."""

from functools import partial

import pytest
from pydantic import ValidationError

from probe.errors import RecipeError
from recipes.language.recipe import Recipe
from tests.recipes.written import loaded


@pytest.fixture
def load(tmp_path):
    return partial(loaded, tmp_path)


VARIABLES = """variables: {word: cat, many: [a, cat], n: 3, seed: 5}
description: "a ${word}, ${n} times, not $${word}"
record: {words: "${many}"}
edits: [{op: bias, amount: "${n}", prompts: [source], columns: {word: "${word}"}}]
"""


def test_variables_keep_their_type_as_a_whole_value_and_are_text_inside_of_one(load):
    recipe = load(VARIABLES)
    assert recipe.description == "a cat, 3 times, not ${word}"
    assert recipe.record.words == ["a", "cat"]
    assert recipe.edits[0].amount == 3
    assert recipe.variables["many"] == ["a", "cat"]


def test_variables_are_set_from_the_command_line(load):
    assert load(VARIABLES, "word=red").edits[0].columns.word == "red"
    assert load(VARIABLES, "variables.word=red cat").edits[0].columns.word == "red cat"
    assert load(VARIABLES, "variables.seed=7").variables["seed"] == 7
    assert load(VARIABLES, "sampler.seed=7").sampler.seed == 7


@pytest.mark.parametrize(
    ("text", "override", "sentence"),
    [
        (VARIABLES, "seed=7", "must name one place. Got seed, which is sampler.seed or variables.seed"),
        (VARIABLES, "variables.wrod=red", "must name a variable of the recipe. Got wrod. Did you mean word?"),
        (VARIABLES, "wrod=red", "must name a key of the recipe. Got wrod. Did you mean word?"),
        (VARIABLES, "n=many", "line 7: edits.0.amount must be a valid number"),
        (VARIABLES, "edits.0.amont=2", "--set edits.0.amont: every key must be known"),
        (VARIABLES, "n=!!python/name:os.system", "--set n, line 1: a recipe must be plain YAML without tags"),
        ('variables: {word: cat}\ndescription: "${wrod}"', "n=1", "Got n"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(load, text, override, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load(text, override)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            'variables: {word: cat}\ndescription: "${wrod}"',
            r"line 5: a variable must be given. Got \$\{wrod\}. Did you mea",
        ),
        ('description: "${word}"', "Add it under variables"),
        ('variables: {a: "${b}", b: 1}', r"line 4: a variable must not refer to another. Got a: \$\{b\}"),
        ('variables: {a: [1]}\ndescription: "no ${a}"', "a variable inside a text must be a text or a number"),
        ("edits: [{op: bias, amount: ${n}}]", "readable YAML. .* in quotes inside of"),
    ],
)
def test_a_wrong_variable_gets_one_sentence(load, text, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load(text)


def test_in_python_variables_are_values_alone():
    with pytest.raises(ValidationError, match="variables.a must not refer to another variable. Got .*{b}"):
        Recipe(schema_version=1, name="mine", prompts=["a cat"], variables={"a": ["${b}"]})
