"""Skipping equals a model whose blocks are patched by hand, or whose projections are zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import probe
from control.skip import Skip
from probe.errors import UsageError
from probe.region import video
from tests.control.hand import blocks_of, patched_block
from tests.toys import Case
from tests.toys.bench import STEPS, bench_of

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

CASES = [Case("cogvideox"), Case("hunyuan"), Case("mochi"), Case("sd3"), Case("sd3", "3.5"), Case("flux"), Case("wan")]
GUIDED = probe.Which(guided=True)


@pytest.fixture(scope="module", params=CASES, ids=str)
def bench(request):
    return bench_of(request.param)


def ends(bench):
    """The first and the last layer, and the first of the second list of blocks."""
    lists = [len(getattr(bench.pipe.transformer, name, ())) for name in ("transformer_blocks", "blocks")]
    return sorted({0, min(sum(lists), bench.case.toy.LAYERS - 1), bench.case.toy.LAYERS - 1})


def test_a_skipped_block_gives_what_it_was_given(bench):
    def skipped(taken, out, entries):
        new = out.clone()
        new[entries] = taken[entries]
        return new

    for layer in ends(bench):
        with patched_block(bench, layer, skipped):
            expected = bench.latents()
        got = bench.latents(Skip(where=probe.Where(layers=layer, branches=GUIDED)))
        assert torch.equal(got, expected)
        assert not torch.equal(got, bench.plain)


def test_rows_of_the_video_can_be_skipped_alone(bench):
    """Half of the way: the text goes on as the block made it."""

    def halfway(taken, out, entries):
        new = out.clone()
        new[entries] = torch.lerp(out[entries], taken[entries], 0.5)
        return new

    with patched_block(bench, 0, halfway, streams=("video",)):
        expected = bench.latents()
    got = bench.latents(Skip("block", rows=video(), strength=0.5, where=probe.Where(layers=0, branches=GUIDED)))
    assert torch.equal(got, expected)


def silent(block: nn.Module, what: str) -> None:
    """Zero the projection through which a part of the block reaches the stream; in a single-stream block, its columns
    of the shared one.
    """
    if hasattr(block, "proj_mlp"):
        width = block.proj_out.out_features
        nn.init.zeros_(block.proj_out.weight[:, :width] if what == "attention" else block.proj_out.weight[:, width:])
        return
    if what == "attention":
        modules = [getattr(block, name, None) for name in ("attn", "attn1", "attn2")]
        last = [m.to_out[0] for m in modules if m is not None] + [getattr(m, "to_add_out", None) for m in modules]
    else:
        last = [ff.net[2] for ff in (getattr(block, name, None) for name in ("ff", "ff_context", "ffn")) if ff]
    for module in filter(None, last):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


@pytest.mark.parametrize("what", ["attention", "feed_forward"])
def test_a_skipped_part_equals_a_zero_projection(bench, what):
    for layer in ends(bench):
        pipe = bench.case.pipeline()
        with torch.no_grad():
            silent(blocks_of(pipe.transformer)[layer], what)
        expected = bench.case.toy.latents(pipe, steps=STEPS)
        got = bench.latents(Skip(what, where=probe.Where(layers=layer)))
        assert torch.equal(got, expected)
        assert not torch.equal(got, bench.plain)


def test_one_attention_of_a_layer_can_be_skipped_alone():
    for case, kind, name in ((Case("wan"), "cross", "attn2"), (Case("sd3", "3.5"), "joint", "attn")):
        bench, pipe = bench_of(case), case.pipeline()
        module = getattr(blocks_of(pipe.transformer)[0], name)
        for part in filter(None, (module.to_out[0], getattr(module, "to_add_out", None))):
            for parameter in part.parameters():
                nn.init.zeros_(parameter)
        got = bench.latents(Skip("attention", where=probe.Where(layers=0, kinds={kind})))
        assert torch.equal(got, case.toy.latents(pipe, steps=STEPS))


def test_a_soft_skip_counts_once_where_a_layer_attends_twice():
    bench = bench_of(Case("wan"))

    def halfway(taken, out, _):
        return torch.lerp(out, taken, 0.5)

    with patched_block(bench, 1, halfway):
        expected = bench.latents()
    assert torch.equal(bench.latents(Skip(strength=0.5, where=probe.Where(layers=1))), expected)


def test_strength_zero_leaves_every_bit(bench):
    assert torch.equal(bench.latents(Skip(strength=0.0), Skip("attention", strength=0.0)), bench.plain)


def test_what_cannot_be_skipped_is_refused():
    with pytest.raises(UsageError, match="block, attention, feed_forward. Got 'layer'"):
        Skip("layer")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="leave heads out"):
        Skip(where=probe.Where(heads=0))
