"""Two runs against each other: only like with like, and every number against the arrays of the runs."""

import csv
import json

import numpy as np
import pytest

from probe import mask, measure
from probe.errors import UsageError
from probe.store import Run, RunWriter
from recipes.compare import REGIONS, compare
from recipes.origin import unlike
from recipes.pair import pair
from tests import tiny
from tests.probe import samples
from tests.recipes.line import FAST, main_ok, refused

BLUE = "a blue cat runs left"


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """Finished runs: red, blue (another prompt and seed), short (4 steps, two layers, two words)."""
    folder = tmp_path_factory.mktemp("runs")
    few = ["--set", "record.layers=[1,3]", "--words", "cat, Red", "--set", "steps=4", "--set", "guidance=3"]
    seed = ["--set", "seed=4"]
    made = {"red": [tiny.PROMPT, *FAST], "blue": [BLUE, *FAST, *seed], "short": [tiny.PROMPT, *few, *seed]}
    for name, arguments in made.items():
        main_ok(["record", *arguments, "-m", toy, "--out", str(folder / name)])
    return {name: folder / name for name in made}


def told(capsys, *arguments):
    main_ok(["diff", *map(str, arguments), "--format", "json"])
    return json.loads(capsys.readouterr().out)


def made_up(folder, *records, timesteps=(999, 499)):
    """A run of made-up records, one per step; None records nothing."""
    with RunWriter.create(folder, {"seed": 0}, "") as writer:
        for step, (one, timestep) in enumerate(zip(records, timesteps, strict=False)):
            writer.write_step(step, {"timestep": timestep}, [one] if one else [])
    return Run(folder)


