import pytest

from probe.store import Run
from recipes.cli import main
from tests import tiny
from tests.recipes.line import FAST, TWO, main_ok, story


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy pipeline on disk."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    tiny.pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def recorded(toy, tmp_path_factory):
    """A finished DiTCtrl run."""
    folder = tmp_path_factory.mktemp("runs") / "story"
    main_ok(["run", "ditctrl", "-m", toy, *TWO, *FAST, "--out", str(folder)])
    return folder


@pytest.fixture(scope="session")
def stopped(toy, tmp_path_factory):
    """A run that failed at its very end."""
    from recipes import run

    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "finish_video", lambda *a: 1 / 0)
        with pytest.raises(SystemExit):
            main(story(toy, folder))
    assert Run(folder).status == "failed"
    return folder
