"""The order of the house holds; and each rule is shown to notice a small guilty source."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.ranks import HEAVY, RANKS, missing, strangers, violations

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Every python file of the project, by its path from the root."""
    folders = (*RANKS, "tests", "data")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_the_order_holds(sources):
    assert violations(sources) == []


def test_the_rules_name_files_that_exist(sources):
    assert missing(sources) == []


def test_our_packages_are_ours():
    """`control` is also the name of python-control on PyPI."""
    specs = {name: find_spec(name) for name in RANKS}
    assert strangers({name: spec.origin if spec else None for name, spec in specs.items()}, str(ROOT)) == []


def test_a_rule_about_a_missing_file_is_noticed():
    assert "recipes/scene.py" in missing({"recipes/cli.py": ""})
    assert "recipes/cli.py" not in missing({"recipes/cli.py": ""})
    assert "dashboards/*" in missing({})
    assert "dashboards/*" not in missing({"dashboards/views/map.py": ""})


def test_a_package_from_elsewhere_is_noticed():
    assert strangers({"control": "/venv/site-packages/control/__init__.py"}, "/home/lab") != []
    assert strangers({"control": "/home/lab-old/control/__init__.py"}, "/home/lab") != []
    assert strangers({"control": None}, "/home/lab") != []
    assert strangers({"control": "/home/lab/control/__init__.py"}, "/home/lab") == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("probe/plan.py", "import control"),
        ("probe/plan.py", "from control.bias import Bias"),
        ("probe/plan.py", "def f():\n    from control import Bias"),
        ("probe/plan.py", "class A:\n    async def f(self):\n        import recipes.run"),
        ("probe/plan.py", "if TYPE_CHECKING:\n    from control import Bias"),
        ("probe/plan.py", "import_module('control')"),
        ("probe/plan.py", "importlib.import_module('control.bias')"),
        ("probe/plan.py", "__import__('dashboards')"),
        ("control/bias.py", "import ditctrl"),
        ("ditctrl/method.py", "import recipes"),
        ("recipes/cli.py", "def f():\n    import dashboards.app"),
    ],
)
def test_an_import_against_the_order_is_noticed(path, source):
    (said,) = violations({path: source})
    assert "stands below" in said


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("control/bias.py", "import probe\nfrom probe.plan import Plan\nfrom .schedule import ramp"),
        ("recipes/run.py", "import ditctrl, control, probe, torch"),
        ("dashboards/app.py", "import streamlit\nfrom recipes.language.recipe import Recipe"),
        ("tests/recipes/test_run.py", "import dashboards, h5py, yaml\nfrom tests.tiny import pipe"),
        ("data/miniature/train.py", "import torch, recipes.scene"),
        ("probe/store_read.py", "import h5py"),
        ("probe/tap.py", "import nnsight, torch"),
        ("recipes/language/parse.py", "from yaml import safe_load"),
        ("probe/plan.py", "import controlled, datasets, testsuite, yamlish"),
        ("probe/plan.py", "print('import control')"),
        ("probe/site.py", "if TYPE_CHECKING:\n    pass"),
        ("probe/plan.py", "from probe import __version__"),
    ],
)
def test_an_import_in_order_is_let_through(path, source):
    assert violations({path: source, "recipes/language/recipe.py": "", "probe/__init__.py": ""}) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("probe/trace.py", "import nnsight"),
        ("control/bias.py", "from nnsight import save"),
        ("probe/tapestry.py", "import nnsight"),
        ("probe/record.py", "def f():\n    import h5py"),
        ("recipes/store.py", "import h5py"),
        ("recipes/language/recipe.py", "import yaml"),
        ("recipes/run.py", "from streamlit import cache_data"),
    ],
)
def test_a_library_through_the_wall_is_noticed(path, source):
    (said,) = violations({path: source})
    assert "its door is" in said


