"""Recipes from strangers: nothing in them is executed, and nothing makes them grow."""

import time

import pytest

from probe.errors import RecipeError
from recipes.language import parse, parse_tree
from recipes.language.parse_tree import MOST_BYTES, MOST_DEPTH, Origin, Tree, read
from tests.recipes.line import refused

TOP = "schema_version: 1\nname: mine\nprompts: [a cat]\n"


def tree(text):
    return read(text, Origin("mine.yaml")).plain


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system [touch hacked]",
        "a: !!python/name:os.system",
        "!!python/object/new:os.system [touch hacked]",
        "a: !mine 5",
        "a: !!str 5",
        "a: !!binary aGVsbG8=",
        "a: !<tag:yaml.org,2002:python/tuple> [1]",
        "? !!str a\n: 1",
        "- ! 5",
    ],
)
def test_tags_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="mine.yaml, line 1: (a recipe must be plain YAML|every key must be a plain)"):
        tree(text)
    assert not list(tmp_path.iterdir())


def test_a_file_is_at_most_a_megabyte(tmp_path):
    (tmp_path / "mine.yaml").write_text(TOP + "#" * (MOST_BYTES - len(TOP)))
    assert parse.load(str(tmp_path / "mine.yaml")).name == "mine"
    (tmp_path / "mine.yaml").write_text(TOP + "#" * (MOST_BYTES - len(TOP) + 1))
    with pytest.raises(RecipeError, match="must be at most 1,000,000 bytes. Got mine.yaml with more"):
        parse.load(str(tmp_path / "mine.yaml"))


def test_the_number_of_values_is_bounded(monkeypatch):
    monkeypatch.setattr(parse_tree, "MOST_VALUES", 100)
    assert tree(f"[{'1,' * 99}]") == [1] * 99
    with pytest.raises(RecipeError, match="line 1: a recipe must have at most 100 values"):
        tree(f"[{'1,' * 100}]")


def test_depth_is_bounded():
    deep = lambda n: "[" * n + "]" * n  # noqa: E731
    assert tree("a: " + deep(MOST_DEPTH - 2))
    for n in (MOST_DEPTH + 1, 10_000, 400_000):
        with pytest.raises(RecipeError, match=f"must be at most {MOST_DEPTH} deep"):
            tree("a: " + deep(n))


def test_depth_is_bounded_through_aliases():
    text = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60))
    with pytest.raises(RecipeError, match=f"line {MOST_DEPTH}: lists and mappings must be at most {MOST_DEPTH} deep"):
        tree(text)


BOMBS = [
    "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
    "a0: &a0 {k: x}\n" + "".join(f"a{i}: &a{i} {{k: *a{i - 1}, l: *a{i - 1}, m: *a{i - 1}}}\n" for i in range(1, 20)),
    f"a: &a {'x' * 400_000}\nb: [{', '.join(['*a'] * 1000)}]\n",
    "a0: &a0 {a: 1, b: 2}\n" + "".join(f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: *a{i - 1}}}\n" for i in range(1, 25)),
]


