"""The loop against the stock pipeline, bit for bit; prompts in lockstep; resume; guidance fixtures."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

import probe
from control.adapter import Loop
from control.denoise import Lockstep, State, denoise
from control.schedule import dynamic_guidance
from probe.errors import UsageError
from probe.site import Branch
from tests import tiny
from tests.toys import cogvideox

CLASSES = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}


@pytest.fixture(scope="module", params=[False, True], ids=["sincos", "rotary"])
def pipe(request):
    return tiny.pipeline(rotary=request.param)


def ours(
    pipe,
    sampler,
    steps=4,
    guidance=3.0,
    prompts=(tiny.PROMPT,),
    handlers=(),
    until=None,
    start=None,
    dynamic=False,
    noise="shared",
):
    loop = Loop(pipe, steps, seed=0, sampler=sampler, noise=noise)
    text = loop.encode(prompts)
    negative = loop.encode([""] * len(prompts)) if guidance > 1 else None
    start = start or State.start(loop, len(prompts), loop.clip_frames, text.dtype)
    kept = {}

    def keep(state):
        kept[state.step] = state

    scale = (lambda t: dynamic_guidance(t, steps, guidance)) if dynamic else (lambda t: guidance)
    drive = lambda clock: denoise(loop, Lockstep(loop, text, negative, scale, clock), start, keep)  # noqa: E731
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


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_a_batch_of_prompts_is_bit_identical_to_the_stock_batch(pipe, sampler, guidance):
    pipe.scheduler = CLASSES[sampler].from_config(pipe.scheduler.config)
    prompts = [tiny.PROMPT, tiny.OTHER]
    state = ours(pipe, sampler, guidance=guidance, prompts=prompts, noise="each")[1]
    assert torch.equal(state.latents, tiny.latents(pipe, prompts, guidance_scale=guidance))


@pytest.mark.parametrize("noise", ["shared", "each"])
def test_a_saved_state_of_a_batch_goes_on_to_the_same_bits(pipe, noise):
    batch = {"prompts": [tiny.PROMPT, tiny.OTHER], "noise": noise}
    whole, half = (ours(pipe, "dpm", until=until, **batch)[1] for until in (None, 2))
    assert torch.equal(ours(pipe, "dpm", start=half, **batch)[1].latents, whole.latents)


def test_the_batch_of_a_step_is_both_halves_in_the_order_of_the_prompts(pipe):
    loop = Loop(pipe, 4, seed=0)
    text = loop.encode([tiny.PROMPT, tiny.OTHER])
    both = Lockstep(loop, text, text, lambda t: 3.0)
    assert both.branches(0) == [Branch(prompt=i, guided=half) for half in (False, True) for i in (0, 1)]
    assert both.clip_forwards() == [4, 4, 4, 4]
    alone = Lockstep(loop, text, None, lambda t: 1.0, shown=(Branch(1), Branch(1, copy=1)))
    assert alone.branches(3) == [Branch(1), Branch(1, copy=1)]
    assert alone.clip_forwards() == [2, 2, 2, 2]
    for negative, shown in ((text[:1], ()), (text, (Branch(),))):
        with pytest.raises(UsageError, match="as many negatives and branches as texts"):
            Lockstep(loop, text, negative, lambda t: 3.0, shown=shown)


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


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_a_model_with_two_latent_frames_per_token_frame_equals_the_stock_pipeline(sampler):
    pipe = cogvideox.pipeline(rotary=True, patch_size_t=2)
    pipe.scheduler = CLASSES[sampler].from_config(pipe.scheduler.config)
    loop, state = ours(pipe, sampler)
    assert state.latents.shape[1] == loop.clip_frames == 4  # three, and one that fills up the first token frame
    assert torch.equal(state.latents, tiny.latents(pipe))
    frames = tiny.latents(pipe, output_type="np")
    assert frames.shape[1] == 9
    assert (loop.decode(state.latents) == (frames * 255).round().astype("uint8")).all()
