"""Masks made while a run goes on, against numpy and scikit-image on the maps that the same run recorded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from skimage import filters, measure

import probe
from control.adapter import Loop
from control.address import gate_of, inside
from control.denoise import Lockstep, State, denoise
from control.edit import Edit
from control.extract import ExtractMask
from control.latent import Blend
from probe.errors import LayoutError, PlanError, UsageError, WordError
from probe.plan import Handler, Stage
from probe.site import Branch, Progress, Where, Which
from tests import tiny
from tests.oracle import weights
from tests.toys import Case
from tests.toys.bench import STEPS as FAMILY_STEPS
from tests.toys.bench import Keep, matrix, starts

STEPS, GRID = 3, (3, 4, 4)
CONDITIONAL = Branch()


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(rotary=True)


def traced(pipe, *handlers, prompt=tiny.PROMPT, **call):
    return tiny.latents(probe.trace(pipe, *handlers), prompt, steps=STEPS, **call)


def mean_map(maps, word, direction="vt", branch=CONDITIONAL, before=STEPS, only=None):
    """The mean [F, Y, X] of what WordMaps kept: of steps before one, or of one step."""
    (index,) = (i for i, name in enumerate(maps.words_of[branch]) if name == word)
    kept = [
        value[direction][:, index].mean(0)
        for at, value in maps.values.items()
        if at.branch == branch and (at.step < before if only is None else at.step == only)
    ]
    return np.mean(kept, 0)


def scaled(values, axes=None):
    low, high = values.min(axes, keepdims=True), values.max(axes, keepdims=True)
    return (values - low) / (high - low)


@dataclass(eq=False)
class Look(Handler):
    """Keeps what an area is at each call, on one side, for each branch."""

    area: object
    side: str = "rows"
    where: Where = field(default_factory=Where)
    stage = Stage.EDIT

    def begin(self, prompts, steps, layers):
        self.seen, self.sites = {}, {}

    def serve(self, call, rows):
        for row in rows:
            found = self.area.inside(call, row, self.side).clone()
            self.sites[call.site, call.branches[row]] = found
            self.seen[call.site.step, call.site.layer, call.branches[row]] = found


@dataclass(eq=False, kw_only=True)
class Loud(Edit):
    """Values of its rows twice as large."""

    touches = frozenset({"v"})
    rank = 2

    def apply(self, call, entry, amount):
        v = call.writable("v")
        v[entry, :, inside(self.rows, call, entry)] *= 2


# --- maps ---


@pytest.mark.parametrize("direction", ["vt", "vt_text", "tv", "mean"])
def test_the_score_is_the_mean_of_the_recorded_maps(pipe, direction):
    extract = ExtractMask("cat", direction=direction, per="none")
    maps = probe.WordMaps("cat", directions=(direction,))
    traced(pipe, extract, maps)
    assert np.allclose(extract.score(), mean_map(maps, "cat", direction), rtol=1e-5)


def test_only_the_chosen_layers_steps_and_heads_count(pipe):
    where = Where(layers={0, 2}, steps=slice(1, 3), heads=1)
    extract, maps = ExtractMask("cat", where=where), probe.WordMaps("cat", where=where)
    traced(pipe, extract, maps)
    assert len(maps.values) == 4
    assert np.allclose(extract.score(), scaled(mean_map(maps, "cat")), atol=1e-5)


def test_words_together_are_all_of_their_tokens():
    """ "grass" has three tokens, "cat" one."""
    pipe, keep = tiny.pipeline(dtype=torch.float64), Keep()
    extract = ExtractMask(("cat", "grass"), direction="mean")
    traced(pipe, extract, keep, prompt="the cat sits on grass")
    (prompt,) = keep.prompts
    tokens = [*prompt.tokens_of("cat"), *prompt.tokens_of("grass")]
    assert len(tokens) == 4
    maps = []
    for call in keep.calls:
        p, video = weights(call.q, call.k)[1], call.layout.video_slice
        maps.append((p[:, video, tokens].mean(-1) + p[:, tokens, video].mean(1)).mean(0))
    expected = torch.stack(maps).mean(0).view(GRID).numpy()
    assert np.allclose(extract.score(), scaled(expected), atol=1e-10)


def test_a_map_conditional_on_the_video_is_normalised_over_its_tokens():
    pipe, keep, extract = tiny.pipeline(dtype=torch.float64), Keep(), ExtractMask("cat", direction="tv_video")
    traced(pipe, extract, keep)
    maps = []
    for call in keep.calls:
        p = weights(call.q, call.k[:, :, call.layout.video_slice])[1]
        maps.append(p[:, keep.prompts[0].tokens_of("cat")].mean((0, 1)))
    assert np.allclose(extract.score(), scaled(torch.stack(maps).mean(0).view(GRID).numpy()), atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "power", "bound"),
    [(torch.float64, 2, 1e-10), (torch.bfloat16, 2, 2e-2), (torch.float16, 20, 1e-1)],
)
def test_a_propagated_map_went_through_the_attention_of_the_video(dtype, power, bound):
    pipe, keep = tiny.pipeline(rotary=True, dtype=dtype), Keep()
    extract = ExtractMask("cat", propagate=2, power=power, per="none", rivals=("red",))
    traced(pipe, extract, keep)
    maps = {"cat": [], "red": []}
    for call in keep.calls:
        p, video = weights(call.q, call.k)[1], call.layout.video_slice
        between = weights(call.q[:, :, video], call.k[:, :, video])[1].mean(0)
        for word, kept in maps.items():
            lift = p[:, video, list(keep.prompts[0].tokens_of(word))].mean((0, 2)) * p.shape[-1]
            kept.append(between @ between @ lift**power)
    cat, red = (torch.stack(kept).mean(0).view(GRID).numpy() for kept in maps.values())
    assert np.abs(extract.score() - (cat - red)).max() < bound * np.abs(cat).max()


@pytest.mark.parametrize("case", [Case("sd3"), Case("hunyuan"), Case("wan"), Case("mochi")], ids=str)
@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's own, on every CPU
def test_masks_of_every_order_of_tokens(case):
    """Text behind the video, hidden, ragged or in a call of its own: the map of the matrix, at the video's rows."""
    prompts, keep = [tiny.PROMPT, "a dog sits on the red grass and snow"], Keep()
    extract = ExtractMask("red", method="top", value=0.3)
    guided = Where(branches=Which(guided=True))
    look, seen_from = Look(extract, where=guided), Look(extract, "columns", guided)
    case.toy.latents(probe.trace(case.pipeline(), extract, keep, look, seen_from), prompts, steps=FAMILY_STEPS)
    for prompt, branch in enumerate((Branch(0), Branch(1))):
        maps = {0: [], 1: []}
        for call in keep.calls:
            if branch not in call.branches or call.site.kind == "self":
                continue
            row, (_, columns, video) = call.branches.index(branch), starts(call)
            p, size = matrix(call, row), call.layout.grid.size
            own = p[:, video : video + size] if video >= 0 else p
            tokens = columns + torch.tensor(keep.prompts[prompt].tokens_of("red"))
            maps[call.site.step].append(own[..., tokens].mean((0, 2)) * p.shape[-1])
        first, both = (torch.stack(maps[0] + more).mean(0).numpy() for more in ([], maps[1]))
        assert np.allclose(extract.score(branch).ravel(), scaled(both), atol=1e-4)
        for call in keep.calls:
            if branch not in call.branches or call.site.step == 0:
                continue
            area, columns = (one.sites[call.site, branch] for one in (look, seen_from))
            assert len(columns) == call.columns.total
            assert columns.sum() == (0 if call.site.kind == "cross" else area.sum())
            assert len(area) == call.rows.total
            assert area.sum() == max(1, round(0.3 * len(first)))
            assert area[call.rows.video_slice][first.argmax()]


