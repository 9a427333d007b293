"""Each rewriting of attention as a composition of operators on a drawn call, equal to its whole matrix in float64.

The operators never form the matrix where they need not; here it is formed each time. The tables are in two parts: the
derived operators, and the rewritings whose costs are known.
"""

from __future__ import annotations

import math

import pytest
import torch

from control.bias import Bias, BiasFunction, BiasTable
from control.closed_form import Fixed, Identity, MeanOf, Sharpest, Uniform, Within
from control.constant import Constant
from control.extend import Extend
from control.fork import Fork
from control.perturb import BlurQuery, MaskRegion
from control.reweight import Reweight
from control.rotate import Rotate
from control.scale import Scale, Temper
from control.source import Itself
from control.transfer import Transfer
from control.variant import Edited
from control.window import Window
from probe.models.rope import Rope, by_axis
from probe.region import frames, text, tokens, video, words
from probe.site import Where, Which
from tests.control.drawn import GRID, TEXT, apart, drawn, served, whole

N = TEXT + GRID.size
VIDEO = torch.arange(N) >= TEXT
ROWS, COLUMNS = VIDEO[:, None], VIDEO[None]
EYE = torch.eye(N, dtype=torch.bool)
WORD = torch.zeros(N, dtype=torch.bool).index_fill(0, torch.tensor([1, 2]), True)
"""The columns of "red cat"."""
FRAME = (torch.arange(N) - TEXT).div(GRID.patches, rounding_mode="floor")
RNG = torch.Generator().manual_seed(7)
MASK = torch.rand(GRID.shape, generator=RNG) < 0.4
INSIDE = torch.cat([torch.zeros(TEXT, dtype=torch.bool), MASK.flatten()])
OTHER = torch.cat([torch.zeros(TEXT, dtype=torch.bool), (torch.rand(GRID.shape, generator=RNG) < 0.4).flatten()])
OWN, TAKEN = tokens(MASK.numpy()), tokens(OTHER[TEXT:].reshape(GRID.shape).numpy())
FIRST = Where(branches=Which(prompt=0))
ONE, TABLE = whole(drawn()), 1e-6
"""The target's own attention; how near the factors of a float32 table come."""
THEIRS = whole(drawn(), q=1, k=1)
"""The other entry's map on the target's values."""


def masked(seen, logits=ONE.logits):
    """Softmax over the keys that are seen."""
    return logits.masked_fill(~seen, -math.inf).softmax(-1)


def check(expected, *edits, near=TABLE):
    out = served(drawn(), *edits)
    assert apart(out[0], expected) < near
    assert apart(out[0], ONE.out) > 1e-3
    return out


def at(**given):
    return {"where": FIRST, **given}


# --- derived operators ---


def test_mask_window_and_block_are_biases_of_minus_infinity():
    check(masked(~(ROWS & WORD)) @ ONE.v, Bias(-math.inf, words("red", "cat"), **at(rows=video())))
    near = (FRAME[:, None] - FRAME).abs() <= 1
    check(masked(~(ROWS & COLUMNS) | near) @ ONE.v, Window(frames=1, **at()))
    check(masked(~(INSIDE[:, None] & OTHER)) @ ONE.v, Bias(-math.inf, TAKEN, **at(rows=OWN)))


def test_shared_keys_and_values_swapped_queries_and_copied_maps_are_transfers():
    check(whole(drawn(), k=1, v=1).out, Transfer("kv", 1, target=0), near=1e-13)
    check(whole(drawn(), q=1).out, Transfer("q", 1, target=0), near=1e-13)
    check(THEIRS.p @ ONE.v, Transfer("qk", 1, target=0), near=1e-13)


@pytest.mark.parametrize("u", [0.25, 1.0])
def test_soft_identity_is_a_blend_with_the_values(u):
    check(((1 - u) * ONE.p + u * EYE) @ ONE.v, Fork(Identity(), **at(strength=u)), near=1e-13)


def test_uniform_argmax_and_mean_query_maps():
    uniform = torch.full((3, N, N), 1 / N, dtype=torch.float64) @ ONE.v
    check(uniform, Fork(Uniform(), **at()), near=1e-13)
    check(uniform, Temper(0.0, **at()), near=1e-13)
    one_hot = (ONE.logits == ONE.logits.amax(-1, keepdim=True)).double() @ ONE.v
    check(one_hot, Fork(Sharpest(), **at()), near=1e-13)
    check(one_hot, Temper(1e4, **at()))
    call = drawn()
    q = torch.where(ROWS, call.q[0, :, VIDEO].mean(1, keepdim=True), call.q[0])
    mean = (0.5 * q @ call.k[0].mT).softmax(-1) @ ONE.v
    check(mean, BlurQuery(**at()), near=1e-13)
    check(mean, Transfer("q", Constant("mean"), target=0, rows=video()), near=1e-13)


