"""One contract for every model family, on whole pipelines at toy size. Each test proves one capability, and the table
of the README is made of the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

import probe
from probe.models.family import asked
from probe.plan import Handler, Stage
from probe.site import JOINT
from tests import tiny
from tests.toys import Case, cases
from tests.toys.bench import STEPS, Keep, bench_of, matrix, slow_mass, starts
from tests.toys.stock import arguments_of, first_layer, followed, silence, with_patch

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU

PROMPTS = [tiny.PROMPT, "a dog sits on the red grass and snow"]
MIXING = ("o", "o_proj", "out_proj")  # what attention gives, in every text encoder
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module", params=cases(), ids=str)
def bench(request):
    return bench_of(request.param)


# --- layout ---


@pytest.mark.capability("layout proved")
def test_the_model_proves_itself(bench):
    findings = probe.prove(bench.pipe)
    assert all(finding.passed for finding in findings), findings
    assert len(findings) == 5 * len(bench.models)


@pytest.mark.capability("layout proved")
def test_each_patch_and_each_word_has_the_row_the_layout_says(bench):
    """Change one patch or one text token of the last batch entry: one row of the first layer changes."""
    model, joint = bench.case.pipeline().transformer, bench.family.kinds & JOINT
    (inputs, *_) = arguments_of(bench.pipe.transformer, bench.latents)
    silence(model, *getattr(bench.case.toy, "MIXERS", ()))
    nth = -1 if bench.family.ragged else 0
    layout, plain = bench.family.layout(model, inputs), first_layer(model, inputs)
    grid = layout.grid
    if bench.family.ragged:
        layout = layout.with_text(len(plain[nth][0][0]) - grid.size)
    for frame, y, x in ((0, 0, 0), (0, 0, grid.width - 1), (grid.frames - 1, grid.height - 1, 0)):
        video = with_patch(inputs["hidden_states"], (frame, y, x), grid.shape, bench.family.frame_axis)
        moved = first_layer(model, {**inputs, "hidden_states": video})
        start = (layout if joint else layout.with_text(0)).frame_slice(frame).start
        assert rows_changed(moved[nth][0], plain[nth][0]) == [start + y * grid.width + x]
    for token in (0, 4):
        text = inputs["encoder_hidden_states"].clone()
        text[-1, token] += 1
        moved = first_layer(model, {**inputs, "encoder_hidden_states": text})
        at = nth if joint else 1
        start = (layout if joint else layout.text_alone(layout.text)).text_slice.start
        assert rows_changed(moved[at][1], plain[at][1]) == [start + token]


@pytest.mark.capability("layout proved")
def test_the_sequence_is_predicted_before_anything_runs(bench):
    """From the configuration and the call, at the compression of the released autoencoders: 8 x 8 pixels."""
    (inputs, *_) = arguments_of(bench.pipe.transformer, bench.latents)
    layout, latent = bench.family.layout(bench.pipe.transformer, inputs), inputs["hidden_states"]
    packed = latent.dim() == 3  # 2 x 2 latent pixels to a token
    height, width = (2 * n for n in layout.grid.shape[1:]) if packed else latent.shape[-2:]
    text = asked(bench.pipe, {}, "max_sequence_length")
    call = bench.pipe.defaults | {"height": 8 * height, "width": 8 * width, "max_sequence_length": text}
    assert bench.family.clip(bench.pipe.transformer.config, call) == layout


def rows_changed(moved: Tensor, plain: Tensor) -> list[int]:
    return (moved != plain).any(-1).any(0).nonzero().flatten().tolist()


# --- nothing changes unasked ---


@pytest.mark.capability("recording bit-identical")
def test_tracing_and_recording_never_change_a_bit(bench):
    maps, mass = bench.word_maps("red"), probe.RegionMass()
    assert torch.equal(bench.case.toy.latents(probe.trace(bench.pipe), steps=STEPS), bench.plain)
    assert torch.equal(bench.latents(maps, mass), bench.plain)
    conditional = [call for call in bench.calls if call.conditional]
    assert len(maps.values) == len(mass.values) > 0
    assert len(mass.values) == sum(bench.kind_of(call) != "self" for call in conditional)


# --- edits ---

EDITS = {"v": lambda v: v * 2, "k": lambda k: k + 0.25, "out": lambda out: out.flip(-1) * 0.5}


def edited(name: str, tensor: Tensor, rows: tuple[int, ...]) -> Tensor:
    new = tensor.clone()
    new[list(rows)] = EDITS[name](tensor[list(rows)])
    return new


@dataclass(eq=False)
class Edit(Handler):
    name: str
    where: probe.Where

    def __post_init__(self):
        self.stage = Stage.MERGE if self.name == "out" else Stage.EDIT
        self.touches = frozenset({self.name})

    def serve(self, call, rows):
        new = edited(self.name, getattr(call, self.name), rows)
        if self.name == "out":
            call.out = new
        else:
            call.rebind(**{self.name: new})


@pytest.mark.capability("edits exact")
@pytest.mark.parametrize("name", EDITS)
def test_edits_equal_an_independent_patch(bench, name):
    """In the first layer of each kind of attention at the first step, and in the last one at the last step."""
    slots = bench.family.slots(bench.pipe.transformer)
    alike = [[slot for slot in slots if slot.kind == kind] for kind in sorted({slot.kind for slot in slots})]
    ends = [(step, each[step and -1]) for each in alike for step in (0, STEPS - 1)]
    sites = {(step, slot.layer, slot.call) for step, slot in ends}
    guided = probe.Which(guided=True)
    edits = [Edit(name, probe.Where(step, slot.layer, branches=guided, kinds={slot.kind})) for step, slot in ends]

    def patched(call, run, q, k, v):
        nth = 0 if bench.family.ragged else call.nth
        if (call.step, call.layer, nth) not in sites or not call.conditional:
            return run(q, k, v)
        if name == "out":
            return edited(name, run(q, k, v), call.conditional)
        given = {"k": k, "v": v}
        given[name] = edited(name, given[name], call.conditional)
        return run(q, given["k"], given["v"])

    with followed(bench.pipe, bench.turns, patched):
        expected = bench.latents()
    assert torch.equal(bench.latents(*edits), expected)
    assert not torch.equal(expected, bench.plain)


# --- every call ---


@pytest.mark.capability("each call once")
def test_each_call_is_seen_once_and_named(bench):
    keep = Keep()
    bench.latents(keep)
    sites = [(c.site.step, c.site.turn, c.site.layer, c.site.call, guided_rows(c)) for c in keep.calls]
    assert sites == [(c.step, c.turn, c.layer, c.nth, c.conditional) for c in bench.calls]
    assert [len(call.q) for call in keep.calls] == [call.rows for call in bench.calls]
    assert {call.layer for call in bench.calls} == set(range(bench.case.toy.LAYERS))
    if not bench.case.variant:
        assert len(keep.calls) == bench.case.toy.CALLS_PER_STEP * STEPS


@pytest.mark.capability("each call once")
def test_without_guidance_every_entry_is_conditional(bench):
    distilled = bench.case.toy.FAMILY in ("HunyuanVideo", "FLUX")  # there, guidance_scale is an input of the model
    keep = Keep()
    bench.latents(keep, **{"true_cfg_scale" if distilled else "guidance_scale": 1.0})
    assert len(keep.calls) == STEPS * len(bench.family.slots(bench.pipe.transformer))
    assert all(call.branches == (probe.Branch(),) for call in keep.calls)


def guided_rows(call: Any) -> tuple[int, ...]:
    return tuple(row for row, branch in enumerate(call.branches) if branch.guided)


@pytest.mark.capability("undone after errors")
def test_everything_is_undone_after_an_error(bench):
    class Broken(Keep):
        def serve(self, call, rows):
            raise RuntimeError("broken on purpose")

    modules = [slot.module for model in bench.models for slot in bench.family.slots(model)]
    processors = [module.processor for module in modules]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        bench.latents(Broken(probe.Where(steps=STEPS - 1, layers=-1)))
    assert [module.processor for module in modules] == processors
    for model in bench.models:
        assert not model._forward_pre_hooks
        assert "cache_context" not in vars(model)
    assert torch.equal(bench.latents(), bench.plain)


# --- words and masses ---


@pytest.mark.capability("word maps exact")
def test_word_maps_equal_the_matrix(bench):
    """Two prompts of different length in one batch."""
    keep, maps = Keep(), bench.word_maps("red")
    bench.latents(keep, maps, prompt=PROMPTS)
    assert {at.branch.prompt for at in maps.values} == {0, 1}
    for at, value in maps.values.items():
        call, row = keep.found(at)
        p, size = matrix(call, row), call.layout.grid.size
        tokens = torch.tensor(keep.prompts[at.branch.prompt].tokens_of("red"))
        rows, columns, video = starts(call)
        own = p[:, video : video + size] if video >= 0 else p
        expected = {"vt": own[..., columns + tokens].mean(-1)}
        if "tv" in value:
            expected["tv"] = p[:, rows + tokens, video : video + size].mean(1)
        for direction, lift in value.items():
            wanted = expected[direction] * p.shape[-1]
            got = torch.from_numpy(lift[:, 0]).flatten(1).double()
            assert ((got - wanted).abs() / wanted.clamp_min(1)).max() < 5e-6


@pytest.mark.capability("word maps exact")
def test_a_word_is_where_it_changes_the_text(bench):
    """With the attention of the text encoders silent, another word changes its own rows of the text alone."""
    pipe = bench.case.pipeline()
    for name in ENCODERS:
        if getattr(pipe, name, None) is not None:
            silence(getattr(pipe, name), *MIXING)
    (prompt,) = probe.trace(pipe).tokenize([tiny.PROMPT])
    plain, *others = (
        arguments_of(pipe.transformer, lambda text=text: bench.case.toy.latents(pipe, text, steps=2))[0]
        for text in (tiny.PROMPT, tiny.PROMPT.replace("cat", "dog"), tiny.PROMPT.replace("left", "right"))
    )
    for word, other in zip(("cat", "left"), others, strict=True):
        moved, text = (given["encoder_hidden_states"][-1:] for given in (other, plain))
        assert rows_changed(moved, text) == list(prompt.tokens_of(word))


@pytest.mark.capability("region mass exact")
def test_region_mass_equals_the_matrix(bench):
    keep, mass = Keep(), probe.RegionMass()
    bench.latents(keep, mass, prompt=PROMPTS)
    assert {at.branch.prompt for at in mass.values} == {0, 1}
    for at, value in mass.values.items():
        call, row = keep.found(at)
        expected = slow_mass(call, row, keep.prompts[at.branch.prompt].padding)
        assert np.nanmax(np.abs(value - expected)) < 5e-6
        assert (np.isnan(value) == np.isnan(expected)).all()
        assert np.allclose(np.nansum(value, -1)[~np.isnan(value).any(-1)], 1, atol=1e-5)


# --- time ---


SIGMAS = "the pipeline sets the sigmas, which no second-order sampler of diffusers takes"
FIRST_ORDER = dict.fromkeys(("HunyuanVideo", "Mochi", "FLUX"), SIGMAS)


@pytest.mark.capability("second-order sampler", without=FIRST_ORDER)
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' HeunDiscreteScheduler with numpy 2
def test_both_forwards_of_a_second_order_step_are_its_turns(bench):
    stock, keep = bench.pipe.scheduler, Keep()
    heun = HeunDiscreteScheduler if bench.case.toy.FAMILY == "CogVideoX" else FlowMatchHeunDiscreteScheduler
    bench.pipe.scheduler = heun.from_config(stock.config)
    try:
        plain = bench.latents(steps=3)
        assert torch.equal(bench.latents(keep, steps=3), plain)
    finally:
        bench.pipe.scheduler = stock
    evaluations = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]  # the last step is of first order
    expected = [(step, bench.turns * turn + half) for step, turn in evaluations for half in range(bench.turns)]
    assert list(dict.fromkeys((call.site.step, call.site.turn) for call in keep.calls)) == expected


def test_steps_whose_timesteps_round_to_one_number_are_told_apart():
    """As in bfloat16 at the start of a large picture."""
    case, keep = Case("flux"), Keep(probe.Where(layers=0))
    pipe = case.toy.pipeline(distilled=False, dtype=torch.bfloat16)
    case.toy.latents(probe.trace(pipe, keep), steps=4, sigmas=[1.0, 0.9999, 0.9998, 0.5], true_cfg_scale=1.0)
    assert [call.site.step for call in keep.calls] == [0, 1, 2, 3]


@pytest.mark.capability("own loop")
def test_what_a_loop_tells_beats_what_the_model_says(bench):
    """The same timestep again and again, told as the second step of five and its turns."""
    model = bench.pipe.transformer
    (inputs, *_) = arguments_of(model, bench.latents)
    branches = [probe.Branch(prompt=i, role="source") for i in range(len(inputs["hidden_states"]))]

    @torch.no_grad()
    def drive(clock):
        for step, turn in ((1, 0), (1, 1), (2, 0)):
            clock.tell(step, 5, branches, turn)
            model(**inputs)

    keep, some = Keep(), Keep(probe.Where(steps=1, turns=1, layers=0, branches=probe.Which(role="source")))
    probe.trace(bench.pipe, keep, some).run(drive, [tiny.PROMPT])
    assert list(dict.fromkeys((call.site.step, call.site.turn) for call in keep.calls)) == [(1, 0), (1, 1), (2, 0)]
    assert 3 * len(some.calls) == sum(call.site.layer == 0 for call in keep.calls)
    assert {branch for call in some.calls for branch in call.branches} == set(branches)


# --- memory ---


@pytest.mark.capability("model offload")
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_before_and_after(bench, when):
    pipe, latents = bench.case.pipeline(), bench.case.toy.latents
    traced = probe.trace(pipe, bench.word_maps("red"))
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(latents(traced, steps=STEPS), bench.plain)
    if when == "after":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(latents(traced, steps=STEPS), bench.plain)
