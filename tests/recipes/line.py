"""Typing commands: what a happy one and a refused one must look like."""

import pytest

from recipes.cli import main
from tests import tiny

FAST = ["--set", "steps=5", "--set", "guidance=3"]
TWO = ["-p", tiny.PROMPT, "-p", tiny.OTHER]


def main_ok(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert not stopped.value.code


def refused(capsys, arguments, code):
    """Exit code, one line on stderr, nothing like a traceback."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == code, said
    line = said.strip().splitlines()[-1]
    assert line.startswith("mmdit: ")
    assert "Traceback" not in said
    return line


def story(toy, out):
    return ["run", "ditctrl", "-m", toy, *TWO, *FAST, "--out", str(out)]