@pytest.mark.parametrize("path", ["recipes/run.py", "tests/test_x.py", "data/miniature/train.py"])
@pytest.mark.parametrize("source", ["import data", "from data.miniature import train", "def f():\n    import data.x"])
def test_an_import_of_data_is_noticed(path, source):
    assert violations({path: source}) == [f"{path} imports data: nothing may"]


def test_an_import_of_tests_is_noticed():
    assert violations({"recipes/run.py": "from tests.tiny import pipe"}) == [
        "recipes/run.py imports tests: only tests may"
    ]


@pytest.mark.parametrize(
    "source", ["from probe.plan import _sort", "from probe._plan import Plan", "from . import _plan"]
)
def test_a_private_name_of_another_file_is_noticed(source):
    (said,) = violations({"probe/serve.py": source})
    assert "a private name stays in its file" in said


@pytest.mark.parametrize(
    "files",
    [
        {"probe/layout.py": "import torch"},
        {"probe/region.py": "from torch import Tensor"},
        {"probe/site.py": "def f():\n    import torch"},
        {"probe/site.py": "try:\n    import torch\nexcept ImportError:\n    torch = None"},
        {"probe/film.py": "class A:\n    import torch"},
        {"recipes/language/parse.py": "import diffusers.utils"},
        {"recipes/scene.py": "from transformers import T5Tokenizer"},
        {"recipes/cli.py": "import torch"},
        {"dashboards/views/map.py": "import nnsight"},
        {"probe/store.py": "from probe import codec", "probe/codec.py": "import torch"},
        {"probe/store.py": "from probe.codec import encode", "probe/codec.py": "import torch"},
        {
            "probe/store.py": "import numpy",
            "probe/codec.py": "",
            "probe/layout.py": "import probe.a",
            "probe/a.py": "import torch",
        },
        {
            "recipes/language/recipe.py": "import probe.site",
            "probe/__init__.py": "from probe.tap import tap",
            "probe/tap.py": "import torch",
        },
        {
            "recipes/language/recipe.py": "import control.bias",
            "control/__init__.py": "import torch",
            "control/bias.py": "",
        },
        {"dashboards/app.py": "def f():\n    from recipes import run", "recipes/run.py": "import torch"},
        {"recipes/cli.py": "from recipes.run import run", "recipes/run.py": "import torch"},
    ],
)
def test_a_way_to_torch_is_noticed(files):
    found = [said for said in violations(files) if "must be importable without torch" in said]
    assert len(found) == 1


@pytest.mark.parametrize(
    "files",
    [
        {
            "recipes/cli.py": "def run():\n    import torch\n    from recipes.run import run",
            "recipes/run.py": "import torch",
        },
        {"probe/store.py": "import probe.codec", "probe/codec.py": "def f():\n    import torch"},
        {"probe/layout.py": "def f():\n    import numpy"},
        {"probe/site.py": "import probe.codec", "probe/codec.py": "async def f():\n    import torch"},
        {"probe/region.py": "from probe import site", "probe/site.py": "", "probe/tap.py": "import torch"},
        {
            "probe/store.py": "import probe",
            "probe/__init__.py": "if TYPE_CHECKING:\n    import probe.tap",
            "probe/tap.py": "import torch",
        },
    ],
)
def test_no_way_to_torch_is_let_through(files):
    assert violations(files) == []


def imported(code: str) -> set[str]:
    """Return the names of everything that is imported once `code` has run in a fresh process."""
    tell = f"{code}\nimport sys; print(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", tell], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_what_is_imported_is_told():
    assert "email" in imported("import email")
    assert "email" not in imported("import json")


@pytest.mark.parametrize(
    "code", ["import probe", "import probe.store", "from probe import Run", "import recipes.scene"]
)
def test_reading_imports_no_torch(code):
    assert imported(code) & HEAVY == set()


def test_help_imports_nothing_slow():
    code = """
import sys
from recipes.cli import main
sys.argv = ["mmdit", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert imported(code) & {*HEAVY, "streamlit"} == set()
