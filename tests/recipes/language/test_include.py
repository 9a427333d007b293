"""Recipes that start from others: what lies on top, which files may be named, and masks that come from files."""

import numpy as np
import pytest
from PIL import Image

from probe.errors import LayoutError, RecipeError
from recipes.language import maskvalues, parse
from recipes.language.area import FileMask
from recipes.language.maskvalues import array_of, text_of
from recipes.language.recipe import Recipe
from tests.recipes.line import refused

BASE = """
schema_version: 1
name: base
prompts: {source: a red cat, target: a blue dog}
variables: {word: cat}
sampler: {seed: 3, steps: 10}
edits:
  - {op: skip, layers: 1}
  - {op: bias, amount: 1, prompts: [source], columns: {word: "${word}"}}
"""


@pytest.fixture
def folder(tmp_path):
    """A folder to write recipes in; beside it lies a secret."""
    (tmp_path / "secret.yaml").write_text(BASE)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "base.yaml").write_text(BASE)
    return tmp_path / "in"


def load(folder, text, *overrides):
    (folder / "mine.yaml").write_text(text)
    return parse.load(str(folder / "mine.yaml"), overrides)


def test_mappings_are_merged_and_the_rest_is_replaced(folder):
    text = "include: base.yaml\nname: mine\nsampler: {seed: 5}\nprompts: {target: a green dog}\nedits: [{op: seg}]"
    recipe = load(folder, text)
    base = parse.load(str(folder / "base.yaml"))
    assert recipe.name == "mine"
    assert recipe.sampler == base.sampler.model_copy(update={"seed": 5})
    assert recipe.prompts == {"source": "a red cat", "target": "a green dog"}
    assert [edit.op for edit in recipe.edits] == ["seg"]
    assert recipe.include is None


def test_a_built_in_recipe_can_be_included(folder):
    recipe = load(folder, "include: record\nname: mine")
    assert recipe == parse.load("record").model_copy(update={"name": "mine"})


def test_of_several_the_later_lie_on_top(folder):
    (folder / "fast.yaml").write_text("sampler: {steps: 4}")
    (folder / "slow.yaml").write_text("sampler: {steps: 100}\ndescription: slow")
    recipe = load(folder, "include: [base.yaml, slow.yaml, fast.yaml]")
    assert (recipe.sampler.steps, recipe.sampler.seed, recipe.description) == (4, 3, "slow")


def test_variables_and_settings_reach_what_is_included(folder):
    assert load(folder, "include: base.yaml").edits[1].columns.word == "cat"
    assert load(folder, "include: base.yaml\nvariables: {word: red}").edits[1].columns.word == "red"
    assert load(folder, "include: base.yaml\nvariables: {word: red}", "word=a").edits[1].columns.word == "a"
    assert load(folder, "include: base.yaml", "edits.0.layers=2").edits[0].layers == 2


def test_included_files_may_include_from_their_own_folder(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "one.yaml").write_text("include: two.yaml\nname: one")
    (folder / "deep" / "two.yaml").write_text(BASE)
    assert load(folder, "include: deep/one.yaml").name == "one"


def test_an_error_names_the_file_and_line_it_comes_from(folder):
    (folder / "part.yaml").write_text("sampler:\n  steps: many")
    with pytest.raises(RecipeError, match="^part.yaml, line 2: sampler.steps must be"):
        load(folder, "include: [base.yaml, part.yaml]\nname: mine")


@pytest.mark.parametrize("files", [["mine"], ["mine", "b"], ["mine", "b", "c"]])
def test_a_circle_is_named_in_order(folder, files):
    for name, after in zip(files, [*files[1:], files[0]], strict=True):
        (folder / f"{name}.yaml").write_text(f"include: {after}.yaml")
    way = " includes ".join(f"{name}.yaml" for name in [*files, files[0]])
    with pytest.raises(RecipeError, match=f"must not include itself. Got {way}. Leave"):
        parse.load(str(folder / "mine.yaml"))


def test_a_circle_that_does_not_come_back_to_the_first_is_named_from_where_it_begins(folder):
    (folder / "a.yaml").write_text("include: b.yaml")
    (folder / "b.yaml").write_text("include: a.yaml")
    with pytest.raises(RecipeError, match="Got a.yaml includes b.yaml includes a.yaml. Leave"):
        load(folder, "include: a.yaml")


@pytest.mark.parametrize(
    ("include", "sentence"),
    [
        ("../secret.yaml", "must stay inside of the recipe's folder. Got ../secret.yaml"),
        ("deep/../../secret.yaml", "must stay inside of the recipe's folder"),
        ("deep/../base.yaml", "must stay inside of the recipe's folder. Got deep/../base.yaml"),
        ("/etc/passwd", "must stay inside of the recipe's folder. Got /etc/passwd"),
        ("link.yaml", "must stay inside of the recipe's folder. Got link.yaml"),
        ("linked/secret.yaml", "must stay inside of the recipe's folder. Got linked/secret.yaml"),
        ("bose.yaml", "must lead to a file. Got bose.yaml, .* Did you mean base.yaml?"),
        ("recrod", "Did you mean record?"),
        (".", "must lead to a file"),
        ("5", "include must be a name or a path. Got 5"),
        ("{file: a}", "include must be a name or a path"),
        ("[[a]]", "include must be a name or a path"),
    ],
)
def test_a_path_that_leads_out_or_nowhere_is_refused(folder, include, sentence):
    (folder / "link.yaml").symlink_to(folder.parent / "secret.yaml")
    (folder / "linked").symlink_to(folder.parent)
    with pytest.raises(RecipeError, match=f"^mine.yaml, line 2: .*{sentence}"):
        load(folder, f"name: mine\ninclude: {include}")


