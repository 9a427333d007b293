"""The loop against the stock pipeline, bit for bit; resume; guidance fixtures; Transfer against an independent
patch.
"""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

import control
import probe
from control.adapter import Loop
from control.denoise import Guided, State, denoise
from control.schedule import dynamic_guidance
from probe.errors import PlanError, UsageError
from tests import tiny
from tests.oracle import JointCalls, patched_attention

CLASSES = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}


@pytest.fixture(scope="module", params=[False, True], ids=["sincos", "rotary"])
def pipe(request):
    return tiny.pipeline(rotary=request.param)


def ours(
    pipe, sampler, steps=4, guidance=3.0, prompts=(tiny.PROMPT,), handlers=(), until=None, start=None, dynamic=False
):
    loop = Loop(pipe, steps, seed=0, sampler=sampler)
    text = loop.encode(prompts)
    negative = loop.encode([""] * len(prompts)) if guidance > 1 else None
    start = start or State.start(loop, len(prompts), loop.clip_frames, text.dtype)
    kept = {}

    def keep(state):
        kept[state.step] = state

    scale = (lambda t: dynamic_guidance(t, steps, guidance)) if dynamic else (lambda t: guidance)
    drive = lambda clock: denoise(loop, Guided(loop, text, negative, scale, clock), start, keep)  # noqa: E731
    done = probe.trace(pipe, *handlers).run(drive, prompts)
    return loop, (kept[until] if until else done)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_bit_identical_to_the_stock_pipeline(pipe, sampler, guidance):
    pipe.scheduler = CLASSES[sampler].from_config(pipe.scheduler.config)
    call = {"guidance_scale": guidance}
    loop, state = ours(pipe, sampler, guidance=guidance)
    assert torch.equal(state.latents, tiny.latents(pipe, **call))
    frames = tiny.latents(pipe, **call, output_type="np")
    assert (loop.decode(state.latents) == (frames * 255).round().astype("uint8")).all()
    recorded = ours(pipe, sampler, guidance=guidance, handlers=[probe.WordMaps("cat"), probe.RegionMass()])[1]
    assert torch.equal(recorded.latents, state.latents)


def test_dynamic_guidance_as_the_stock_pipeline(pipe):
    stock = tiny.latents(pipe, guidance_scale=6.0, use_dynamic_cfg=True)
    assert torch.equal(ours(pipe, "model", guidance=6.0, dynamic=True)[1].latents, stock)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_a_saved_state_goes_on_to_the_same_bits(pipe, sampler):
    whole = ours(pipe, sampler)[1]
    half = ours(pipe, sampler, until=2)[1]
    assert half.step == 2
    assert (half.previous_x0 is None) == (sampler == "ddim")
    assert torch.equal(ours(pipe, sampler, start=half)[1].latents, whole.latents)


def test_steps_that_the_scheduler_cannot_take(pipe):
    with pytest.raises(UsageError, match=r"must divide 1000.*Got 30. Take 25"):
        Loop(pipe, 30, 0)
    with pytest.raises(UsageError, match="Got 0. Take 1"):
        Loop(pipe, 0, 0)
    with pytest.raises(UsageError, match="seed must lie in"):
        Loop(pipe, 25, -1)
    with pytest.raises(UsageError, match="seed must lie in"):
        Loop(pipe, 25, 2**63)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7])
def test_no_latent_frame_is_lost_in_decoding(pipe, frames):
    latents = torch.randn(1, frames, 4, 8, 8)
    assert Loop(pipe, 4, 0).decode(latents).shape == (1, 4 * (frames - 1) + 1, 32, 32, 3)


