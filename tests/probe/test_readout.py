"""Readouts against the whole matrix in float64, on the tensors of real calls."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import probe
from probe import region
from probe.plan import Handler, Stage
from tests import tiny
from tests.oracle import weights

BOUND = {torch.float64: 1e-6, torch.float32: 5e-6, torch.bfloat16: 2e-2}  # results are kept in float32


@dataclass(eq=False)
class KeepCalls(Handler):
    where: probe.Where = field(default_factory=probe.Where)
    stage = Stage.USED

    def begin(self, prompts, steps, layers):
        self.calls = {}

    def serve(self, call, rows):
        self.calls[call.site.step, call.site.layer] = call


def recorded(dtype, *readouts, prompt=tiny.PROMPT, rotary=True):
    keep = KeepCalls()
    tiny.latents(probe.trace(tiny.pipeline(rotary, dtype=dtype), keep, *readouts), prompt, steps=2)
    return keep.calls


@pytest.mark.parametrize("dtype", BOUND)
def test_word_maps_equal_the_matrix(dtype):
    readout = probe.WordMaps("cat", "red cat", per_head=True)
    calls = recorded(dtype, readout)
    assert len(calls) == len(readout.values) == 2 * 3
    for (step, branch, layer, *_), maps in readout.values.items():
        call = calls[step, layer]
        p = weights(call.q, call.k)[call.branches.index(branch)]
        for w, tokens in enumerate([[2], [1, 2]]):
            n, video = call.k.shape[-2], call.layout.video_slice
            vt = p[:, video, tokens].sum(-1) * n / len(tokens)
            tv = p[:, tokens, video].mean(1) * n
            for direction, expected in (("vt", vt), ("tv", tv)):
                got = torch.from_numpy(maps[direction][:, w]).flatten(1).double()
                assert ((got - expected).abs() / expected.abs().clamp_min(1)).max() < BOUND[dtype]


def test_word_maps_average_heads_and_can_choose_them():
    each, mean = probe.WordMaps("cat", per_head=True), probe.WordMaps("cat")
    second = probe.WordMaps("cat", where=probe.Where(heads=1))
    recorded(torch.float32, each, mean, second)
    for key, maps in each.values.items():
        assert np.allclose(mean.values[key]["vt"][0], maps["vt"].mean(0), rtol=1e-6)
        assert np.array_equal(second.values[key]["tv"][0], maps["tv"][1])


def test_readouts_of_words_see_the_conditional_half_only():
    """The unconditional half shows the negative prompt, whose words and padding are others."""
    default = probe.WordMaps("cat")
    recorded(torch.float32, default)
    assert {at.branch.guided for at in default.values} == {True}
    unconditional = probe.Where(branches=probe.Which(guided=False))
    for readout in (probe.WordMaps("cat", where=unconditional), probe.RegionMass(where=unconditional)):
        with pytest.raises(probe.MmditError, match="must look at conditional branches. Got unconditional prompt 0"):
            recorded(torch.float32, readout)


def test_words_are_named_once_and_those_cut_off_are_left_out():
    readout, twice = probe.WordMaps(), probe.WordMaps("cat", "cat")
    recorded(torch.float32, readout, twice, prompt="A cat and a dog and a cat on the snow " + "runs " * 3 + "left")
    assert next(iter(readout.words_of.values())) == ("A", "cat", "and", "dog", "on", "the", "snow")
    assert next(iter(twice.words_of.values())) == ("cat",)


def test_each_stage_sees_its_own_tensors():
    """Before an edit, after it, and the output that is merged."""

    @dataclass(eq=False)
    class Look(Handler):
        stage: Stage
        where: probe.Where = field(default_factory=lambda: probe.Where(layers=0, steps=0))

        def serve(self, call, rows):
            self.lse, self.k, self.q, self.out = call.lse().clone(), call.k, call.q, call.out

    @dataclass(eq=False)
    class Edit(Handler):
        stage: Stage
        where: probe.Where = field(default_factory=lambda: probe.Where(layers=0, steps=0))
        touches = frozenset("k")

        def serve(self, call, rows):
            if self.stage == Stage.EDIT:
                call.rebind(k=call.k * 2)
            else:
                call.out = call.out * 0

    pipe, before, used = tiny.pipeline(), Look(Stage.BEFORE), Look(Stage.USED)
    plain = tiny.latents(pipe, steps=1)
    tiny.latents(probe.trace(pipe, used, Edit(Stage.EDIT), before), steps=1)
    assert before.out is None
    assert torch.equal(used.k, before.k * 2)
    for seen in (before, used):
        expected = (seen.q.double() @ seen.k.double().mT / 4).logsumexp(-1)
        assert (seen.lse - expected).abs().max() < 1e-5
    assert (used.out - weights(used.q, used.k) @ call_v(pipe)).abs().max() < 1e-5
    merged = tiny.latents(probe.trace(pipe, Edit(Stage.MERGE)), steps=1)
    assert not torch.equal(merged, plain)


def call_v(pipe):
    keep = KeepCalls()
    tiny.latents(probe.trace(pipe, keep), steps=1)
    return keep.calls[0, 0].v.double()


def test_every_word_when_none_is_named():
    readout = probe.WordMaps()
    recorded(torch.float32, readout, prompt="a cat and a dog")
    assert next(iter(readout.words_of.values())) == ("a", "cat", "and", "dog")


def test_uniform_attention_has_lift_one():
    pipe = tiny.pipeline()
    for block in pipe.transformer.transformer_blocks:
        torch.nn.init.zeros_(block.attn1.norm_q.weight)
        torch.nn.init.zeros_(block.attn1.norm_q.bias)
    readout = probe.WordMaps("cat")
    tiny.latents(probe.trace(pipe, readout), steps=1)
    for maps in readout.values.values():
        assert np.allclose(maps["vt"], 1, atol=1e-5)
        assert np.allclose(maps["tv"], 1, atol=1e-5)


@pytest.mark.parametrize("dtype", BOUND)
def test_region_mass_equals_the_matrix(dtype):
    readout = probe.RegionMass()
    calls = recorded(dtype, readout)
    assert len(readout.values) == 2 * 3
    for (step, branch, layer, *_), table in readout.values.items():
        call = calls[step, layer]
        expected = slow_mass(call, call.branches.index(branch))
        assert np.abs(table - expected).max() < BOUND[dtype]
        assert np.allclose(table.sum(-1), 1, atol=1e-3 if dtype == torch.bfloat16 else 1e-5)


def slow_mass(call, row):
    """One token, one column at a time."""
    layout, prompt, p = call.layout, call.entry(row).prompt, weights(call.q, call.k)[row].numpy()
    kinds = ["text" if not pad else "padding" for pad in prompt.padding] + ["video"] * layout.grid.size
    frame = [None] * layout.text + [i // layout.grid.patches for i in range(layout.grid.size)]
    table = np.zeros((p.shape[0], 3, 4))
    for r, rows in enumerate(("text", "padding", "video")):
        inside = [i for i, kind in enumerate(kinds) if kind == rows]
        for i in inside:
            for j, kind in enumerate(kinds):
                same = frame[i] is not None and frame[i] == frame[j]
                column = {"text": 0, "padding": 1, "video": 2 if same else 3}[kind]
                table[:, r, column] += p[:, i, j] / len(inside)
    return table


def test_region_mass_without_padding_is_nan_there():
    readout = probe.RegionMass()
    recorded(torch.float32, readout, prompt=" ".join(["cat"] * 11))
    table = next(iter(readout.values.values()))
    assert np.isnan(table[:, 1]).all()
    assert np.allclose(table[:, [0, 2]].sum(-1), 1, atol=1e-5)
    assert np.abs(table[:, [0, 2], 1]).max() == 0


def test_readouts_of_one_call_share_its_lse(monkeypatch):
    pipe = tiny.pipeline()
    count = []
    real = probe.plan.AttentionCall.run_with_lse
    monkeypatch.setattr(probe.plan.AttentionCall, "run_with_lse", lambda call: count.append(1) or real(call))
    partial = []
    monkeypatch.setattr("probe.call.attend.partial", lambda *a, **k: partial.append(1))
    tiny.latents(probe.trace(pipe, probe.WordMaps("cat"), probe.WordMaps("red")), steps=1)
    assert len(count) == 3  # once per layer, and it served as the model's own attention
    assert not partial


def test_regions_name_tokens():
    pipe = tiny.pipeline()
    prompt = probe.trace(pipe).tokenize(["a cat on grass"])[0]
    layout = probe.TokenLayout("text-video", tiny.TEXT, probe.Grid(3, 4, 4))
    assert region.words("grass").indices(layout, prompt).tolist() == [3, 4, 5]
    assert (region.text() | region.padding()).indices(layout, prompt).tolist() == list(range(12))
    assert region.text().indices(layout, prompt).tolist() == list(range(7))  # four words in six pieces, and the end
    assert (region.video() & ~region.frames(0)).indices(layout, prompt).tolist() == list(range(28, 60))
    assert region.box(1, 2, 3, 4).indices(layout)[:4].tolist() == [18, 19, 22, 23]
    assert probe.TokenLayout("video-text", 12, probe.Grid(3, 4, 4)).text_slice == slice(48, 60)
    mask = np.zeros((3, 4, 4), bool)
    mask[2, 3, 3] = True
    assert region.tokens(mask).indices(layout).tolist() == [59]
    with pytest.raises(probe.MmditError, match="must have the grid's shape"):
        region.tokens(mask[:2]).indices(layout)
    with pytest.raises(probe.MmditError, match="must lie in 0 to 2"):
        region.frames(3).indices(layout)
    with pytest.raises(probe.MmditError, match="must come with the prompt"):
        region.words("cat").indices(layout)


def test_predicted_cost_counts_columns_and_frames():
    layout = probe.TokenLayout("text-video", tiny.TEXT, probe.Grid(3, 4, 4))
    prompts = probe.trace(tiny.pipeline()).tokenize([tiny.PROMPT])
    named, every = probe.WordMaps("cat", directions=("vt",)), probe.WordMaps()
    probe.Plan([named, every], 2, 3, prompts)
    assert named.cost(layout) == pytest.approx(1 / 60)
    assert every.cost(layout) == pytest.approx(2 * 5 / 60)
    assert probe.RegionMass().cost(layout) == pytest.approx((12 * 60 + 3 * 16 * 16) / 60**2)
