"""From a name to the tree of a recipe: built-in recipes, those of packages, files, and what they include. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from probe.comment import CARRIERS, comment_of
from probe.errors import RecipeError
from probe.folder import INFO, RECIPE
from recipes.language import registry
from recipes.language.parse_tree import MOST_BYTES, Origin, Tree, read

LIBRARY = Path(__file__).parents[1] / "library"
MOST_FILES = 32
"""That one recipe may include, all in all."""


def names() -> tuple[str, ...]:
    """The built-in recipes."""
    return tuple(sorted(file.stem for file in LIBRARY.glob("*.yaml")))


@dataclass(frozen=True)
class Listed:
    """A recipe that can be run by its name."""

    name: str
    path: Path
    origin: str


def listed() -> Iterator[Listed]:
    """The built-in recipes, then those of packages, under their distribution's name."""
    for name in names():
        yield Listed(name, LIBRARY / f"{name}.yaml", "built in")
    for pack in registry.packs():
        for name in pack.recipes:
            if pack.folder is not None:
                yield Listed(name, pack.folder / f"{name}.yaml", pack.distribution)


def find(recipe: str) -> Path:
    """The file of a name or of a path; a built-in name comes first, then a path (of a file, or of a run's folder or its
    run.json), then a recipe of a package.

    Raises:
        RecipeError: none of them, or in several packages; names the nearest.
    """
    if recipe in names():
        return LIBRARY / f"{recipe}.yaml"
    path = file_at(recipe)
    own = file_at((Path(recipe) if path is None else path.parent) / RECIPE)
    if path is not None and path.name == INFO and own is None:
        raise RecipeError(f"A run must hold {RECIPE} to be run again. Got {recipe} without one. Name a YAML file.")
    if path is not None and path.name != INFO:
        return path
    if own is not None:
        return own
    there = list(listed())
    found = [one for one in there if one.name == recipe]
    if len(found) > 1:
        both = ", ".join(one.origin for one in found)
        raise RecipeError(f"A recipe must come from one package. Got {recipe} from {both}. Give the path of its file.")
    if found:
        return found[0].path
    known = list(dict.fromkeys(one.name for one in there))
    near = difflib.get_close_matches(recipe, known, 1)
    hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
    raise RecipeError(f"A recipe must be a YAML file or a built-in name. Got {short(recipe)}. {hint}")


def file_at(path: str | Path) -> Path | None:
    """The file at a path; None if there is none, or never could be."""
    try:
        given = Path(path).expanduser()
        return given if given.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name too long for a file, an unknown home
        return None


def short(text: str) -> str:
    """A text that fits into a sentence."""
    return text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"


def text_of(path: Path) -> str:
    """The text of a recipe file, or the one that a video or picture of a run carries.

    Raises:
        RecipeError: it cannot be read, is not UTF-8, or is too large; a video without a recipe.
        StoreError: a video that cannot be read.
    """
    if path.suffix.lower() in CARRIERS:
        return _carried(path)
    try:
        with path.open("rb") as file:
            given = file.read(MOST_BYTES + 1)
        if len(given) > MOST_BYTES:
            raise RecipeError(
                f"A recipe must be at most {MOST_BYTES:,} bytes. Got {path.name} with more. Keep data in other files."
            )
        return given.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"A recipe must be a readable UTF-8 text. Got {path.name}: {error}. Check the file."
        ) from error


def _carried(path: Path) -> str:
    text = comment_of(path)
    if not text or len(text.encode()) > MOST_BYTES:
        got = f"more than {MOST_BYTES:,} bytes" if text else "none"
        raise RecipeError(f"A video must carry its recipe. Got {got} in {path.name}. Take recipe.yaml of its run.")
    return text


def tree_of(path: Path) -> Tree:
    """The tree of a recipe file, what it includes merged into it: mappings are merged, everything else is replaced by
    what lies on top. `include` itself is gone.

    Raises:
        RecipeError: a file that cannot be read, lies outside of the folder, or includes itself.
    """
    return _Including([]).tree(path)


def inside(path: str, at: Tree) -> Path:
    """A path of a recipe, from the folder of the file it is written in.

    Raises:
        RecipeError: it leads out of that folder, also by links, or no file is there.
    """
    try:
        return _inside(Path(path), at)
    except (OSError, ValueError, RuntimeError) as error:
        raise at.error(
            f"a path must be readable. Got {short(repr(path))}: {_reason(error)}. Rename the file."
        ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _inside(given: Path, at: Tree) -> Path:
    folder = (at.origin.folder or Path()).resolve()
    if given.is_absolute() or ".." in given.parts or not (folder / given).resolve().is_relative_to(folder):
        raise at.error(f"a path must stay inside of the recipe's folder. Got {given}. Put the file beside the recipe.")
    if not (folder / given).is_file():
        near = difflib.get_close_matches(str(given), [file.name for file in folder.iterdir()] + list(names()), 1)
        hint = f"Did you mean {near[0]}?" if near else "Check its name."
        raise at.error(f"a path must lead to a file. Got {given}, which is not in {folder}. {hint}")
    return folder / given


def merged(below: Tree, above: Tree) -> Tree:
    """Two trees as one: mappings key by key, of anything else the one above."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    both = {key: merged(part, above.value[key]) if key in above.value else part for key, part in below.value.items()}
    return Tree(
        {**both, **{key: part for key, part in above.value.items() if key not in both}}, above.origin, above.line
    )


@dataclass
class _Including:
    """One recipe and what it includes; `seen` are all files that were read."""

    seen: list[Path]

    def tree(self, path: Path, way: tuple[Path, ...] = ()) -> Tree:
        whole = path.resolve()
        self.seen.append(whole)
        tree = read(text_of(path), Origin(path.name, path.parent))
        if not isinstance(tree.value, dict):
            got = "nothing" if tree.value is None else type(tree.value).__name__
            raise tree.error(f"a recipe must be a mapping of keys. Got {got}. See `mmdit recipes show record`.")
        top = Tree({key: part for key, part in tree.value.items() if key != "include"}, tree.origin, tree.line)
        below = None
        for one in self._included(tree.get("include")):
            base = self._below(one, (*way, whole))
            below = base if below is None else merged(below, base)
        return top if below is None else merged(below, top)

    def _included(self, given: Tree | None) -> list[Tree]:
        if given is None or given.value is None:
            return []
        ones = given.value if isinstance(given.value, list) else [given]
        for one in ones:
            if not isinstance(one.value, str) or not one.value.strip():
                raise one.error(f"include must be a name or a path. Got {one.plain!r}. Write include: record.")
        return ones

    def _below(self, one: Tree, way: tuple[Path, ...]) -> Tree:
        path = LIBRARY / f"{one.value}.yaml" if one.value in names() else inside(one.value, one)
        if path.resolve() in way:
            circle = " includes ".join(file.name for file in (*way[way.index(path.resolve()) :], path))
            raise one.error(f"a recipe must not include itself. Got {circle}. Leave one of them out.")
        if len(self.seen) >= MOST_FILES:
            raise one.error(f"a recipe must include at most {MOST_FILES} files. Got more. Join some of them.")
        return self.tree(path, way)
