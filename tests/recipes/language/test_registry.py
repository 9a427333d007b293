"""Operators and recipes of other packages: found without loading, used when named, and never in the way."""

import json
import sys

import pytest

from probe.errors import RecipeError
from recipes.language import include, parse, registry
from tests.recipes.line import main_ok, refused

BLUR = """
from typing import Literal
from recipes.language.area import Area
from recipes.language.operation import Operation
from recipes.language.registry import Operator

class Blur(Operation):
    op: Literal["blur"] = "blur"
    sigma: float
    columns: Area | None = None

OPERATOR = Operator("blur", Blur, lambda spec, context: [spec.sigma, context])
"""
RECIPE = """
schema_version: 1
name: mine
prompts: [a red cat]
edits:
  - op: blur
    sigma: 2
    columns: {word: cat}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a distribution with a module of the given source and the given entry points."""

    def install(name, entries, source="", recipes=()):
        folder = tmp_path / name
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(entries))
        (folder / f"{name}_code").mkdir()
        (folder / f"{name}_code" / "__init__.py").write_text(source)
        for file, text in recipes:
            (folder / f"{name}_code" / f"{file}.yaml").write_text(text)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, f"{name}_code", raising=False)

    return install


def test_an_operator_of_a_package_is_validated_by_its_own_model(package, tmp_path):
    package("lab", ["[mmdit.operators]", "blur = lab_code:OPERATOR"], BLUR)
    recipe = parse.load(_file(tmp_path, RECIPE))
    assert type(recipe.edits[0]).__name__ == "Blur"
    assert recipe.edits[0].sigma == 2
    assert registry.operator("blur").build(recipe.edits[0], "context") == [2.0, "context"]
    assert parse.load(_file(tmp_path, parse.dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ("sigma: 2\n    columns: {word: dog}", "line 7: edits.0.columns must have words of prompt 0. Got 'dog'"),
        ("sigma: 2\n    columns: dog", "line 7: edits.0.columns must name an area or a mask. Got 'dog'"),
        ("sigma: wide", "line 6: edits.0.sigma must be a valid number"),
        ("sigma: 2\n    stepz: 1", "line 7: every key must be known. Got edits.0.stepz. Did you mean steps?"),
        ("sigma: 2\n    sigmoid: 1", "line 7: every key must be known. Got edits.0.sigmoid. Did you mean sigma?"),
    ],
)
def test_its_mistakes_get_the_same_sentences(package, tmp_path, edit, sentence):
    package("lab", ["[mmdit.operators]", "blur = lab_code:OPERATOR"], BLUR)
    text = f"schema_version: 1\nname: mine\nprompts: [a red cat]\nedits:\n  - op: blur\n    {edit}\n"
    with pytest.raises(RecipeError, match=sentence):
        parse.load(_file(tmp_path, text))


def test_an_unknown_operator_names_the_nearest_of_any_package(package, tmp_path):
    package("lab", ["[mmdit.operators]", "blur = lab_code:OPERATOR"], "1 / 0")
    with pytest.raises(RecipeError, match="edits.0.op must name a known operator. Got 'blurr'. Did you mean blur?"):
        parse.load(_file(tmp_path, RECIPE.replace("op: blur", "op: blurr")))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("1 / 0", "entry point blur of lab must load. Got ZeroDivisionError"),
        ("import no_such_library", "entry point blur of lab must load. Got ModuleNotFoundError"),
        ("raise SystemExit(3)", "entry point blur of lab must load. Got SystemExit"),
        ("OPERATOR = 5", "must be a recipes.language.registry.Operator. Got int"),
        (BLUR.replace('Operator("blur"', 'Operator("blot"'), "must have this name"),
        (BLUR.replace("class Blur(Operation)", "class Blur(BaseModel)"), "must have a model that is an Operation"),
    ],
)
def test_a_broken_operator_is_a_sentence_where_it_is_used_and_nowhere_else(package, tmp_path, capsys, source, sentence):
    package("lab", ["[mmdit.operators]", "blur = lab_code:OPERATOR"], f"from pydantic import BaseModel\n{source}")
    said = refused(capsys, ["recipes", "validate", _file(tmp_path, RECIPE)], 2)
    assert sentence in said
    assert "mine.yaml, line 6" in said
    main_ok(["recipes", "validate", "record"])
    main_ok(["recipes", "list"])


def test_two_packages_with_one_operator_are_refused(package, tmp_path):
    package("lab", ["[mmdit.operators]", "blur = lab_code:OPERATOR"], BLUR)
    package("den", ["[mmdit.operators]", "blur = den_code:OPERATOR"], BLUR)
    with pytest.raises(RecipeError, match="must come from one package. Got blur from den and lab"):
        parse.load(_file(tmp_path, RECIPE))


def test_a_built_in_operator_cannot_be_replaced(package, tmp_path):
    package("lab", ["[mmdit.operators]", "bias = lab_code:OPERATOR"], BLUR.replace("blur", "bias"))
    text = "schema_version: 1\nname: mine\nprompts: [a cat]\nedits:\n- {op: bias, amount: 1}\n"
    assert type(parse.load(_file(tmp_path, text)).edits[0]).__module__ == "recipes.language.operator_weight"


def test_recipes_of_packages_are_listed_with_their_distribution_and_run_by_name(package, capsys):
    mine = "schema_version: 1\nname: mine\nsource: a paper\nprompts: [a cat]\n"
    package("lab", ["[mmdit.recipes]", "all = lab_code"], recipes=[("mine", mine), ("record", mine)])
    main_ok(["recipes", "list", "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["from"] for row in rows if row["source"] == "a paper"} == {"mine": "lab", "record": "lab"}
    assert parse.load("mine").source == "a paper"
    assert parse.load("record").source != "a paper"  # the built-in one
    main_ok(["recipes", "show", "mine"])
    assert capsys.readouterr().out.rstrip() == mine.rstrip()


def test_a_path_can_be_a_folder_of_recipes(package, tmp_path):
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "mine.yaml").write_text("schema_version: 1\nname: mine\nprompts: [a cat]\n")
    package("lab", ["[mmdit.recipes]", "all = lab_code:FOLDER"], f"FOLDER = {str(tmp_path / 'shelf')!r}")
    assert include.find("mine") == tmp_path / "shelf" / "mine.yaml"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("1 / 0", "entry point all of lab must load. Got ZeroDivisionError"),
        ("FOLDER = 5", "must be a folder of recipes, or a package. Got int"),
        ("FOLDER = '/nowhere/at/all'", "must be a folder of recipes, or a package. Got /nowhere/at/all"),
    ],
)
def test_a_broken_folder_of_recipes_leaves_the_others(package, capsys, source, sentence):
    package("lab", ["[mmdit.recipes]", "all = lab_code:FOLDER"], source)
    main_ok(["recipes", "list", "--format", "json"])
    said = capsys.readouterr()
    assert {"record", "ditctrl"} <= {row["name"] for row in json.loads(said.out)}
    assert sentence in said.err
    assert parse.load("record").name == "record"
    with pytest.raises(RecipeError, match="Did you mean record?"):
        parse.load("recrod")


def test_a_broken_recipe_of_a_package_leaves_the_others(package, capsys):
    package("lab", ["[mmdit.recipes]", "all = lab_code"], recipes=[("bad", "a: [1")])
    main_ok(["recipes", "list", "--format", "json"])
    said = capsys.readouterr()
    assert "bad" not in {row["name"] for row in json.loads(said.out)}
    assert "bad.yaml, line 1: a recipe must be readable YAML" in said.err


def _file(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)