# --- masks ---


def test_the_mask_is_cut_by_scikit_image(pipe):
    maps = probe.WordMaps("cat", "red")
    per_frame = ExtractMask("cat", sigma=0.8, per="frame", method="threshold", value=0.4)
    otsu, largest = ExtractMask("cat"), ExtractMask("cat", method="top", value=1 / 6, component=True)
    share = ExtractMask("cat", method="top", value=1 / 6)
    margin = ExtractMask("cat", rivals=("red",), method="threshold", value=0.1)
    traced(pipe, maps, per_frame, otsu, largest, share, margin)
    cat, red = mean_map(maps, "cat"), mean_map(maps, "red")
    blurred = np.stack([filters.gaussian(frame, 0.8) for frame in cat])
    assert np.array_equal(per_frame.mask(), scaled(blurred, (1, 2)) > 0.4)
    assert np.array_equal(otsu.mask(), cat > filters.threshold_otsu(cat.ravel(), nbins=256))
    top = cat >= np.sort(cat.ravel())[-8]
    assert np.array_equal(share.mask(), top)
    labels = measure.label(top, connectivity=1)
    assert np.array_equal(largest.mask(), labels == 1 + np.bincount(labels[labels > 0] - 1).argmax())
    assert largest.mask().sum() < top.sum()
    assert np.array_equal(margin.mask(), scaled(cat) > scaled(red) + 0.1)
    assert 0 < margin.mask().sum() < margin.mask().size