def test_a_recipe_may_itself_be_reached_by_a_link(folder, tmp_path):
    (tmp_path / "door").symlink_to(folder)
    (folder / "mine.yaml").write_text("include: base.yaml")
    assert parse.load(str(tmp_path / "door" / "mine.yaml")).name == "base"


def test_in_python_an_include_is_refused(folder):
    with pytest.raises(RecipeError, match="include must be resolved. Got 'record'. Load the recipe from its file"):
        parse.validate({"schema_version": 1, "name": "mine", "prompts": ["a cat"], "include": "record"}, "here")


MASKED = "include: base.yaml\nmasks: {hand: {file: "


def test_a_mask_file_becomes_part_of_the_recipe(folder, rng):
    given = rng.random((3, 4, 5)) > 0.5
    np.savez(folder / "hand.npz", mask=given)
    recipe = load(folder, f"{MASKED}hand.npz}}}}")
    assert np.array_equal(array_of(recipe.masks["hand"]), given)
    (folder / "hand.npz").unlink()
    elsewhere = folder.parent / "copy.yaml"
    elsewhere.write_text(parse.dump(recipe))
    assert parse.load(str(elsewhere)) == recipe


def test_a_picture_is_a_mask_of_one_frame(folder, rng):
    given = rng.random((6, 7)) > 0.5
    Image.fromarray(np.where(given, 255, 0).astype(np.uint8)).save(folder / "hand.png")
    assert np.array_equal(array_of(load(folder, f"{MASKED}hand.png}}}}").masks["hand"]), given[None])


def test_a_mask_lies_beside_the_file_that_names_it(folder):
    (folder / "deep").mkdir()
    np.savez(folder / "deep" / "hand.npz", mask=np.ones((1, 2, 2), bool))
    (folder / "deep" / "masks.yaml").write_text("masks: {hand: {file: hand.npz}}")
    assert array_of(load(folder, "include: [base.yaml, deep/masks.yaml]").masks["hand"]).all()


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("../hand.npz", "must stay inside of the recipe's folder"),
        ("/tmp/hand.npz", "must stay inside of the recipe's folder"),
        ("link.npz", "must stay inside of the recipe's folder"),
        ("none.npz", "must lead to a file. Got none.npz"),
        ("base.yaml", "A mask must be an npz or a png file. Got base.yaml"),
        ("broken.npz", "A mask must be a readable npz file"),
        ("broken.png", "A mask must be a readable png. Got broken.png"),
        ("object.npz", "A mask must be a readable npz file"),
        ("flat.npz", "A mask must be bool, frames x rows x columns"),
        ("wide.png", "A mask must have at most 1,000 pixels. Got 50 x 40"),
        ("huge.npz", "A mask must have at most 1,000 cells. Got 20,"),
    ],
)
def test_a_file_that_is_no_mask_is_refused(folder, monkeypatch, file, sentence):
    np.savez(folder.parent / "hand.npz", mask=np.ones((1, 2, 2), bool))
    (folder / "link.npz").symlink_to(folder.parent / "hand.npz")
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 no zip")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    np.savez(folder / "object.npz", mask=np.array([[[print]]], dtype=object), allow_pickle=True)
    np.savez(folder / "flat.npz", mask=np.ones(4, bool))
    np.savez_compressed(folder / "huge.npz", mask=np.zeros((2, 100, 100), bool))
    Image.new("1", (50, 40)).save(folder / "wide.png")
    monkeypatch.setattr(maskvalues, "MOST_CELLS", 1000)
    with pytest.raises(RecipeError, match=f"^mine.yaml, line 2: .*{sentence}"):
        load(folder, f"{MASKED}{file}}}}}")


def test_masks_become_text_and_back(rng):
    for shape in ((1, 1, 1), (3, 5, 7), (13, 30, 45)):
        mask = rng.random(shape) > 0.5
        assert np.array_equal(array_of(FileMask(values=text_of(mask))), mask)


@pytest.mark.parametrize(
    "values", ["", "3x3", "3x3:AAAA", "1x2x2:no", "0x2x2:eJwDAAAAAAE=", "1x2x2:eJwDAAAAAAE=", "9999x9999x9999:eJwD"]
)
def test_values_that_are_no_mask_are_refused(values):
    with pytest.raises(LayoutError, match="The values of a mask must be as they were written"):
        array_of(FileMask(values=values))


def test_values_that_unpack_to_more_than_they_say_are_refused():
    """A compressed text of a few bytes could stand for gigabytes."""
    text = text_of(np.zeros((200, 256, 256), bool))
    with pytest.raises(LayoutError, match="2 bytes for 4 cells"):
        array_of(FileMask(values="1x2x2:" + text.partition(":")[2]))


def test_a_mask_made_in_python_needs_its_values():
    made = Recipe(schema_version=1, name="mine", prompts=["a cat"], masks={"hand": {"file": "hand.npz"}})
    with pytest.raises(LayoutError, match="must be loaded with its recipe. Got hand.npz"):
        array_of(made.masks["hand"])


def test_the_command_line_says_it_in_one_line(capsys, folder):
    (folder / "mine.yaml").write_text("name: mine\ninclude: ../secret.yaml")
    assert "mine.yaml, line 2" in refused(capsys, ["recipes", "validate", str(folder / "mine.yaml")], 2)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