@pytest.mark.parametrize("text", BOMBS)
def test_alias_bombs_are_refused_before_they_grow(text):
    began = time.perf_counter()
    with pytest.raises(RecipeError, match="must stay under 4,000,000 characters once aliases and variables"):
        tree(text)
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    "text",
    [
        f"variables: {{a: {'x' * 400_000}}}\ndepartures: [{', '.join(['${a}'] * 10_000)}]\n".replace("${a}", '"${a}"'),
        "variables: {a: [" + "1," * 1000 + "]}\ncall: {b: [" + '"${a}",' * 10_000 + "]}\n",
    ],
)
def test_variable_bombs_are_refused_before_they_grow(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(TOP + text)
    began = time.perf_counter()
    with pytest.raises(RecipeError, match="must stay under 4,000,000 characters"):
        parse.load(str(tmp_path / "mine.yaml"))
    assert time.perf_counter() - began < 10


def test_a_text_that_variables_would_make_too_long_is_never_made(tmp_path):
    text = f'variables: {{a: {"x" * 400_000}}}\ndescription: "{"${a}" * 100}"\n'
    (tmp_path / "mine.yaml").write_text(TOP + text)
    with pytest.raises(RecipeError, match="line 5: a text must stay under 4,000,000 characters. Got 40,"):
        parse.load(str(tmp_path / "mine.yaml"))


def test_include_bombs_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("include: [f0.yaml, f0.yaml]")
    for i in range(20):
        (tmp_path / f"f{i}.yaml").write_text(f"include: [f{i + 1}.yaml, f{i + 1}.yaml]")
    (tmp_path / "f20.yaml").write_text(TOP)
    with pytest.raises(RecipeError, match="must include at most 32 files"):
        parse.load(str(tmp_path / "mine.yaml"))


def test_aliases_and_merge_keys_are_fine_in_measure():
    text = (
        "base: &base {a: 1, b: [2]}\nlist: [*base, *base]\nmine: {<<: *base, b: 3}\nboth: {<<: [{a: 5}, *base], c: 1}"
    )
    base = {"a": 1, "b": [2]}
    both = {"a": 5, "b": [2], "c": 1}
    assert tree(text) == {"base": base, "list": [base, base], "mine": {"a": 1, "b": 3}, "both": both}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: &a [*a]", "line 1: an alias must not stand within its own anchor. Got \\*a"),
        ("a: &a {b: {c: *a}}", "an alias must not stand within its own anchor"),
        ("a: *b", "line 1: an alias must come after its anchor. Got \\*b"),
        ("a: 1\nb: 2\na: 3", "line 3: every key must be given once. Got a again"),
        ("a: {b: 1, b: 1}", "every key must be given once. Got b again"),
        ("? [1]\n: 2", "every key must be a plain text"),
        ("<<: 5", "<< must be given mappings"),
        ("a: .nan", "line 1: a number must be one. Got nan"),
        ("a: [1, -.NaN, .NAN]", "a number must be one. Got nan"),
        (f"a: {'9' * 5000}", "a number must be readable. Got '9999"),
        ("a: 1\n---\nb: 2", "a recipe must be one YAML document"),
        ("a: [1", "line 1: a recipe must be readable YAML"),
        ("a: [1\nb: 2", "line 2: a recipe must be readable YAML"),
        ("a: \x00", "a recipe must be readable YAML"),
        ("a: 'x", "a recipe must be readable YAML"),
        ("\ta: 1", "a recipe must be readable YAML"),
        ("a: b: c", "line 1: a recipe must be readable YAML"),
        ("%YAML 9.9\n---\na: 1", "a recipe must be readable YAML"),
    ],
)
def test_what_is_no_plain_data_gets_one_sentence(text, sentence):
    with pytest.raises(RecipeError, match=sentence):
        tree(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2026-01-01", "2026-01-01"),
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("=", "="),
        ("~", None),
        ("", None),
        ("-.inf", float("-inf")),
        ("1e3", "1e3"),
        ("1.5e+3", 1500.0),
        ("'5'", "5"),
        ("yes", True),
        ("ein großer Hund 🐕", "ein großer Hund 🐕"),
    ],
)
def test_values_are_plain(text, value):
    assert tree(f"a: {text}") == {"a": value}


def test_keys_are_texts_as_written():
    assert tree("{0: a, yes: b, 1.0: c, null: d}") == {"0": "a", "yes": "b", "1.0": "c", "null": "d"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (b"\xff\xfe\x00a", "must be a readable UTF-8 text"),
        (b"name: caf\xe9", "must be a readable UTF-8 text"),
        (b"", "a recipe must be a mapping of keys. Got nothing"),
        (b"# nothing", "a recipe must be a mapping of keys. Got nothing"),
        (b"5", "a recipe must be a mapping of keys. Got int"),
    ],
)
def test_what_is_no_recipe_ends_with_exit_code_2(capsys, tmp_path, given, sentence):
    (tmp_path / "mine.yaml").write_bytes(given)
    assert sentence in refused(capsys, ["recipes", "validate", str(tmp_path / "mine.yaml")], 2)


def test_a_byte_order_mark_is_fine(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + TOP.encode())
    assert parse.load(str(tmp_path / "mine.yaml")).name == "mine"


def test_a_tree_knows_where_its_values_stand():
    made = read("a:\n  - x\n  - {b: 1,\n     c: 2}\n", Origin("mine.yaml"))
    assert [made.at(*path).line for path in (("a", 0), ("a", 1), ("a", 1, "c"), ("a", 1, "d"), ("z",))] == [
        2,
        3,
        4,
        3,
        1,
    ]
    assert Tree.of({"a": [1, {"b": None}]}, Origin("here")).plain == {"a": [1, {"b": None}]}
