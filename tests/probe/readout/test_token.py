"""Token mass and word maps against the whole matrix in float64."""

import numpy as np
import pytest
import torch

import probe
from probe import measure
from probe.layout import Grid
from probe.readout import token
from probe.readout.token import TokenMass
from probe.readout.word import Direction
from tests.probe.readout import calls

BOUND = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-4, torch.float16: 2e-4}  # kept in float32


def text(call, side):
    """The text tokens, padding included."""
    return sorted(calls.where(call, side, "text") + calls.where(call, side, "padding"))


@pytest.mark.parametrize("given", calls.JOINT + calls.CROSS, ids=str)
@pytest.mark.parametrize("dtype", BOUND)
def test_token_mass_equals_the_matrix(dtype, given, monkeypatch):
    monkeypatch.setattr(token, "_CHUNK", 7)
    call, joint = calls.one_call(dtype, **given), given not in calls.CROSS
    readout, p = TokenMass(text_rows=joint), calls.matrix(call)
    value = calls.value_of(readout, call)
    assert set(value) == ({"video", "text"} if joint else {"video"})
    for group in value:
        expected = p[:, calls.where(call, "rows", group)][:, :, text(call, "columns")].mean(1)
        assert value[group].dtype == np.float32
        assert (np.abs(value[group] - expected) / expected).max() < BOUND[dtype]
    assert np.array_equal(readout.table(value), value["video"])
    if not joint:
        assert np.allclose(value["video"].sum(-1), 1, atol=1e-4)


def test_padding_is_told_apart_by_the_prompt():
    call, table = calls.one_call(), probe.RegionMass()
    mass = calls.value_of(TokenMass(), call)["video"]
    pads = np.array(call.prompts[0].padding)
    regions = calls.value_of(table, call)[:, 2]
    assert np.allclose(mass[:, pads].sum(-1), regions[:, 1], atol=1e-6)
    assert np.allclose(mass[:, ~pads].sum(-1), regions[:, 0], atol=1e-6)


def test_uniform_attention_has_enrichment_one():
    call, readout = calls.one_call(), TokenMass()
    call.rebind(q=call.q * 0)
    mass = calls.value_of(readout, call)["video"]
    keys = next(iter(readout.layouts.values())).total
    assert np.allclose(measure.enrichment(mass, np.ones(7), keys), 1, atol=1e-5)


def test_metrics_are_what_their_definitions_name():
    call, readout = calls.one_call(), TokenMass()
    metrics = readout.metrics(calls.value_of(readout, call))
    mass = calls.matrix(call)[:, 7:, :7].mean(1)
    assert list(metrics) == list(readout.definitions)
    assert np.allclose(metrics["first_token_mass"], mass[:, 0], atol=1e-6)
    assert np.allclose(metrics["largest_token_mass"], mass.max(-1), atol=1e-6)


def test_text_rows_are_refused_where_there_are_none():
    probe.Plan([TokenMass()], 1, 1, kinds={"cross"})
    with pytest.raises(probe.MmditError, match="must select attention of a kind it can read. Got TokenMass"):
        probe.Plan([TokenMass(text_rows=True)], 1, 1, kinds={"self", "cross"})


def test_token_mass_costs_the_text_columns():
    assert TokenMass().cost(probe.TokenLayout("text-video", 7, Grid(3, 2, 4))) == 7 / 31


def slow_map(call, words, direction):
    """Lift [H, words, video], one word at a time."""
    p = calls.matrix(call)
    keys, rows = (calls.where(call, side, "video") for side in ("columns", "rows"))
    columns = text(call, "columns")
    found = []
    for tokens in words:
        if direction in ("vt", "vt_text"):
            vt = p[:, rows][:, :, columns]
            if direction == "vt_text":
                vt = vt / vt.sum(-1, keepdims=True) * len(columns) / p.shape[-1]
            found.append(vt[:, :, tokens].mean(-1) * p.shape[-1])
        elif direction == "tv":
            tv = p[:, [text(call, "rows")[t] for t in tokens]][:, :, keys]
            found.append(tv.mean(1) * p.shape[-1])
        else:
            found.append((slow_map(call, [tokens], "vt") + slow_map(call, [tokens], "tv"))[:, 0] / 2)
    return np.stack(found, 1)


@pytest.mark.parametrize("given", calls.JOINT + calls.CROSS, ids=str)
@pytest.mark.parametrize("dtype", BOUND)
def test_word_maps_equal_the_matrix(dtype, given):
    call = calls.one_call(dtype, **given)
    directions: tuple[Direction, ...] = ("vt", "vt_text") if given in calls.CROSS else ("vt", "vt_text", "tv", "mean")
    words = ("cat", "red cat", "left")
    maps = calls.value_of(probe.WordMaps(*words, directions=directions, per_head=True), call)
    mean = calls.value_of(probe.WordMaps(*words, directions=directions), call)
    for direction in directions:
        expected = slow_map(call, [[2], [1, 2], [4]], direction).reshape(2, 3, 3, 2, 4)
        bound = BOUND[dtype] * np.maximum(expected, 1)
        assert (np.abs(maps[direction] - expected) < bound).all()
        assert np.allclose(mean[direction][0], expected.mean(0), rtol=BOUND[dtype], atol=BOUND[dtype])


def test_word_maps_conditional_on_text_equal_those_of_cross_attention():
    call = calls.one_call(kind="cross")
    maps = calls.value_of(probe.WordMaps("cat", directions=("vt", "vt_text")), call)
    assert np.allclose(maps["vt"], maps["vt_text"], rtol=1e-5)