def test_maps_are_interpolated_by_blending_outputs_of_the_same_values():
    mixed = (0.7 * ONE.p + 0.3 * THEIRS.p) @ ONE.v
    check(mixed, Fork(Edited(Transfer("qk", 1)), **at(strength=0.3)), near=1e-13)


@pytest.mark.parametrize("factor", [0.0, 0.4, 3.0])
def test_renormalised_reweighting_is_a_bias_of_the_logarithm(factor):
    moved = torch.where(ROWS & WORD, factor * ONE.p, ONE.p)
    expected = moved / moved.sum(-1, keepdim=True) @ ONE.v
    check(expected, Reweight(words("red", "cat"), factor, "renormalised", **at()))
    bias = math.log(factor) if factor else -math.inf
    check(expected, Bias(bias, words("red", "cat"), **at(rows=video())))


@pytest.mark.parametrize("factor", [-5.0, 0.0, 3.0])
def test_raw_reweighting_of_all_rows_is_a_scale_of_values(factor):
    expected = torch.where(WORD, factor * ONE.p, ONE.p) @ ONE.v
    check(expected, Reweight(words("red", "cat"), factor, **at(rows=None)))
    check(expected, Scale("v", factor, **at(rows=words("red", "cat"))), near=1e-13)


def test_redistributed_mass_is_a_merge_of_three():
    """O - (1 - c) O_source + (1 - c) (m_source / m_target) O_target."""
    target = VIDEO & ~INSIDE
    gain = 0.4 * (ONE.p * INSIDE).sum(-1, keepdim=True) / (ONE.p * target).sum(-1, keepdim=True)
    moved = ONE.p * (1 - 0.4 * INSIDE.double()) + gain * ONE.p * target
    assert apart(moved.sum(-1), torch.ones(3, N)) < 1e-14
    check(moved @ ONE.v, Reweight(OWN, 0.6, "redistributed", **at(rows=None)))
    three = ONE.out - 0.4 * (ONE.p * INSIDE) @ ONE.v + gain * ((ONE.p * target) @ ONE.v)
    assert apart(three, moved @ ONE.v) < 1e-13


@pytest.mark.parametrize("bias", [0.0, -1.5])
def test_concatenated_keys_are_a_merge_by_lse(bias):
    added = whole(drawn(), k=1, v=1)
    both = torch.cat([ONE.logits, added.logits + bias], -1).softmax(-1)
    expected = both @ torch.cat([ONE.v, added.v], 1)
    check(expected, Extend(1, target=0, columns=None, bias=bias))
    other = (Transfer("kv", 1), *([Bias(bias)] if bias else []))
    check(expected, Fork(Edited(*other), merge="lse", **at()))


def test_a_bias_table_of_groups_is_a_bias():
    groups, values = (text(), frames(0), frames(1), frames(2)), torch.randn(4, 4, generator=RNG)
    group = torch.where(VIDEO, FRAME + 1, 0)
    bias = values[group][:, group].double()
    bias[4], bias[:, 4] = 0, 0  # padding is in no group
    check((ONE.logits + bias).softmax(-1) @ ONE.v, BiasTable(groups, values.tolist(), **at()))


def test_the_map_of_the_video_from_a_source_at_its_logits():
    """Own text columns, merged by lse with the source's video columns."""
    logits = torch.where(ROWS & COLUMNS, THEIRS.logits, ONE.logits)
    theirs = Edited(Transfer("qk", 1), Bias(-math.inf, ~video(), rows=video()), fresh=True)
    hide = Bias(-math.inf, video(), **at(rows=video()))
    check(logits.softmax(-1) @ ONE.v, hide, Fork(theirs, merge="lse", **at(rows=video())))


def test_the_map_of_the_video_from_a_source_with_the_own_mass():
    mass = (ONE.p * COLUMNS).sum(-1, keepdim=True)
    moved = torch.where(COLUMNS, mass * masked(COLUMNS, THEIRS.logits), ONE.p)
    expected = torch.where(ROWS, moved @ ONE.v, ONE.out)
    theirs = Edited(Transfer("qk", 1), Bias(-math.inf, ~video()))
    check(expected, Fork(Within(theirs, video()), **at(rows=video())))


