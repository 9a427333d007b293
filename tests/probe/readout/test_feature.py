"""Principal components and correspondences against numpy, one token at a time."""

import numpy as np
import pytest
import torch

import probe
from probe.readout.feature import Correspondence, Features
from tests import tiny
from tests.probe.readout import calls
from tests.probe.readout.calls import GRID, matrix, one_call

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PATCHES = [(row, column) for row in range(GRID.height) for column in range(GRID.width)]


def output(call):
    """The call after its attention."""
    call.run_with_lse()
    return call


def video_of(call, name, per_head=True):
    """Tokens of the video float64 [H, video, D] or [1, video, H D], from the matrix for o."""
    if name == "o":
        tokens = matrix(call) @ call.v[0].double().numpy()[:, : matrix(call).shape[-1]]
    else:
        tokens = getattr(call, name)[0].double().numpy()
    rows = calls.where(call, "columns" if name in "kv" else "rows", "video")
    return tokens[:, rows] if per_head else np.concatenate(tokens[:, rows], -1)[None]


def slow_components(tokens, count):
    """By singular values of the centred tokens of one head."""
    centred = tokens - tokens.mean(0)
    _, singular, axes = np.linalg.svd(centred)
    axes = np.array([axis * np.sign(axis[np.abs(axis).argmax()]) for axis in axes[:count]])
    return centred @ axes.T, axes, singular[:count] ** 2 / (singular**2).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["q", "k", "v", "o"])
@pytest.mark.parametrize("per_head", [True, False])
def test_components_equal_those_of_numpy(dtype, name, per_head):
    call = output(one_call(dtype))
    value = calls.value_of(Features(name, components=2, per_head=per_head), call)
    half = dtype == torch.bfloat16 and name == "o"  # the only tensor that is rounded once more
    for head, tokens in enumerate(video_of(call, name, per_head)):
        projection, axes, explained = slow_components(tokens, 2)
        bound = 0.05 if half else 1e-5
        np.testing.assert_allclose(value["projection"][head].reshape(-1, 2), projection, atol=bound)
        np.testing.assert_allclose(value["axes"][head], axes, atol=bound)
        np.testing.assert_allclose(value["explained"][head], explained, atol=1e-3 if half else 1e-6)
    assert value["projection"].shape == (2 if per_head else 1, *GRID.shape, 2)


@pytest.mark.parametrize("given", calls.JOINT + calls.SELF + calls.CROSS, ids=str)
def test_components_are_of_the_video_alone(given):
    call = output(one_call(**given))
    names = "qo" if call.site.kind == "cross" else "qkvo"
    for name in names:
        value = calls.value_of(Features(name, per_head=True), call)
        for head, tokens in enumerate(video_of(call, name)):
            projection, *_ = slow_components(tokens, 3)
            np.testing.assert_allclose(value["projection"][head].reshape(-1, 3), projection, atol=1e-4)


def test_explained_variance_is_a_metric_of_heads():
    readout = Features("v", components=16, per_head=True)
    value = calls.value_of(readout, one_call())
    np.testing.assert_allclose(readout.metrics(value)["explained_variance_v"], [1, 1], atol=1e-5)
    assert set(readout.metrics(value)) == set(readout.definitions)
    for together in (Features("v"), Correspondence((0, 1))):
        assert together.metrics(calls.value_of(together, one_call())) == together.definitions == {}


def test_equal_tokens_have_no_components():
    call = one_call()
    call.rebind(k=torch.ones_like(call.k))
    value = calls.value_of(Features("k"), call)
    assert np.isnan(value["explained"]).all()
    assert np.abs(value["projection"]).max() == 0
    assert np.abs(Features.rgb(value)).max() == 0