def test_the_guidance_table_of_50_steps():
    timesteps = [999 - 20 * i for i in range(50)]
    table = [dynamic_guidance(t, 50, 6.0) for t in timesteps]
    first = [2.291, 2.544, 6.974, 6.420, 2.788, 4.272, 1.038, 4.170, 1.618, 6.983]
    middle = [1.655, 6.610, 1.195, 4.295, 6.985, 1.521, 1.762, 1.058, 4.128, 1.482]
    last = [6.999, 2.343, 6.213, 1.251, 7.000, 6.864, 1.064, 1.000, 1.000, 1.123]
    assert table[:10] == pytest.approx(first, abs=6e-4)
    assert table[20:30] == pytest.approx(middle, abs=6e-4)
    assert table[40:] == pytest.approx(last, abs=6e-4)


def test_the_noise_schedule_of_2b(pipe):
    alphas = Loop(pipe, 50, 0).scheduler.alphas_cumprod.double().sqrt()
    for timestep, value in {999: 0, 979: 0.005215, 959: 0.010913, 939: 0.017117, 19: 0.972920}.items():
        assert alphas[timestep].item() == pytest.approx(value, abs=2e-6)


@pytest.mark.parametrize("tensors", ["k", "v", "kv", "q", "qk", "qkv"])
def test_transfer_equals_an_independent_patch(pipe, tensors):
    prompts = [tiny.PROMPT, tiny.OTHER]
    where = probe.Where(steps=slice(1, 3), layers={0, 2})
    edited = tiny.latents(probe.trace(pipe, control.Transfer(tensors, source=0, target=1, where=where)), prompts)
    calls = JointCalls(3, tiny.TEXT + 48)

    def shared(plain, q, k, v, **rest):
        at = calls.next(q)
        if at is not None and at[0] in (1, 2) and at[1] in (0, 2):
            index = [0, 0, 2, 2]  # unconditional, conditional; the second prompt reads the first
            q, k, v = (x[index] if name in tensors else x for name, x in zip("qkv", (q, k, v), strict=True))
        return plain(q, k, v, **rest)

    with patched_attention(shared):
        expected = tiny.latents(pipe, prompts)
    assert torch.equal(edited, expected)
    plain = tiny.latents(pipe, prompts)
    assert torch.equal(edited[0], plain[0])
    assert not torch.equal(edited[1], plain[1])


def test_transfer_of_some_heads(pipe):
    prompts = [tiny.PROMPT, tiny.OTHER]
    every = tiny.latents(probe.trace(pipe, control.Transfer("kv", 0, 1, probe.Where(heads={0, 1}))), prompts)
    assert torch.equal(every, tiny.latents(probe.trace(pipe, control.Transfer("kv", 0, 1)), prompts))
    one = tiny.latents(probe.trace(pipe, control.Transfer("kv", 0, 1, probe.Where(heads=1))), prompts)
    assert not torch.equal(one, every)


def test_transfer_from_itself_is_the_identity(pipe):
    itself = control.Transfer("qkv", source=lambda branch: branch)
    nobody = control.Transfer("kv", source=lambda branch: None)
    assert torch.equal(tiny.latents(probe.trace(pipe, itself)), tiny.latents(pipe))
    assert torch.equal(tiny.latents(probe.trace(pipe, nobody)), tiny.latents(pipe))


def test_chained_transfers_do_not_depend_on_their_order(pipe):
    prompts = [tiny.PROMPT, tiny.OTHER, "the cat sits on grass"]
    here = probe.Where(steps=0, layers=0)
    one, other = control.Transfer("kv", 0, 1, here), control.Transfer("kv", 1, 2, here)
    first = tiny.latents(probe.trace(pipe, one, other), prompts)
    assert torch.equal(first, tiny.latents(probe.trace(pipe, other, one), prompts))
    assert torch.equal(first[2], tiny.latents(probe.trace(pipe, other), prompts)[2])


def test_transfer_refuses(pipe):
    with pytest.raises(UsageError, match="tensors among q, k, v"):
        control.Transfer("kx", source=0)
    with pytest.raises(PlanError, match="must be in the same attention call.*conditional prompt 0"):
        tiny.latents(probe.trace(pipe, control.Transfer("kv", source=3, target=0)))