def test_reuse_of_a_cached_rest_is_a_scale_and_an_addition():
    """O = rho O_window + R, which is full attention where neither is old."""
    seen = ~(ROWS & COLUMNS) | ((FRAME[:, None] - FRAME).abs() <= 0)
    share = (ONE.p * seen).sum(-1)
    rest = ONE.out - share[..., None] * (masked(seen) @ ONE.v)
    add = Fork(Fixed(rest / share[..., None]), merge="add", where=FIRST)
    out = served(drawn(), Window(frames=0, **at()), add, Scale("o", share, where=FIRST))
    assert apart(out[0], ONE.out) < TABLE
    assert apart(masked(seen) @ ONE.v, ONE.out) > 0.1


def test_heads_are_ablated_and_routed_by_scaling_outputs():
    weights = torch.tensor([0.0, 1.2, 1.0], dtype=torch.float64)[:, None, None]
    check(weights * ONE.out, Scale("o", (0.0, 1.2, 1.0), where=FIRST), near=1e-13)


# --- rewritings with known costs ---


def test_a_null_key_takes_mass_and_gives_nothing():
    null = torch.cat([ONE.logits, torch.full((3, N, 1), 0.7, dtype=torch.float64)], -1).softmax(-1)[..., :N]
    check(null @ ONE.v, Fork(Fixed(0.0, logit=0.7), merge="lse", where=FIRST), near=1e-13)
    check(null @ ONE.v, Extend(Constant("zero"), bias=0.7, where=FIRST))


def test_the_own_key_is_boosted_or_removed():
    boosted = (ONE.logits + math.log(3) * EYE.double()).softmax(-1) @ ONE.v
    check(boosted, Fork(Identity(raised=math.log(2)), merge="lse", where=FIRST), near=1e-13)
    removed = masked(~(EYE & ROWS)) @ ONE.v
    alone = lambda i, j: torch.where((i == j).all(-1), -math.inf, 0.0)  # noqa: E731
    check(removed, BiasFunction(alone, **at()))


def test_mean_ablation():
    expected = torch.where(ROWS, ONE.out[:, VIDEO].mean(1, keepdim=True), ONE.out)
    check(expected, Fork(MeanOf(video()), **at(rows=video())), near=1e-13)


def test_permuted_rows_and_columns_of_a_map():
    order = torch.randperm(GRID.size, generator=RNG)
    whole_order = torch.cat([torch.arange(TEXT), TEXT + order])
    columns = torch.zeros_like(ONE.p).scatter_(-1, whole_order.expand_as(ONE.p), ONE.p)
    check(columns @ ONE.v, Transfer("v", Itself(), mapping=order, where=FIRST), near=1e-13)
    check(ONE.p[:, whole_order] @ ONE.v, Transfer("o", Itself(), mapping=order, where=FIRST), near=1e-13)


def test_text_columns_biased_scaled_masked_and_tempered():
    for expected, edit in (
        ((ONE.logits + 1.5 * ~COLUMNS).softmax(-1), Bias(1.5, ~video(), **at())),
        (torch.where(COLUMNS, ONE.p, 0.3 * ONE.p), Reweight(~video(), 0.3, **at(rows=None))),
        (masked(COLUMNS.expand(N, N)), Bias(-math.inf, ~video(), **at())),
        ((ONE.logits * torch.where(COLUMNS, 1.0, 2.5)).softmax(-1), Scale("k", 2.5, **at(rows=~video()))),
    ):
        check(expected @ ONE.v, edit)


def test_negative_reweighting_of_columns_and_rows_of_words():
    """Words' columns in the video rows and video columns in the words' rows, each times -5, without renormalising."""
    moved = torch.where((ROWS & WORD) | (WORD[:, None] & COLUMNS), -5 * ONE.p, ONE.p)
    edits = Reweight(words("red cat"), -5.0, **at()), Reweight(video(), -5.0, **at(rows=words("red cat")))
    check(moved @ ONE.v, *edits)


def test_weights_of_keys():
    soft = torch.rand(GRID.size, generator=RNG).double() + 0.2
    where = lambda cell: (cell[..., 0] * 8 + cell[..., 1] * 4 + cell[..., 2]).long()  # noqa: E731
    logits = ONE.logits + torch.cat([torch.zeros(TEXT), soft.log()])
    expected = torch.where(ROWS, logits.softmax(-1) @ ONE.v, ONE.out)
    check(expected, BiasFunction(lambda i, j: soft.log()[where(j)].float() + 0 * i[..., 0], **at()))