def test_colours_span_all_frames():
    value = calls.value_of(Features("q", per_head=True), one_call())
    colours = Features.rgb(value)
    assert colours.shape == (2, *GRID.shape, 3)
    for head in range(2):
        for channel in range(3):
            x = value["projection"][head, ..., channel]
            np.testing.assert_allclose(colours[head, ..., channel], (x - x.min()) / (x.max() - x.min()), atol=1e-6)
    with pytest.raises(probe.MmditError, match="Colours must have 3 components. Got 2"):
        Features.rgb(calls.value_of(Features("q", components=2), one_call()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", calls.JOINT + calls.SELF, ids=str)
@pytest.mark.parametrize("frames", [(0, 1), (2, 0)])
def test_correspondence_of_the_attention_equals_the_matrix(dtype, given, frames):
    call = one_call(dtype, **given)
    value = calls.value_of(Correspondence(frames, per_head=True, radius=1), call)
    f, g = (calls.where(call, "rows", "video", frame) for frame in frames)
    p = matrix(call)
    for head in range(2):
        there, back = (p[head][np.ix_(one, two)] for one, two in ((f, g), (g, f)))
        expected = there / there.sum(-1, keepdims=True) @ PATCHES
        check_match(value, head, there, back, radius=1)
        np.testing.assert_allclose(value["expected"][head].reshape(-1, 2), expected, atol=1e-5)


def check_match(value, head, there, back, radius):
    match = value["match"][head].reshape(-1, 2)
    returns = value["returns"][head].reshape(-1)
    for start in range(len(PATCHES)):
        reached = there[start].argmax()
        assert tuple(match[start]) == PATCHES[reached]
        home = PATCHES[back[reached].argmax()]
        assert returns[start] == (max(abs(np.subtract(home, PATCHES[start]))) <= radius)


@pytest.mark.parametrize("name", ["q", "k", "v", "o"])
@pytest.mark.parametrize("per_head", [True, False])
def test_correspondence_of_features_is_the_nearest_by_angle(name, per_head):
    call = output(one_call())
    value = calls.value_of(Correspondence((1, 2), name, radius=0, per_head=per_head), call)
    assert set(value) == {"match", "returns"}
    tokens = video_of(call, name, per_head)
    for head, x in enumerate(tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)):
        scores = x[8:16] @ x[16:24].T
        check_match(value, head, scores, scores.T, radius=0)


def test_heads_can_be_taken_together():
    """Features stand side by side; of the attention it is the mean."""
    call = one_call()
    value = calls.value_of(Correspondence((0, 2)), call)
    f, g = (calls.where(call, "rows", "video", frame) for frame in (0, 2))
    blocks = [matrix(call)[:, one][:, :, two] for one, two in ((f, g), (g, f))]
    there, back = ((block / block.sum(-1, keepdims=True)).mean(0) for block in blocks)
    check_match(value, 0, there, back, radius=1)
    assert value["match"].shape == (1, GRID.height, GRID.width, 2)


def test_a_shifted_frame_is_found():
    """Frame 1 is frame 0 moved by one column, around the edge."""
    call = one_call(dim=32)
    shifted = call.k.clone()
    first, second = call.layout.frame_slice(0), call.layout.frame_slice(1)
    shifted[:, :, second] = call.k[:, :, first].unflatten(2, (2, 4)).roll(1, 3).flatten(2, 3)
    call.rebind(k=shifted)
    readout = Correspondence((0, 1), "k", radius=0, per_head=True)
    value = calls.value_of(readout, call)
    assert value["match"][0, :, :, 1].tolist() == [[1, 2, 3, 0]] * 2
    assert value["returns"].all()
    metrics = readout.metrics(value)
    assert set(metrics) == set(readout.definitions) == {"returning_k_0_1", "displacement_k_0_1"}
    np.testing.assert_allclose(metrics["returning_k_0_1"], [1, 1])
    np.testing.assert_allclose(metrics["displacement_k_0_1"], [1.5, 1.5])  # three columns go 1 on, the last one 3 back
    diagonal = {"match": np.full((1, 2, 4, 2), 3), "returns": np.array([[[True] * 4, [False] * 4]])}
    assert readout.metrics(diagonal)["returning_k_0_1"] == 0.5
    assert readout.metrics(diagonal)["displacement_k_0_1"][0] == pytest.approx(
        np.mean([np.hypot(3 - row, 3 - column) for row, column in PATCHES])
    )


def test_what_cannot_be_looked_at_is_refused():
    with pytest.raises(probe.MmditError, match="must be one of q, k, v, o. Got 'p'"):
        Features("p")
    with pytest.raises(probe.MmditError, match="must look after the attention. Got stage BEFORE"):
        Features("o", stage=probe.Stage.BEFORE)
    with pytest.raises(probe.MmditError, match="must be at least 1. Got 0"):
        Features("q", components=0)
    with pytest.raises(probe.MmditError, match="must be 1 to 32, the width of q. Got 33"):
        calls.value_of(Features("q", components=33), one_call())
    with pytest.raises(probe.MmditError, match=r"two different ones from 0. Got \(1, 1\)"):
        Correspondence((1, 1))
    for tensor in ("p", "q"):
        with pytest.raises(probe.MmditError, match="A frame must lie in 0 to 2. Got 3"):
            calls.value_of(Correspondence((0, 3), tensor), one_call())
    with pytest.raises(probe.MmditError, match="must select attention of a kind it can read"):
        probe.Plan([Features("k")], 2, 3, kinds=("cross",))


def test_features_of_a_run_change_nothing():
    readouts = Features("o"), Features("k"), Correspondence((0, 2)), Correspondence((0, 1), "o")
    pipe = tiny.pipeline()
    seen = tiny.latents(probe.trace(pipe, *readouts), steps=2)
    assert torch.equal(seen, tiny.latents(pipe, steps=2))
    assert {len(readout.values) for readout in readouts} == {2 * 3}
    layout = probe.TokenLayout("text-video", tiny.TEXT, probe.Grid(3, 4, 4))
    assert readouts[2].cost(layout) == pytest.approx(3 * (16 / 60) ** 2)