def regions_of(path):
    """Region masses of a run by a loop over its steps: {name: [L, H]}."""
    grids = np.mean([Run(path).mass_grid(step) for step in Run(path).steps], 0, dtype=float)
    return {name: grids[:, :, i // 4, i % 4] for i, name in enumerate(REGIONS)}


def masses(seed):
    """Region masses [L, H, 3, 4] of a made-up record."""
    mass = samples.record(seed).mass
    assert mass is not None
    return mass.copy()


def near(value):
    return pytest.approx(value, rel=1e-3, abs=1e-9)


def test_what_two_runs_come_from(runs, recorded, capsys):
    rows = {row["what"]: (row["A"], row["B"]) for row in told(capsys, runs["red"], runs["blue"])["what differs"]}
    assert rows == {"prompts": ([tiny.PROMPT], [BLUE]), "seed": (0, 4)}
    rows = {row["what"]: (row["A"], row["B"]) for row in told(capsys, runs["red"], recorded)["what differs"]}
    assert rows["recipe.name"] == ("record", "ditctrl")
    assert rows["sampler.class"] == ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
    assert rows["overlap"] == (None, 2)
    assert rows["recipe.edits"][1][0]["tensors"] == "kv"
    assert rows["recipe.segments.transitions"] == (None, 2)
    assert not {"started", "finished", "recipe", "recipe.sampler.seed", "recipe.prompts"} & set(rows)


def test_a_run_does_not_differ_from_itself(runs, capsys):
    for mode in ("absolute", "relative", "zscore"):
        found = told(capsys, runs["red"], runs["red"], "--mode", mode)
        assert found["what differs"] == found["heads by region mass"] == []
        assert {row["iou of Otsu masks"] for row in found["words"]} == {1}
        assert {row["mean absolute difference"] for row in found["words"]} == {0}
        assert {row["correlation"] for row in found["words"]} == {1}
        assert [list(row.values())[-1] for row in found["region mass"]] == [0] * 12


def test_word_maps_of_both(runs, capsys):
    found = told(capsys, runs["red"], runs["blue"])
    assert [row["word"] for row in found["words"]] == ["a", "cat", "runs", "left"]
    assert {"words only in A: red", "words only in B: blue"} <= set(found["left out"])
    a, b = (Run(runs[name]).word_map("cat") for name in ("red", "blue"))
    row = found["words"][1]
    assert row["correlation"] == near(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert row["mean absolute difference"] == near(np.abs(a - b).mean())
    inside = [mask.otsu(a), mask.otsu(b)]
    assert row["iou of Otsu masks"] == near((inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum())
    alone = told(capsys, runs["red"], runs["blue"], "--word", "CAT")
    assert alone["words"] == [row]
    assert set(alone) == {"A", "B", "what differs", "words", "left out"}


def test_region_masses_of_both(runs, capsys):
    rows = told(capsys, runs["red"], runs["blue"], "--metric", "mass")["region mass"]
    a, b = regions_of(runs["red"]), regions_of(runs["blue"])
    assert [row["region"] for row in rows] == list(REGIONS)
    for row in rows:
        x, y = a[row["region"]].mean(), b[row["region"]].mean()
        assert (row["A"], row["B"]) == (near(x), near(y))
        assert row["A - B"] == pytest.approx(x - y, abs=2e-7)
    rows = told(capsys, runs["red"], runs["blue"], "--metric", "mass", "--mode", "relative")["region mass"]
    unusual = told(capsys, runs["red"], runs["blue"], "--metric", "mass", "--mode", "zscore")["region mass"]
    x, y = a["video on text"].mean(), b["video on text"].mean()
    assert unusual[8]["A - B"] == pytest.approx(x - y, abs=2e-7)  # means have no others to be unusual among
    assert rows[8]["relative difference"] == pytest.approx(2 * (x - y) / (x + y), rel=2e-2)


@pytest.mark.parametrize(
    ("mode", "column"), [("absolute", "A - B"), ("relative", "relative difference"), ("zscore", "z of A - B")]
)
def test_the_heads_that_differ_most(runs, capsys, mode, column):
    rows = told(capsys, runs["red"], runs["blue"], "--metric", "mass", "--mode", mode, "--heads", "4")[
        "heads by region mass"
    ]
    a, b = regions_of(runs["red"]), regions_of(runs["blue"])

    def apart(name):
        d = a[name].astype(float) - b[name]
        if mode == "relative":
            return 2 * d / np.where(a[name] + b[name], a[name] + b[name], 1)
        return (d - d.mean()) / (d.std() or 1) if mode == "zscore" else d

    by_head = {at: max(REGIONS, key=lambda name: abs(apart(name)[at])) for at in np.ndindex(3, 2)}
    order = sorted(by_head, key=lambda at: -abs(apart(by_head[at])[at]))
    assert [(row["layer"], row["head"]) for row in rows] == order[:4]
    for row, at in zip(rows, order, strict=False):
        assert row["region"] == by_head[at]
        assert row[column] == near(apart(by_head[at])[at])
        assert (row["A"], row["B"]) == (near(a[row["region"]][at]), near(b[row["region"]][at]))


def test_steps_are_paired_by_their_timestep_and_layers_by_their_number(runs, capsys):
    found = told(capsys, runs["red"], runs["short"])
    assert found["left out"][:3] == [
        "timesteps only in A: 799, 599, 399, 199",
        "timesteps only in B: 749, 499, 249",
        "layers only in A: 0",
    ]
    a = np.mean([Run(runs["red"]).word_map("cat", step=0, layer=layer) for layer in (1, 2)], 0)
    b = Run(runs["short"]).word_map("cat", step=0)
    row = next(row for row in found["words"] if row["word"] == "cat")
    assert [row["word"] for row in found["words"]] == ["red", "cat"]  # recorded as Red and cat in the short run
    assert row["mean absolute difference"] == near(np.abs(a - b).mean())
    mass = Run(runs["red"]).mass_grid(0)[1:].mean((0, 1))
    assert [row["A"] for row in found["region mass"]] == [near(value) for value in mass.ravel()]
    assert {row["what"] for row in found["what differs"]} >= {"steps", "recipe.record.layers", "recipe.record.words"}


def test_steps_of_other_numbers_are_paired_too(tmp_path):
    a = made_up(tmp_path / "a", samples.record(0), samples.record(1), timesteps=(999, 499))
    b = made_up(tmp_path / "b", samples.record(2), samples.record(3), samples.record(4), timesteps=(499, 249, 0))
    rows = compare(pair(a, b), metric="mass").tables["region mass"]
    assert [row["A"] for row in rows] == [near(value) for value in masses(1).mean((0, 1)).ravel()]
    assert [row["B"] for row in rows] == [near(value) for value in masses(2).mean((0, 1)).ravel()]


def test_steps_at_which_nothing_was_recorded_do_not_count(tmp_path):
    a, b = made_up(tmp_path / "a", samples.record(0), None), made_up(tmp_path / "b", samples.record(1))
    assert a.steps == (0, 1)
    assert pair(a, b).left_out == ()
    assert pair(a, b).whole


def test_a_step_with_fewer_layers_is_left_out_of_masses(tmp_path):
    few = samples.record(1, layers=(4,), mass=masses(1)[1:], maps={}, words=(), word_frames=None)
    a, b = (
        made_up(tmp_path / "a", samples.record(0), few),
        made_up(tmp_path / "b", samples.record(2), samples.record(3)),
    )
    found = compare(pair(a, b))
    assert [row["A"] for row in found.tables["region mass"]] == [near(v) for v in masses(0).mean((0, 1)).ravel()]
    assert [row["B"] for row in found.tables["region mass"]] == [near(v) for v in masses(2).mean((0, 1)).ravel()]
    apart = np.abs(a.word_map("red", step=0) - b.word_map("red", step=0)).mean()
    assert found.tables["words"][0]["mean absolute difference"] == near(apart)


def test_a_step_and_a_layer_by_their_number(runs, capsys):
    found = told(capsys, runs["red"], runs["short"], "--step", 3, "--layer", 2)
    a, b = (Run(runs[name]).mass(step=3, layer=2) for name in ("red", "short"))
    assert [row["A"] for row in found["region mass"]] == [near(value) for value in a.ravel()]
    assert [row["B"] for row in found["region mass"]] == [near(value) for value in b.ravel()]
    assert {row["layer"] for row in found["heads by region mass"]} == {2}
    assert found["left out"] == [line for line in found["left out"] if not line.startswith(("layers", "timesteps"))]


def test_maps_of_another_grid_are_left_out_and_their_segment_is_not(runs, recorded, capsys):
    found = told(capsys, runs["red"], recorded)
    assert "words" not in found
    (line,) = [line for line in found["left out"] if line.startswith("maps of")]
    assert line.startswith("maps of a, red, cat, runs, left: Both runs must have one shape. Got 3x4x4 and 6x4x4.")
    (row,) = told(capsys, runs["red"], recorded, "--segment", 0, "--word", "cat")["words"]
    a, b = Run(runs["red"]).word_map("cat"), Run(recorded).word_map("cat", segment=0)
    assert row["mean absolute difference"] == near(np.abs(a - b).mean())


def test_masses_of_a_segment(recorded, runs, capsys):
    (row,) = [
        row
        for row in told(capsys, recorded, recorded, "--segment", 3)["region mass"]
        if row["region"] == "video on text"
    ]
    assert row["A"] == near(Run(recorded).mass(segment=3)[2, 0])
    assert row["A"] != near(Run(recorded).mass(segment=0)[2, 0])


def test_frame_matrices_where_both_have_them(tmp_path):
    def matrix(seed):
        rows = np.random.default_rng(seed).random((2, 3, 5, 6)).astype(np.float32)
        return rows / rows.sum(-1, keepdims=True)

    a, b = (made_up(tmp_path / name, samples.record(0, frames=matrix(i))) for i, name in enumerate("ab"))
    found = compare(pair(a, b), metric="frames")
    x, y = matrix(0).mean((0, 1)), matrix(1).mean((0, 1))
    rows = {row["frames"]: row for row in found.tables["frames"]}
    assert rows["self-frame mass"]["A - B"] == near(np.trace(x) / 5 - np.trace(y) / 5)
    assert rows["causality"]["B"] == near(measure.causality(y))
    assert rows["decay per frame"]["A"] == near(measure.distance_decay(x)[0])
    assert rows["text mass"]["A"] == near(x[:, 5].mean())
    assert rows["first-frame mass"]["A"] == near(x[1:, 0].mean())
    assert np.allclose(found.arrays["frames"], x - y, atol=1e-6)
    assert set(found.tables) == {"what differs", "frames"}
    deep = compare(pair(a, b, layer=4), metric="frames")
    assert np.allclose(deep.arrays["frames"], (matrix(0) - matrix(1))[1].mean(0), atol=1e-6)
    bare = made_up(tmp_path / "bare", samples.record(0))
    with pytest.raises(UsageError, match="Got nothing: frame matrices: array must be one that was recorded"):
        compare(pair(a, bare), metric="frames")


def test_what_two_frames_do_not_define_is_not_told(tmp_path):
    few = np.full((2, 3, 2, 2), 0.5, np.float32)
    a, b = (made_up(tmp_path / name, samples.record(0, frames=few)) for name in "ab")
    told = [row["frames"] for row in compare(pair(a, b), metric="frames").tables["frames"]]
    assert told == ["self-frame mass", "first-frame mass", "causality"]


def test_metrics_where_both_have_them(tmp_path, monkeypatch):
    grids = np.random.default_rng(7).random((2, 2, 2, 3))  # run, step, layer, head
    grids[0, 1, 0, 2] = np.nan  # then the other run's number is no match either
    grids[1, :, 1, 1] = np.nan
    a, b = (made_up(tmp_path / name, samples.record(0), samples.record(1)) for name in "ab")
    monkeypatch.setattr(Run, "metrics", property(lambda run: ("entropy", "none", run.path.name)), raising=False)
    monkeypatch.setattr(
        Run,
        "metric_grid",
        lambda run, name, step, segment: grids["ab".index(run.path.name), step] * (np.nan if name == "none" else 1),
        raising=False,
    )
    found = compare(pair(a, b), metric="heads")
    x, y = grids.mean(1)
    x[0, 2], y[0, 2] = grids[:, 0, 0, 2]
    apart = np.abs(x - y)
    layer, head = np.unravel_index(np.nanargmax(apart), (2, 3))
    known = np.isfinite(x - y)
    assert known.sum() == 5
    assert found.tables["metrics"] == [
        {"metric": "entropy", "A": near(x[known].mean()), "B": near(y[known].mean())}
        | {"A - B": near(x[known].mean() - y[known].mean()), "most in layer": (1, 4)[layer], "head": head}
        | {"there": near((x - y)[layer, head])}
    ]
    back = compare(pair(b, a), metric="heads").tables["metrics"][0]
    assert (back["most in layer"], back["head"], back["there"]) == ((1, 4)[layer], head, near((y - x)[layer, head]))
    assert np.allclose(found.arrays["metric_entropy"], np.where(known, x - y, np.nan), equal_nan=True)
    assert found.left_out[:2] == ("metrics only in A: a", "metrics only in B: b")
    assert found.left_out[2].startswith("none: A metric must be defined")


def test_a_region_without_tokens_is_left_out(tmp_path):
    mass = masses(0)
    mass[:, :, 1] = np.nan
    a, b = made_up(tmp_path / "a", samples.record(0, mass=mass)), made_up(tmp_path / "b", samples.record(1))
    found = compare(pair(a, b), metric="mass").tables
    assert [row["region"] for row in found["region mass"]] == [
        name for name in REGIONS if not name.startswith("padding")
    ]
    assert {row["layer"] for row in found["heads by region mass"]} == {1, 4}
    assert not any(row["region"].startswith("padding") for row in found["heads by region mass"])


def test_exports(runs, capsys, tmp_path):
    found = told(capsys, runs["red"], runs["blue"], "--out", tmp_path / "diff.npz")
    assert found["file"] == str(tmp_path / "diff.npz")
    with np.load(tmp_path / "diff.npz") as file:
        assert set(file) >= {"layers", "region_mass", "word_a", "word_cat", "word_runs", "word_left"}
        assert file["layers"].tolist() == [0, 1, 2]
        a, b = (Run(runs[name]) for name in ("red", "blue"))
        assert np.allclose(file["word_cat"], a.word_map("cat") - b.word_map("cat"), atol=1e-6)
        grids = [np.mean([run.mass_grid(step) for step in run.steps], 0, dtype=float) for run in (a, b)]
        assert np.allclose(file["region_mass"].reshape(3, 2, 3, 4), grids[0] - grids[1], atol=1e-7)
    told(capsys, runs["red"], runs["blue"], "--export", "csv", "--out", tmp_path / "diff.csv")
    with (tmp_path / "diff.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["table"] for row in rows].count("words") == 4
    assert [float(row["A - B"]) for row in rows if row["table"] == "region mass"] == [
        row["A - B"] for row in found["region mass"]
    ]
    assert told(capsys, runs["red"], runs["blue"], "--export", "npz")["file"] == str(runs["red"] / "diff.npz")


def test_people_see_tables(runs, capsys):
    main_ok(["diff", str(runs["red"]), str(runs["short"])])
    shown = capsys.readouterr().out
    assert "recipe.record.layers" in shown
    assert "video on same frame" in shown
    assert "left out: layers only in A: 0" in shown
    main_ok(["diff", str(runs["red"]), str(runs["red"])])
    assert "what differs: nothing" in capsys.readouterr().out


def test_a_run_of_probe_record_has_no_recipe_to_compare(runs, tmp_path):
    rows = {row["what"]: row for row in unlike(made_up(tmp_path / "a", samples.record(0)), Run(runs["red"]))}
    assert rows["prompts"] == {"what": "prompts", "A": None, "B": [tiny.PROMPT]}
    assert rows["recipe.record.heads"] == {"what": "recipe.record.heads", "A": None, "B": "mean"}


@pytest.mark.parametrize(
    ("names", "arguments", "code", "sentence"),
    [
        (("red", "blue"), ["--word", "red"], 2, "recorded in both runs. Got 'red'. Both have: a, cat, runs, left."),
        (
            ("red", "blue"),
            ["--layer", "7"],
            2,
            "A layer to compare must be recorded in both runs. Got 7. Both have: 0, 1, 2.",
        ),
        (
            ("red", "short"),
            ["--step", "4"],
            2,
            "A step to compare must be recorded in both runs. Got 4. Both have: 0, 1, 2, 3.",
        ),
        (("red", "blue"), ["--word", "cat", "--metric", "mass"], 2, "by the metric word. Got mass."),
        (("red", "blue"), ["--segment", "5"], 2, "Got nothing"),
        (("red", "blue"), ["--out", "x.png"], 2, "must be a file ending in .npz, .csv. Got x.png"),
        (("red", "blue"), ["--heads", "0"], 2, "Invalid value for '--heads'"),
        (("red", "nowhere"), [], 1, "run must be a folder"),
    ],
)
def test_a_wrong_request_is_one_sentence(runs, capsys, tmp_path, names, arguments, code, sentence):
    folders = [str(runs.get(name, tmp_path / name)) for name in names]
    assert sentence in refused(capsys, ["diff", *folders, *arguments], code)


def test_runs_with_nothing_in_common_are_refused(runs, tmp_path, capsys):
    late = made_up(tmp_path / "late", samples.record(0), timesteps=(3,))
    line = refused(capsys, ["diff", str(runs["red"]), str(late.path)], 2)
    assert "must share a recorded layer and the timestep of a step" in line
    deep = made_up(tmp_path / "deep", samples.record(0, layers=(8, 9)))
    assert "layers only in B: 8, 9" in refused(capsys, ["diff", str(runs["red"]), str(deep.path)], 2)
    other = made_up(tmp_path / "other", samples.record(0, mass=None, words=("sun", "moon")))
    line = refused(capsys, ["diff", str(runs["red"]), str(other.path)], 2)
    assert "must have something in common" in line
    assert ".." not in line
    assert "words only in B: sun, moon" in line