def test_soft_masks_are_weights_for_gates_only(pipe):
    soft, refused = ExtractMask("cat", soft=True), []
    maps = probe.WordMaps("cat")

    class Use(Look):
        def serve(self, call, rows):
            super().serve(call, rows)
            assert torch.equal(gate_of(soft, call, rows[0]), soft.inside(call, rows[0], "rows"))
            with pytest.raises(UsageError, match="inside or outside. Got soft weights from ExtractMask"):
                inside(soft, call, rows[0])
            refused.append(call.site)

    look, rest = Use(soft), Look(~soft)
    traced(pipe, soft, maps, look, rest)
    expected = torch.from_numpy(scaled(mean_map(maps, "cat", before=2))).flatten().float()
    seen = look.seen[2, 1, CONDITIONAL]
    assert len(refused) == 3 * STEPS
    assert torch.allclose(seen[tiny.TEXT :], expected, atol=1e-5)
    assert not seen[: tiny.TEXT].any()
    assert torch.allclose(rest.seen[2, 1, CONDITIONAL][tiny.TEXT :], 1 - expected, atol=1e-5)
    assert np.array_equal(soft.values(), soft.score())
    assert soft.mask().dtype == bool


# --- time ---


@pytest.mark.parametrize("stage", [Stage.BEFORE, Stage.USED])
def test_an_area_comes_from_the_steps_before(pipe, stage):
    extract, maps = ExtractMask("cat", method="threshold", value=0.5, stage=stage), probe.WordMaps("cat")
    rows, columns, rest = Look(extract), Look(extract, "columns"), Look(~extract)
    traced(pipe, extract, maps, rows, columns, rest)
    for (step, layer, branch), area in rows.seen.items():
        mask = scaled(mean_map(maps, "cat", before=step)) > 0.5 if step else np.zeros(GRID, bool)
        assert not area[: tiny.TEXT].any()
        assert np.array_equal(area[tiny.TEXT :].view(GRID), mask)
        assert torch.equal(columns.seen[step, layer, branch], area)
        outside = rest.seen[step, layer, branch]
        assert not outside[: tiny.TEXT].any()
        assert np.array_equal(outside[tiny.TEXT :].view(GRID), ~mask if step else mask)
    assert {branch.guided for *_, branch in rows.seen} == {False, True}


def test_an_area_within_a_step_grows_with_its_layers(pipe):
    """Stage.BEFORE: the map of the call itself is among them."""
    how = {"method": "threshold", "value": 0.5, "within": "step", "where": Where(steps=slice(1, 3))}
    first, later = ExtractMask("cat", stage=Stage.BEFORE, **how), ExtractMask("cat", **how)
    maps, looks = probe.WordMaps("cat", stage=Stage.BEFORE), [Look(first), Look(later)]
    traced(pipe, first, later, maps, *looks)
    for step in range(STEPS):
        own = [maps.word_map("cat", step, layer, CONDITIONAL) for layer in range(3)]
        for layer in range(3):
            for look, count in zip(looks, (layer + 1, layer), strict=True):
                count = count if step else 0
                mask = scaled(np.mean(own[:count], 0)) > 0.5 if count else np.zeros(GRID, bool)
                assert np.array_equal(look.seen[step, layer, CONDITIONAL][tiny.TEXT :].view(GRID), mask)
    assert np.allclose(first.score(), scaled(np.mean(own, 0)), atol=1e-5)


