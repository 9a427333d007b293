"""The seam: bit-identical without handlers and while recording, exact against an independent patch, undone after
errors.
"""

import threading
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import CogVideoXDPMScheduler
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

import probe
from probe.errors import PlanError, TapError, WordError
from probe.models.registry import family_of
from probe.plan import Handler, Stage
from probe.tap import Tap
from tests import tiny
from tests.oracle import JointCalls, patched_attention

TOKENS = tiny.TEXT + 3 * 16


@pytest.fixture(scope="module", params=[False, True], ids=["sincos", "rotary"])
def pipe(request):
    return tiny.pipeline(rotary=request.param)


@dataclass(eq=False)
class Doubled(Handler):
    """v doubled: the simplest edit."""

    where: probe.Where = field(default_factory=probe.Where)
    stage = Stage.EDIT
    touches = frozenset("v")

    def serve(self, call, rows):
        v = call.v.clone()
        v[list(rows)] *= 2
        call.rebind(v=v)


def readouts():
    return probe.WordMaps("cat"), probe.RegionMass()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_recording_never_changes_a_bit(pipe, sampler, guidance):
    stock = pipe.scheduler
    if sampler == "dpm":
        pipe.scheduler = CogVideoXDPMScheduler.from_config(stock.config)
    call = {"guidance_scale": guidance, "output_type": "np"}
    plain = tiny.latents(pipe, **call)
    assert (tiny.latents(probe.trace(pipe), **call) == plain).all()
    maps, mass = readouts()
    assert (tiny.latents(probe.trace(pipe, maps, mass), **call) == plain).all()
    assert len(maps.values) == len(mass.values) == 4 * 3
    pipe.scheduler = stock


def test_offloaded_before_and_after():
    for when in ("before", "after"):
        pipe = tiny.pipeline()
        plain = tiny.latents(pipe)
        if when == "before":
            pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(tiny.latents(probe.trace(pipe, *readouts())), plain)
        if when == "after":
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(tiny.latents(probe.trace(pipe, *readouts())), plain)


@pytest.mark.parametrize(("step", "layer"), [(0, 0), (2, 1), (3, 2)])
def test_an_edit_equals_an_independent_patch(pipe, step, layer):
    where = probe.Where(steps=step, layers=layer, branches=probe.Which(guided=True))
    edited = tiny.latents(probe.trace(pipe, Doubled(where)))
    calls = JointCalls(3, TOKENS)

    def replacement(plain, q, k, v, **rest):
        if calls.next(q) == (step, layer):
            v = torch.cat([v[:1], v[1:] * 2])
        return plain(q, k, v, **rest)

    with patched_attention(replacement):
        expected = tiny.latents(pipe)
    assert calls.count == 4 * 3
    assert torch.equal(edited, expected)
    assert not torch.equal(edited, tiny.latents(pipe))


def test_two_prompts_are_two_branches(pipe):
    prompts = [tiny.PROMPT, tiny.OTHER]
    maps = probe.WordMaps("red", "blue")
    tiny.latents(probe.trace(pipe, maps), prompts)
    assert {branch.prompt: words for branch, words in maps.words_of.items()} == {0: ("red",), 1: ("blue",)}


def test_everything_is_undone_after_an_error(pipe):
    class Broken(Doubled):
        def serve(self, call, rows):
            raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        tiny.latents(probe.trace(pipe, Broken()))
    assert all(type(b.attn1.processor) is CogVideoXAttnProcessor2_0 for b in pipe.transformer.transformer_blocks)
    assert not pipe.transformer._forward_pre_hooks
    assert torch.equal(tiny.latents(probe.trace(pipe, *readouts())), tiny.latents(pipe))


def test_an_error_of_the_model_keeps_its_type(pipe):
    with pytest.raises(ValueError, match="height"):
        probe.trace(pipe)(prompt=tiny.PROMPT, height=13, num_inference_steps=1)


def test_an_edit_that_meets_no_call_is_an_error(pipe):
    nobody = probe.Where(branches=probe.Which(prompt=5))
    with pytest.raises(PlanError, match="Doubled, which met none"):
        tiny.latents(probe.trace(pipe, Doubled(nobody)))
    with pytest.raises(PlanError, match="selects none of 4 steps"):
        tiny.latents(probe.trace(pipe, Doubled(probe.Where(steps=slice(9, 12)))))