def test_keys_shared_by_mask_and_blended_by_the_mask_of_the_target():
    """Inside of the own mask the source's keys in its mask and its text, outside the others and its text."""
    source = whole(drawn(), k=1, v=1)
    front = masked((OTHER | ~VIDEO).expand(N, N), source.logits) @ source.v
    back = masked((~OTHER).expand(N, N), source.logits) @ source.v
    expected = torch.where(INSIDE[:, None], front, back)
    foreground = Edited(Transfer("kv", 1), Bias(-math.inf, video() & ~TAKEN), fresh=True)
    check(
        expected, Transfer("kv", 1, target=0), Bias(-math.inf, TAKEN, **at()), Fork(foreground, gate=OWN, where=FIRST)
    )


def test_outputs_blended_by_a_soft_mask():
    soft = torch.rand(GRID.shape, generator=RNG)
    weight = torch.cat([torch.zeros(TEXT), soft.flatten()]).double()[:, None]
    expected = (1 - weight) * ONE.out + weight * whole(drawn(), k=1, v=1).out
    check(expected, Fork(Edited(Transfer("kv", 1)), gate=soft, where=FIRST), near=1e-13)


def test_the_text_columns_of_a_source_are_injected_raw():
    """Video rows take the source's probabilities on text as they are and keep their own on the video."""
    moved = torch.where(ROWS & ~COLUMNS, THEIRS.p, ONE.p)
    theirs = Edited(Transfer("qk", 1), Reweight(video(), 0.0), fresh=True)
    check(moved @ ONE.v, Reweight(~video(), 0.0, **at()), Fork(theirs, merge="add", **at(rows=video())))


def test_the_text_columns_of_a_source_are_injected_with_the_own_mass():
    mass = (ONE.p * ~COLUMNS).sum(-1, keepdim=True)
    moved = torch.where(COLUMNS, ONE.p, mass * masked(~COLUMNS, THEIRS.logits))
    expected = torch.where(ROWS, moved @ ONE.v, ONE.out)
    theirs = Edited(Transfer("qk", 1), Bias(-math.inf, video()))
    check(expected, Fork(Within(theirs, ~video()), **at(rows=video())))


def test_a_dense_bias_of_pairs():
    dense = torch.randn(GRID.size, GRID.size, generator=RNG)
    index = lambda cell: (cell[..., 0] * 8 + cell[..., 1] * 4 + cell[..., 2]).long()  # noqa: E731
    logits = ONE.logits.clone()
    logits[:, TEXT:, TEXT:] += dense.double()
    check(logits.softmax(-1) @ ONE.v, BiasFunction(lambda i, j: dense[index(i), index(j)], **at()))


def test_a_region_of_the_map_is_taken_away():
    check(torch.where(ROWS & COLUMNS, 0.0, ONE.p) @ ONE.v, MaskRegion("vv", "zero", where=FIRST))
    check(masked(~(ROWS & COLUMNS)) @ ONE.v, MaskRegion("vv", where=FIRST))


# --- invariants ---


def test_turning_queries_and_keys_of_the_video_alike_moves_only_their_relation_to_text():
    rope = Rope(by_axis((2, 2, 4), 100.0, torch.device("cpu")), torch.zeros(3))
    call = drawn(rope=rope)
    served(call, Rotate("qk", shift=(3, 0, 1), rows=video(), where=FIRST))
    logits = 0.5 * call.q[0] @ call.k[0].mT
    assert apart(logits[:, TEXT:, TEXT:], ONE.logits[:, TEXT:, TEXT:]) < 1e-5
    assert apart(logits[:, TEXT:, :TEXT], ONE.logits[:, TEXT:, :TEXT]) > 0.1


def test_what_changes_nothing_keeps_every_bit():
    plain = served(drawn(dtype=torch.bfloat16))
    for edit in (
        Transfer("qkv", 0, target=0),
        Transfer("kv", 1, strength=0.0),
        Bias(0.0, text()),
        BiasTable((text(), video()), [[0.0, 0.0], [0.0, 0.0]]),
        Reweight(text(), 1.0),
        Scale("k", 1.0),
        Temper(1.0),
        Fork(Identity(), gate=torch.zeros(GRID.shape)),
        Window(frames=2),
        MaskRegion("vv", strength=0.0),
    ):
        assert torch.equal(served(drawn(dtype=torch.bfloat16), edit), plain), edit