def test_an_unknown_mask_holds_nothing_or_everything(pipe):
    everything = ExtractMask("cat", unknown="all", where=Where(steps=1))
    looks = Look(everything), Look(~everything)
    traced(pipe, everything, *looks)
    for look in looks:
        assert look.seen[0, 0, CONDITIONAL].tolist() == [False] * tiny.TEXT + [True] * 48
    assert (looks[0].seen[2, 0, CONDITIONAL] ^ looks[1].seen[2, 0, CONDITIONAL])[tiny.TEXT :].all()


def test_an_edit_of_a_mask_begins_when_the_mask_is_known(pipe):
    top = {"method": "top", "value": 0.25}
    early, late = ExtractMask("cat", **top), ExtractMask("cat", **top)
    always = traced(pipe, early, Loud(rows=early))
    assert torch.equal(always, traced(pipe, late, Loud(rows=late, where=Where(steps=slice(1, None)))))
    assert not torch.equal(always, traced(pipe))
    never = ExtractMask("cat", where=Where(steps=STEPS - 1))
    assert torch.equal(traced(pipe, never, Loud(rows=never)), traced(pipe))


# --- whose mask ---


def lockstep(pipe, *handlers, edits=(), prompts=(tiny.PROMPT, tiny.OTHER)):
    loop = Loop(pipe, 4, seed=0)
    text, negative = loop.encode(prompts), loop.encode([""] * len(prompts))

    def drive(clock):
        start = State.start(loop, len(prompts), loop.clip_frames, text.dtype)
        return denoise(loop, Lockstep(loop, text, negative, lambda t: 3.0, clock), start, edits=edits)

    return probe.trace(pipe, *handlers).run(drive, prompts).latents


def test_an_area_is_made_of_the_maps_of_its_source(pipe):
    top = {"method": "top", "value": 0.25}
    own, cat = ExtractMask("a", **top), ExtractMask("cat", source=0, **top)
    crossed = ExtractMask("a", source=lambda branch: replace(branch, prompt=1 - branch.prompt), **top)
    looks = [Look(area, where=Where(steps=2)) for area in (own, cat, crossed)]
    maps = probe.WordMaps("a", "cat")
    lockstep(pipe, own, cat, crossed, *looks, maps)
    mine, cats, others = ({branch: area for (*_, branch), area in look.seen.items()} for look in looks)
    for guided in (False, True):
        zero, one = Branch(0, guided=guided), Branch(1, guided=guided)
        assert torch.equal(mine[zero], mine[Branch(0)])
        assert not torch.equal(mine[zero], mine[one])
        assert torch.equal(cats[zero], cats[one])
        assert torch.equal(others[zero], mine[one])
        assert torch.equal(others[one], mine[zero])
    level = np.sort(mean_map(maps, "cat", before=2).ravel())[-12]
    assert np.array_equal(cats[Branch(1)][tiny.TEXT :].view(GRID), mean_map(maps, "cat", before=2) >= level)


def test_a_blend_by_an_extracted_mask(pipe):
    """Each step the latents outside of the mask are the source's; the mask has the maps of the step that ends."""
    mask, seen, outside = ExtractMask("blue", source=1, method="top", value=0.25), [], []

    class Watch(Blend):
        def after(self, latents, at):
            blended = super().after(latents, at)
            seen.append((mask.mask(), latents, blended))
            return blended

    lockstep(pipe, mask, edits=(Watch(0, 1, mask),))
    for inside_of, latents, blended in seen:
        pixels = torch.from_numpy(np.repeat(np.repeat(inside_of, 2, 1), 2, 2))[:, None]
        assert torch.equal(blended[1], torch.where(pixels, latents[1], latents[0]))
        assert torch.equal(blended[0], latents[0])
    assert len(seen) == 4
    outside = lockstep(pipe, mask, edits=(Blend(0, 1, ~mask),))
    pixels = torch.from_numpy(np.repeat(np.repeat(mask.mask(), 2, 1), 2, 2))[:, None].expand(3, 4, 8, 8)
    assert torch.equal(outside[1][pixels], outside[0][pixels])
    assert not torch.equal(outside[1][~pixels], outside[0][~pixels])


