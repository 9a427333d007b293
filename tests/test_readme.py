"""The README's tour runs as it stands: every Python block in order, every mmdit line."""

import re
import shlex
from pathlib import Path

import pytest

from recipes.cli import main
from recipes.language import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOUR = README.split("## A five-minute tour")[1].split("## Longer videos from several prompts")[0]


def blocks(language, text=TOUR):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


QUICK = {"mmdit bench": ["--size", "tiny", "--rounds", "1"], "mmdit study": ["--seeds", "2"]}
"""What a line is given beside its own words, so that it takes a moment."""


def test_the_python_tour(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}
    found = blocks("python")
    assert len(found) == 3
    for block in found:
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["run"].word_map("circle", layer=3, step=10).shape == (5, 8, 8)
    assert scope["result"].frames[0][0].size == (64, 64)
    assert scope["maps"].word_map("circle", step=10, layer=3, branch=scope["blue"]).shape == (5, 8, 8)
    assert scope["frames"].values[scope["at"]].shape == (4, 5, 6)
    assert capsys.readouterr().out.startswith("step 2 layer 4:\n  edit: Transfer(kv from prompt 0 to prompt 1)")


def test_the_command_line_tour(tmp_path, monkeypatch, capsys):
    """Files that it shows are written first; what a line sends to a file goes there."""
    monkeypatch.chdir(tmp_path)
    for block in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)
        assert name, block
        (tmp_path / name[1]).write_text(block, encoding="utf-8")
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) == 23
    for line in lines:
        words, _, target = line.partition(" > ")
        words = shlex.split(words, comments=True)
        assert words[0] == "mmdit"
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*words[1:], *QUICK.get(" ".join(words[:2]), [])])
        said = capsys.readouterr()
        assert not stopped.value.code, (line, said.err)
        if target:
            (tmp_path / target).with_suffix(".start").write_text(said.out, encoding="utf-8")
    assert (tmp_path / "runs" / "story" / "video.mp4").is_file()
    assert (tmp_path / "runs" / "first" / "circle_vt.png").is_file()
    assert (tmp_path / "runs" / "mine" / "target.gif").is_file()
    assert (tmp_path / "runs" / "studies" / "mine-study.json").is_file()
    start = parse.load(str(tmp_path / "mine.start"))
    assert start == parse.load("map-transfer")


def test_every_file_it_names_is_there():
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(named) >= 3
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_it_names_exists():
    from recipes.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    assert set(re.findall(r"`?mmdit ([a-z]+)", README)) <= known
