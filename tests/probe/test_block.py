"""Changes outside of attention: they are shown what the modules gave, and nothing else changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import probe
from probe.block import Later, Point, Streams
from probe.errors import TapError
from probe.layout import Grid, TokenLayout
from probe.plan import Handler, Stage
from tests.control.hand import blocks_of
from tests.toys import Case
from tests.toys.bench import STEPS, bench_of

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

CASES = [Case("cogvideox"), Case("hunyuan"), Case("mochi"), Case("sd3"), Case("sd3", "3.5"), Case("flux"), Case("wan")]
POINTS: tuple[Point, ...] = ("attention", "feed_forward", "block")


@pytest.fixture(scope="module", params=CASES, ids=str)
def bench(request):
    return bench_of(request.param)


@dataclass(eq=False)
class Ask(Handler):
    """Asks for every entry of every call; `change` makes the video and text that go on, the same by default."""

    point: Point
    where: probe.Where = field(default_factory=probe.Where)
    change: Any = lambda taken, made: made
    by: object = None
    stage = Stage.MERGE

    def begin(self, prompts: Any, steps: int, layers: int) -> None:
        self.seen: list[tuple[Any, int, Streams]] = []

    def serve(self, call: Any, rows: tuple[int, ...]) -> None:
        def keep(row: int, taken: Streams, made: Streams) -> Streams:
            self.seen.append((call.site, row, made.each(torch.clone)))
            return self.change(taken, made)

        call.later += [Later(self.point, row, lambda *told, row=row: keep(row, *told), self.by) for row in rows]


@contextmanager
def followed(block: Any, point: Point) -> Iterator[list[Tensor]]:
    """What the modules of a block give while it runs, in order."""
    kept: list[Tensor] = []
    if point == "feed_forward" and hasattr(block, "proj_mlp"):  # the shared projection takes [attention, feed-forward]
        width = block.proj_out.out_features
        handles = [block.proj_out.register_forward_pre_hook(lambda _, args: kept.append(args[0][..., width:].clone()))]
    else:
        names = {"attention": ("attn", "attn1"), "feed_forward": ("ff", "ff_context", "ffn"), "block": ()}[point]
        modules = [getattr(block, name, None) for name in names] if names else [block]
        handles = [
            module.register_forward_hook(
                lambda *told: kept.extend(told[-1] if isinstance(told[-1], tuple) else told[-1:])
            )
            for module in modules
            if module is not None
        ]
    yield kept
    for handle in handles:
        handle.remove()


def by_length(tensors: list[Tensor], layout: TokenLayout) -> dict[str, Tensor]:
    """The streams [B, N, C] of a forward, told by how many rows they have."""
    streams: dict[str, Tensor] = {}
    for x in (x for x in tensors if x is not None):
        start = layout.text if layout.order == "text-video" else 0
        name = {layout.grid.size: "video", layout.text: "text"}.get(x.shape[1])
        if name:
            streams.setdefault(name, x)
        elif len(streams) == 0:
            streams["video"] = x[:, start : start + layout.grid.size]
            streams["text"] = x[:, : layout.text] if start else x[:, layout.grid.size :]
    return streams


@pytest.mark.parametrize("point", POINTS)
def test_a_change_is_shown_what_the_module_gave(bench, point):
    slots = bench.family.slots(bench.pipe.transformer)
    for layer in (0, bench.case.toy.LAYERS - 1):
        kind = next(slot.kind for slot in slots if slot.layer == layer)
        ask = Ask(point, probe.Where(layers=layer, kinds={kind}))
        with followed(blocks_of(bench.pipe.transformer)[layer], point) as kept:
            traced = probe.trace(bench.pipe, ask)
            assert torch.equal(bench.case.toy.latents(traced, steps=STEPS), bench.plain)
        expected = by_length(kept, traced.layout)
        first = [one for one in ask.seen if (one[0].step, one[0].turn) == (0, 0)]
        for name, wanted in expected.items():
            seen = {
                row + (site.call if bench.family.ragged else 0): getattr(made, name)
                for site, row, made in first
                if getattr(made, name) is not None
            }
            assert sorted(seen) == list(range(len(wanted)))
            assert all(torch.equal(made, wanted[entry]) for entry, made in seen.items())
        assert "video" in expected


@pytest.mark.parametrize("module", ["cogvideox", "mochi", "sd3"])
def test_the_other_entries_of_the_batch_keep_their_bits(module):
    """Where both halves of guidance are one batch."""
    bench = bench_of(Case(module))
    layer, kept = bench.case.toy.LAYERS - 2, {}
    twice = Ask("block", probe.Where(layers=layer, steps=0, branches=probe.Which(guided=True)), doubled)
    for name, handlers in (("plain", ()), ("changed", (twice,))):
        look = Ask("block", probe.Where(layers=layer + 1, steps=0, branches=probe.Which(guided=False)))
        bench.latents(look, *handlers)
        kept[name] = [made for *_, made in look.seen]
    assert len(kept["plain"]) > 0
    assert all(torch.equal(a.video, b.video) for a, b in zip(kept["plain"], kept["changed"], strict=True))


def doubled(_: Streams, made: Streams) -> Streams:
    return made.each(lambda x: 2 * x)


def test_changes_of_one_place_build_on_each_other(bench):
    """Doubled twice is four times as much; doubled twice by the same edit, at two attentions of a layer, is doubled."""
    at, several = probe.Where(layers=0), len({slot.call for slot in bench.family.slots(bench.pipe.transformer)}) > 1
    four = Ask("block", at, lambda _, made: made.each(lambda x: 4 * x), by="four")
    one, other = (Ask("block", at, doubled, by=name) for name in ("one", "other"))
    assert torch.equal(bench.latents(one, other), bench.latents(four))
    free = bench.latents(Ask("block", at, doubled))
    assert torch.equal(free, bench.latents(one)) != several


def test_what_a_change_holds_is_let_go_behind_its_block():
    """Else the tensors of all layers would be there at once."""

    class Hold(Ask):
        def serve(self, call: Any, rows: tuple[int, ...]) -> None:
            assert [one() for one in self.held[:-1]] == [None] * len(self.held[:-1])
            mine = torch.zeros(1)
            self.held.append(weakref.ref(mine))
            call.later.append(Later("block", 0, lambda _, made: made.each(lambda x: x + mine)))

        held: ClassVar[list[Any]] = []

    bench = bench_of(Case("flux"))
    bench.latents(Hold("block", probe.Where(steps=0, turns=0)))
    assert len(Hold.held) == bench.case.toy.LAYERS


def test_hooks_are_taken_off_after_an_error(bench):
    def broken(*_):
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        bench.latents(Ask("block", probe.Where(steps=1, layers=-1), broken))
    hooks = [m for model in bench.models for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert torch.equal(bench.latents(Ask("block")), bench.plain)


def test_rows_in_pieces_are_refused():
    """SD3 can send its feed-forward through in chunks, which the change would take for whole streams."""
    bench = bench_of(Case("sd3"))
    for block in blocks_of(bench.pipe.transformer):
        block.set_chunk_feed_forward(12, dim=1)
    with pytest.raises(TapError, match="all 24 rows at once. Got 12"):
        bench.latents(Ask("feed_forward"))


def test_a_mask_over_the_rows_is_parted_and_filled_up():
    """The rows of a call come in the order of its layout; text that the call leaves out is not in the mask."""
    mask, grid = torch.tensor([True, False, True, False, False, True]), Grid(1, 2, 2)
    parted = Streams.parted(mask, TokenLayout("text-video", 2, grid))
    assert parted.text is not None
    assert parted.text.tolist() == [True, False]
    plain, new = (Streams(torch.full((4, 1), x), torch.full((3, 1), x)) for x in (0.0, 1.0))
    chosen = plain.where(parted, new)
    assert chosen.video is not None
    assert chosen.text is not None
    assert chosen.video.flatten().tolist() == [1, 0, 0, 1]
    assert chosen.text.flatten().tolist() == [1, 0, 0]
    assert Streams.parted(None, TokenLayout("text-video", 2, grid)) == Streams(None, None)