def test_clashing_edits_are_refused_and_named(pipe):
    with pytest.raises(PlanError, match="Doubled and Doubled"):
        tiny.latents(probe.trace(pipe, Doubled(probe.Where(layers=slice(0, 2))), Doubled(probe.Where(layers=1))))
    one, other = (probe.Where(branches=probe.Which(guided=True)), probe.Where(branches=probe.Which(prompt=0)))
    with pytest.raises(PlanError, match="at step 0 layer 0"):
        tiny.latents(probe.trace(pipe, Doubled(one), Doubled(other)))
    apart = Doubled(probe.Where(layers=0)), Doubled(probe.Where(layers=1))
    tiny.latents(probe.trace(pipe, *apart))


def test_an_unknown_word_lists_the_words(pipe):
    with pytest.raises(WordError, match="Got 'zebra'. The words are: a, red, cat, runs, left"):
        tiny.latents(probe.trace(pipe, probe.WordMaps("zebra")))


def test_a_run_inside_a_run_is_refused(pipe):
    class Nested(Doubled):
        def serve(self, call, rows):
            tiny.latents(probe.trace(pipe))

    with pytest.raises(TapError, match="second run inside the first"):
        tiny.latents(probe.trace(pipe, Nested()))
    assert torch.equal(tiny.latents(probe.trace(pipe)), tiny.latents(pipe))


def test_threads_take_turns(pipe):
    plain = tiny.latents(pipe)
    results = []

    def work():
        results.append(tiny.latents(probe.trace(pipe, *readouts())))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(results) == 4
    assert all(torch.equal(result, plain) for result in results)


def test_a_forward_of_another_thread_is_refused_and_changes_nothing(pipe):
    said = []

    def intrude():
        try:
            pipe.transformer(torch.randn(1, 3, 4, 8, 8), torch.randn(1, tiny.TEXT, 16), torch.tensor([5]))
        except TapError as error:
            said.append(str(error))

    class Meanwhile(Doubled):
        touches = frozenset()

        def serve(self, call, rows):
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    traced = tiny.latents(probe.trace(pipe, Meanwhile(probe.Where(steps=1, layers=1))))
    assert len(said) == 1
    assert "Got a forward from another thread" in said[0]
    assert torch.equal(traced, tiny.latents(pipe))


def test_gradient_checkpointing_is_refused(pipe):
    pipe.transformer.enable_gradient_checkpointing()
    try:
        with pytest.raises(TapError, match="gradient checkpointing"):
            Tap(pipe.transformer, family_of(pipe.transformer)).__enter__()
    finally:
        pipe.transformer.disable_gradient_checkpointing()


def test_fusing_while_traced_is_noticed():
    pipe = tiny.pipeline()

    def drive(_):
        pipe.transformer.fuse_qkv_projections()
        return tiny.latents(pipe)

    with pytest.raises(TapError, match=r"Got none from layers \[0, 1, 2\]"):
        probe.trace(pipe).run(drive, [tiny.PROMPT])


def test_plain_nnsight_on_the_tap(pipe):
    with Tap(pipe.transformer, family_of(pipe.transformer)) as tap:  # noqa: SIM117 (nnsight reads the block's source)
        with tap.nnsight.trace(True, fn=lambda _: tiny.latents(pipe, steps=1)):
            out = tap.layers[1].output.save()
    assert out.shape == (2, 2, TOKENS, 16)


def test_no_tensor_of_a_call_outlives_it(pipe):
    class Watch(Doubled):
        stage = Stage.USED
        touches = frozenset()

        def serve(self, call, rows):
            alive.append(sum(ref() is not None for ref in refs))
            refs.extend(weakref.ref(tensor) for tensor in (call.q, call.k, call.v))

    refs, alive = [], []
    tiny.latents(probe.trace(pipe, Watch()), steps=3)
    assert len(refs) == 3 * 3 * 3
    assert alive == [0] * 9  # gone when the next layer is served
    assert all(ref() is None for ref in refs)
