"""The order of the house, read from the sources: who may import whom, and which library enters by which door."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

RANKS = {"probe": 0, "control": 1, "ditctrl": 2, "recipes": 3, "dashboards": 4}

DOORS = {
    "nnsight": ("probe/tap.py", "probe/tracer.py"),
    "h5py": ("probe/store*.py",),
    "yaml": ("recipes/language/parse*.py",),
    "streamlit": ("dashboards/*",),
}

HEAVY = {"torch", "diffusers", "transformers", "nnsight", "accelerate"}
"""Importing any of these imports torch."""

LIGHT = (
    *(f"probe/{name}.py" for name in ("layout", "region", "site", "store", "film", "measure", "contrast", "mask")),
    "ditctrl/metric.py",
    "ditctrl/motion.py",
    "recipes/language/*",
    "recipes/commands/*",
    *(
        f"recipes/{name}.py"
        for name in ("cli", "scene", "heatmap", "maskfile", "export", "origin", "pair", "compare", "figures")
    ),
    "dashboards/*",
)
"""Files that must be importable without torch."""

LATE = ("recipes/cli.py", "recipes/commands/*")
"""Light files that may import torch inside a function: a command loads what it needs when it runs."""


@dataclass(frozen=True)
class Import:
    """One import statement: the module, the names taken from it, and whether it runs when the file is imported."""

    module: str
    names: tuple[str, ...]
    at_once: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def violations(files: Mapping[str, str]) -> list[str]:
    """Return what breaks the order, one sentence each; `files` maps a path such as probe/store.py to its source."""
    imports = {path: list(_imports(path, source)) for path, source in files.items() if path.endswith(".py")}
    found = [said for path in imports for one in imports[path] for said in _broken_rules(path, one)]
    for path in imports:
        if _matches(path, LIGHT):
            found += _ways_to_torch(path, imports)
    return list(dict.fromkeys(found))


def missing(files: Mapping[str, str]) -> list[str]:
    """Return the files and patterns that a rule names and that no longer exist: such a rule holds nothing."""
    named = {*LIGHT, *LATE, *(door for doors in DOORS.values() for door in doors)}
    return sorted(name for name in named if not any(fnmatch(path, name) for path in files))


def strangers(origins: Mapping[str, str | None], root: str) -> list[str]:
    """Return the packages of this project that python would take from elsewhere; `origins` maps a name to a file."""
    return [
        f"{name} must come from {root}. Got {origin}. Use an environment of its own."
        for name, origin in origins.items()
        if origin is None or not origin.startswith(root.rstrip("/") + "/")
    ]


def _broken_rules(path: str, one: Import) -> Iterator[str]:
    home = path.partition("/")[0]
    if one.package == "data":
        yield f"{path} imports data: nothing may"
    if home not in RANKS:
        return
    if one.package == "tests":
        yield f"{path} imports tests: only tests may"
    if RANKS.get(one.package, 0) > RANKS[home]:
        yield f"{path} imports {one.module}: {home} stands below {one.package}"
    if one.package in DOORS and not _matches(path, DOORS[one.package]):
        yield f"{path} imports {one.package}: its door is {', '.join(DOORS[one.package])}"
    if one.package in RANKS:
        for name in (*one.module.split("."), *one.names):
            if name.startswith("_") and not name.startswith("__"):
                yield f"{path} imports {name} of {one.module}: a private name stays in its file"


def _ways_to_torch(path: str, imports: Mapping[str, list[Import]]) -> Iterator[str]:
    """Follow the imports that happen when `path` is imported; what it imports in its own functions counts too."""
    ways, seen = [(path, path)], set()
    while ways:
        at, way = ways.pop()
        if at in seen:
            continue
        seen.add(at)
        for one in imports[at]:
            late_counts = at == path and not _matches(path, LATE)
            if not (one.at_once or late_counts):
                continue
            if one.package in HEAVY:
                yield f"{way} imports {one.package}: {path} must be importable without torch"
            ways += [(file, f"{way} -> {file}") for file in _files_of(one, imports)]


def _files_of(one: Import, files: Mapping[str, object]) -> Iterator[str]:
    """The files of this project that an import runs: the packages on the way, the module, and submodules it names."""
    if one.package not in RANKS:
        return
    parts = one.module.split(".")
    modules = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    modules += [f"{modules[-1]}/{name}" for name in one.names]
    for module in modules:
        yield from (file for file in (f"{module}.py", f"{module}/__init__.py") if file in files)


def _imports(path: str, source: str) -> Iterator[Import]:
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source, path), True)]
    while pending:
        node, at_once = pending.pop()
        yield from _import_of(node, path, at_once)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_once = False
        for child in ast.iter_child_nodes(node):
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and child in node.body
            pending.append((child, at_once and not typing_only))


def _import_of(node: ast.AST, path: str, at_once: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, (), at_once)
    elif isinstance(node, ast.ImportFrom):
        above = path.split("/")[: -node.level] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        yield Import(module, tuple(alias.name for alias in node.names), at_once)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield Import(node.args[0].value, (), at_once)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)