def test_a_blend_takes_the_mask_of_its_target(pipe):
    mask, seen = ExtractMask("a", soft=True), []

    class Watch(Blend):
        def after(self, latents, at):
            blended = super().after(latents, at)
            for prompt in (0, 1):
                weights = torch.from_numpy(np.repeat(np.repeat(mask.score(prompt), 2, 1), 2, 2))[:, None].float()
                expected = latents[0] + weights * (latents[1] - latents[0])
                seen.append((prompt, torch.allclose(blended[1], expected, atol=1e-5)))
            return blended

    lockstep(pipe, mask, edits=(Watch(0, 1, mask),))
    assert all(equal for prompt, equal in seen if prompt == 1)
    assert not all(equal for prompt, equal in seen if prompt == 0)


def test_a_blend_waits_for_its_mask(pipe):
    late = ExtractMask("cat", source=0, where=Where(steps=Progress(0.75, 1)))
    none = lockstep(pipe, late, edits=(Blend(0, 1, late, steps=slice(0, 3)), Blend(0, 1, ~late, steps=slice(0, 3))))
    assert torch.equal(none, lockstep(pipe))


def test_frozen_masks_serve_a_second_run(pipe):
    prior = ExtractMask("cat", source=0, soft=True)
    traced(pipe, prior)
    score = prior.score()
    prior.frozen = True
    look = Look(prior)
    lockstep(pipe, prior, look)
    for area in look.seen.values():
        assert np.array_equal(area[tiny.TEXT :].view(GRID), score.astype(np.float32))
    assert np.array_equal(prior.score(), score)
    lockstep(pipe, look)  # no longer a handler of the run, but still known
    prior.frozen = False
    traced(pipe, prior, prompt="the red dog and the cat")
    assert not np.array_equal(prior.score(), score)


# --- refusals ---


def test_missing_words_are_refused_before_anything_runs(pipe):
    runs = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        for extract, prompts in (
            (ExtractMask("dog"), tiny.PROMPT),
            (ExtractMask("cat"), [tiny.PROMPT, tiny.OTHER]),
            (ExtractMask("cat", source=1), [tiny.PROMPT, tiny.OTHER]),
            (ExtractMask("cat", rivals=("dog",)), tiny.PROMPT),
            (ExtractMask("snow", source=lambda branch: branch), tiny.PROMPT),
        ):
            plan = probe.trace(pipe, extract)
            texts = [prompts] if isinstance(prompts, str) else prompts
            with pytest.raises(WordError, match="word must be in"):
                plan.plan(STEPS, plan.tokenize(texts))
        plan = probe.trace(pipe, ExtractMask("cat", source=2))
        with pytest.raises(UsageError, match="must lie in 0 to 0. Got"):
            plan.plan(STEPS, plan.tokenize([tiny.PROMPT]))
    finally:
        hook.remove()
    assert not runs
    traced(pipe, ExtractMask("cat", source=0), prompt=[tiny.PROMPT, tiny.OTHER])


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="threshold and top must have a value"):
        ExtractMask("cat", method="threshold")
    with pytest.raises(UsageError, match="share of a mask"):
        ExtractMask("cat", method="top", value=2)
    with pytest.raises(UsageError, match="rivals other than these"):
        ExtractMask("cat", rivals=("cat",))
    with pytest.raises(UsageError, match="must have words"):
        ExtractMask(())
    with pytest.raises(UsageError, match="blur of a map"):
        ExtractMask("cat", sigma=-1)
    with pytest.raises(UsageError, match="propagated 0 times or more. Got -1"):
        ExtractMask("cat", propagate=-1)


def test_a_mask_that_no_run_fills_is_refused(pipe):
    forgotten = ExtractMask("cat")
    with pytest.raises(PlanError, match="must be given to the trace.*Got ExtractMask"):
        traced(pipe, Look(forgotten))
    with pytest.raises(PlanError, match="without maps"):
        traced(pipe, Look(ExtractMask("cat", frozen=True)))
    assert forgotten.mask() is None
    traced(pipe, forgotten)
    with pytest.raises(PlanError, match="frozen after another"):
        traced(pipe, Look(forgotten))


def test_a_frozen_mask_of_another_size_is_refused(pipe):
    prior = ExtractMask("cat")
    traced(pipe, prior, num_frames=5)
    prior.frozen = True
    with pytest.raises(LayoutError, match=r"grid of the video, 3x4x4. Got \(2, 4, 4\)"):
        traced(pipe, Look(prior))


def test_the_model_stays_as_it_was_without_edits(pipe):
    assert torch.equal(traced(pipe, ExtractMask("cat", propagate=1, stage=Stage.BEFORE)), traced(pipe))
