"""Where the file of a given video lies, and that it is still the same. No torch."""

from __future__ import annotations

from hashlib import file_digest
from pathlib import Path

from recipes.language.include import file_at, inside, short
from recipes.language.override import typed
from recipes.language.parse_tree import Tree


def located(tree: Tree) -> Tree:
    """A recipe with the whole path of its video and the sha256 of what lies there. A recipe file names a video of its
    own folder, `--set` any file, from where the command runs; a whole path in a file counts with its sha256 alone, so
    that nobody's recipe picks up a file that its author never had.

    Raises:
        RecipeError: there is no such file, it lies outside of the recipe's folder, or it is another than it was.
    """
    video = tree.get("video")
    file = video.get("file") if video else None
    if video is None or file is None or not isinstance(file.value, str) or not file.value.strip():
        return tree
    known = video.get("sha256")
    if known is not None and (known.value is None or (typed(file) and not typed(known))):
        known = None
    path = _named(file) if typed(file) or (known and Path(file.value).is_absolute()) else inside(file.value, file)
    digest = _digest(path, file)
    if known is not None and known.value != digest:
        raise known.error(
            "a video must be the one that its recipe was made for, of this sha256. Got another in "
            f"{path.name}. Restore it, or leave sha256 out."
        )
    found = {"file": str(path.resolve()), "sha256": digest}
    whole = {**video.value, **{key: Tree(value, file.origin, file.line) for key, value in found.items()}}
    return Tree({**tree.value, "video": Tree(whole, video.origin, video.line)}, tree.origin, tree.line)


def _named(file: Tree) -> Path:
    found = file_at(file.value)
    if found is None:
        raise file.error(f"a video must be a file. Got {short(file.value)}, which is none here. Check its path.")
    return found


def _digest(path: Path, file: Tree) -> str:
    try:
        with path.open("rb") as data:
            return file_digest(data, "sha256").hexdigest()
    except OSError as error:
        raise file.error(f"a video must be readable. Got {path.name}: {error.strerror}. Check the file.") from error
