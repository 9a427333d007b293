"""Changed weights against the whole matrix in float64, one head at a time."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import probe
from probe import serve, weigh
from probe.change import Added, Bias, Factors, Map, Move
from probe.errors import PlanError
from probe.plan import Handler, Plan, Stage
from probe.weigh_choice import way_of
from probe.weigh_dense import by_channels, masked
from probe.weigh_parts import by_columns, by_rows
from probe.weigh_rows import Part, explicit_rows
from probe.weigh_table import table_of
from tests import tiny
from tests.probe.readout.calls import CROSS, JOINT, SELF, one_call, tokens, value_of, where

BOUND = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 3e-2}
CASES = [*JOINT, *SELF, *CROSS]


def whole(call, entry=0):
    """Weights [H, N, M] of the own keys, output [H, N, D] and log-normaliser [H, N]."""
    made = [whole_head(call, entry, head) for head in range(call.q.shape[1])]
    return tuple(torch.stack(side) for side in zip(*made, strict=True))


def whole_head(call, entry, head):
    q, k, v = (x[entry, head].double() for x in (call.q, call.k, call.v))
    seen = len(k) if call.visible is None else call.visible[entry]
    mine = [one for one in call.changes if one.entry == entry and (one.heads is None or head in one.heads)]
    logits = q @ k.T / math.sqrt(q.shape[-1])
    logits[:, seen:] = -math.inf
    up, down = torch.ones_like(logits), torch.ones_like(logits)
    for one in mine:
        place = head if one.heads is None else one.heads.index(head)
        if isinstance(one, Factors):
            groups = torch.zeros(len(q), dtype=torch.long) if one.rows is None else one.rows
            up *= one.numerator.double()[groups][:, one.columns]
            down *= one.denominator.double()[groups][:, one.columns]
        if isinstance(one, Bias):
            bias = one.of(slice(0, len(q))).double()
            logits = logits + (bias if bias.dim() == 2 else bias[place])
    odds = logits.exp()
    total, extra = (down * odds).sum(-1), []
    for one in mine:
        if isinstance(one, Added):
            place = head if one.heads is None else one.heads.index(head)
            more = (q @ one.k[place].double().T / math.sqrt(q.shape[-1]) + one.bias).exp()
            more = more if one.rows is None else more * one.rows[:, None]
            total, extra = total + more.sum(-1), [*extra, (more, one.v[place].double())]
    share = torch.where(total > 0, 1 / total, 0.0)[:, None]
    weights = up * odds * share
    for one in mine:
        if isinstance(one, Move):
            move_rows(weights, one)
    for one in mine:
        if isinstance(one, Map):
            weights[:, :seen] = one.of(weights[None, :, :seen], slice(0, len(q)))[0]
    out = weights @ v + sum((more * share) @ values for more, values in extra)
    return weights, out, total.log()


def move_rows(weights, move):
    source, target = move.source, move.target & ~move.source
    for row in range(len(weights)):
        mass, there = weights[row, source].sum(), weights[row, target].sum()
        if there > 0 and (move.rows is None or move.rows[row]):
            weights[row, source] *= move.keep
            weights[row, target] *= 1 + (1 - move.keep) * mass / there


def factors(rows, columns, table, raw=False, **rest):
    numerator = torch.tensor(table)
    denominator = torch.ones_like(numerator) if raw else numerator
    return Factors(**{"entry": 0} | rest, rows=rows, columns=columns, numerator=numerator, denominator=denominator)


def labels(call, side, *groups):
    """long: 1 for the first of the groups of tokens, 2 for the second, ... and 0 for the rest."""
    total = getattr(call, side).total
    made = torch.zeros(total, dtype=torch.long)
    for number, group in enumerate(groups, 1):
        made[[token for token in group if token < total]] = number
    return made


def changed(call):
    """Every kind of change of a call by name; rows and columns are those it has."""
    n, m, heads = call.rows.total, call.columns.total, call.q.shape[1]
    rows, columns = (torch.arange(size) for size in (n, m))
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    added = {"k": random(heads, 5, 16).to(call.q.dtype), "v": random(heads, 5, 16).to(call.q.dtype)}
    distance = (rows[:, None] - columns[None]).abs()
    return {
        "raise": factors(rows % 2, columns // 3 % 3, [[1.0, 1.0, 1.0], [1.0, 2.5, 4.0]]),
        "raise two": factors(rows % 2, (columns < 2).long(), [[1.0, 1.0], [1.0, 3.0]]),
        "lower": factors(None, (columns < 3).long(), [[1.0, 0.2]]),
        "hide": factors(rows % 3, columns % 3, [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.5, 0.0]]),
        "blind": factors(rows % 3, columns % 2, [[1.0, 1.0], [0.0, 0.0], [2.0, 1.0]]),
        "raw": factors(rows % 2, columns % 2, [[1.0, 0.5], [3.0, 0.0]], raw=True),
        "negative": factors(rows % 2, (columns < 2).long(), [[1.0, -5.0], [1.0, -0.5]], raw=True),
        "soft columns": factors(None, columns, [(0.1 + random(m).abs()).tolist()]),
        "soft rows": factors(rows, (columns < 3).long(), torch.stack([torch.ones(n), random(n).abs()], 1).tolist()),
        "bias": Bias(entry=0, of=lambda some: -0.1 * distance[some]),
        "bias of heads": Bias(
            entry=0, heads=(1, 2), of=lambda some: torch.stack([distance[some], -distance[some]]) / 9
        ),
        "window": Bias(entry=0, of=lambda some: torch.where(distance[some] < 6, 0.0, -math.inf)),
        "added": Added(entry=0, **added, bias=0.7),
        "added to some": Added(entry=0, heads=(0, 2), k=added["k"][:2], v=added["v"][:2], rows=rows % 2 == 0),
        "move": Move(entry=0, source=columns < 3, target=columns % 2 == 0, keep=0.3),
        "move in some": Move(
            entry=0, heads=(0,), source=columns < 3, target=columns > 4, keep=-1.0, rows=rows % 2 == 0
        ),
        "map": Map(entry=0, heads=(0, 2), of=lambda weights, some: weights**2),
    }


def assert_equal(call, out, lse, state):
    bound = BOUND[call.q.dtype]
    assert (state.out.double() - out).abs().max() < bound * max(1, out.abs().max())
    assert torch.equal(state.lse.isneginf(), lse.isneginf())
    assert (state.lse.double() - lse).nan_to_num(0).abs().max() < bound


WAYS = [by_rows, by_columns, by_channels, masked, lambda part, table: explicit_rows(part)]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("way", WAYS, ids=["rows", "columns", "channels", "masked", "explicit"])
def test_each_way_to_compute_factors_equals_the_matrix(way, dtype):
    for case in (JOINT[2], CROSS[0])[: 2 if dtype == torch.float64 else 1]:
        call = one_call(dtype, heads=3, **case)
        for name, change in changed(call).items():
            if isinstance(change, Factors) and (way not in WAYS[2:4] or name != "negative"):
                call.changes = [change]
                _, out, lse = whole(call)
                seen = None if call.visible is None else call.visible[0]
                part = Part(call.q, call.k[:, :, :seen], call.v[:, :, :seen], 0.25, (0, 1, 2), [change])
                assert_equal(call, out[None], lse[None], way(part, table_of([change], part.q.shape[2], part.keys)))


def test_extra_channels_hold_their_numbers_to_more_than_half_precision():
    call = one_call(torch.bfloat16, heads=3)
    call.changes = [factors(torch.arange(31) % 2, torch.arange(31) % 3, [[1.0, 300.0, 7.0], [1000.0, 0.003, 1.0]])]
    part = Part(call.q, call.k, call.v, 0.25, (0, 1, 2), call.changes)
    made = by_channels(part, table_of(call.changes, 31, 31))
    assert (made.lse[0].double() - whole(call)[2]).abs().max() < 3e-4  # 2e-2 in one number each


MIXES = [
    *([name] for name in changed(one_call(heads=3))),
    ["raise", "hide"],
    ["raise", "raw", "bias"],
    ["negative", "bias"],
    ["hide", "bias of heads", "window", "added"],
    ["lower", "added", "added to some"],
    ["blind", "added to some"],
    ["raise", "move", "added"],
    ["raw", "move"],
    ["move", "move in some"],
    ["bias", "move"],
    ["raise", "added", "move in some", "map"],
]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("mix", MIXES, ids="+".join)
def test_changes_compose_as_in_the_matrix(mix, dtype):
    for case in CASES if dtype == torch.float64 else [JOINT[2]]:
        call = one_call(dtype, heads=3, **case)
        kinds = changed(call)
        for name in mix:
            call.change(replace(kinds[name], heads=(0, 2)) if name == "hide" else kinds[name])
        _, out, lse = whole(call)
        assert weigh.run(call) != "plain"
        assert_equal(call, out, lse, weigh.State(call.out[0], call.lse()[0]))
        assert_equal(call, out, lse, weigh.attention(call, 0))


def big(*changes, heads=8, tokens=4096, dtype=torch.float32):
    tensor = torch.zeros(1, dtype=dtype).expand(1, heads, tokens, 64)
    return Part(tensor, tensor, tensor, 0.125, tuple(range(heads)), changes)


def frames(size=4096, count=14):
    return torch.arange(size) * count // size


TEXT = (torch.arange(4096) < 226).long()
FEW = (torch.arange(4096) < 6).long()
THREE = torch.where(TEXT.bool(), 0, 1 + torch.arange(4096) % 2)
GUIDED = [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
FRAME_BIAS = torch.rand(14, 14, generator=torch.Generator().manual_seed(0)).add(0.5).tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([factors(1 - TEXT, TEXT, [[1.0, 1.0], [1.0, 1.0]])], "plain"),
        ([factors(None, TEXT, [[1.0, 2.0]]), factors(None, TEXT, [[1.0, 0.5]])], "plain"),
        ([factors(1 - TEXT, FEW, [[1.0, 1.0], [1.0, 2.0]])], "thin"),
        ([factors(1 - TEXT, FEW, [[1.0, 1.0], [1.0, -5.0]], raw=True)], "thin"),
        ([factors(1 - TEXT, FEW, [[1.0, 1.0], [1.0, 0.5]])], "split"),
        ([factors(None, FEW, [[1.0, 0.5]], raw=True)], "split"),
        ([factors(1 - TEXT, TEXT, [[1.0, 1.0], [1.0, 2.0]])], "split"),
        ([factors(frames(), frames(), FRAME_BIAS)], "channels"),
        ([factors(THREE, THREE, GUIDED)], "gather"),
        ([factors(THREE, THREE, GUIDED), factors(1 - TEXT, FEW, [[1.0, 1.0], [1.0, 2.0]])], "gather"),
        ([factors(None, torch.arange(4096), torch.linspace(0.5, 1, 4096)[None].tolist())], "channels"),
        ([factors(torch.arange(4096), TEXT, torch.linspace(0.5, 1, 8192).view(4096, 2).tolist())], "split"),
        ([Bias(entry=0, of=lambda rows: torch.zeros(1))], "masked"),
        ([Added(entry=0, k=torch.zeros(8, 4, 64), v=torch.zeros(8, 4, 64))], "plain + added keys"),
        ([Move(entry=0, source=FEW.bool(), target=TEXT.bool(), keep=0.5)], "split by move"),
        ([Map(entry=0, of=lambda weights, rows: weights)], "explicit rows"),
    ],
)
def test_the_cheapest_way_is_chosen(changes, said):
    assert way_of(big(*changes))[0] == said


def test_frames_are_split_where_each_has_many_keys():
    """A fused attention to 300 keys costs about 1.3 of its share of the plain one (measured), to 1,300 keys 1.1."""
    few, many = ([factors(frames(size), frames(size), FRAME_BIAS)] for size in (4096, 17776))
    assert way_of(big(*few))[0] == "channels"
    assert way_of(big(*many, tokens=17776))[0] == "split"
    assert way_of(big(*few, dtype=torch.bfloat16))[0] == "split"  # two channels for each number


def test_changes_that_do_nothing_leave_the_call_to_the_model():
    for visible in (None, 29):
        call = one_call(heads=3, order="video-text", visible=visible)
        groups = torch.arange(31)
        late = (groups >= 29).long()
        call.change(factors(groups % 2, groups % 3, [[1.0] * 3] * 2))
        call.change(Added(entry=0, k=torch.zeros(3, 2, 16), v=torch.zeros(3, 2, 16), bias=-math.inf))
        call.change(Added(entry=0, k=torch.zeros(3, 0, 16), v=torch.zeros(3, 0, 16)))
        call.change(Move(entry=0, source=groups < 3, target=groups > 3, keep=1.0))
        if visible:
            call.change(factors(None, late, [[1.0, 7.0]]))  # hidden text only
        assert weigh.run(call) == "plain"
        assert call.out is None
        assert call.changes == []


def batch(dtype=torch.float32, **case):
    calls = [one_call(dtype, heads=3, seed=seed, **case) for seed in range(3)]
    tensors = {
        name: torch.cat([getattr(call, name).transpose(1, 2) for call in calls]).transpose(1, 2) for name in "qkv"
    }
    visible = None if calls[0].visible is None else calls[0].visible * 3
    return replace(calls[0], **tensors, branches=calls[0].branches * 3, visible=visible)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", CASES)
def test_entries_and_heads_without_changes_keep_every_bit(case, dtype):
    call = batch(dtype, **case)
    plain = F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.mask)
    some = torch.zeros(call.columns.total, dtype=torch.long)
    some[:2] = 1
    call.change(factors(None, some, [[1.0, 0.3]], entry=1, heads=(0, 2)))
    call.change(factors(None, some, [[1.0, 2.0]], entry=2))
    call.change(factors(None, some, [[1.0, 0.5]], entry=2))
    weigh.run(call)
    same = (call.out == plain).all(-1).all(-1)
    assert same.tolist() == [[True] * 3, [False, True, False], [True] * 3]
    for entry in range(3):
        _, out, lse = whole(call, entry)
        assert_equal(call, out, lse, weigh.State(call.out[entry], call.lse()[entry]))


def test_entries_with_equal_changes_are_computed_together(monkeypatch):
    call, made = batch(), []
    way = weigh.way_of
    monkeypatch.setattr(weigh, "way_of", lambda part: made.append(len(part.q)) or way(part))
    change = factors(None, torch.arange(31) % 2, [[1.0, 0.3]])
    for entry in (0, 2):
        call.change(replace(change, entry=entry))
    call.change(factors(None, torch.arange(31) % 2, [[1.0, 0.6]], entry=1))
    weigh.run(call)
    assert sorted(made) == [1, 2]
    for entry in range(3):
        assert_equal(call, *whole(call, entry)[1:], weigh.State(call.out[entry], call.lse()[entry]))


def test_what_a_foreign_kernel_computes_is_left_to_it():
    call = replace(batch(), native=False)
    call.change(factors(None, torch.arange(31) % 2, [[1.0, 0.3]], entry=1, heads=(0, 2)))
    assert weigh.run(call) != "plain"
    assert call.out is None
    foreign = torch.randn(call.q.shape, generator=torch.Generator().manual_seed(0))
    out = call.over(foreign)
    for entry in range(3):
        expected, lse = whole(call, entry)[1:]
        mine = torch.tensor([entry == 1 and head != 1 for head in range(3)])
        assert torch.equal(out[entry, ~mine], foreign[entry, ~mine])
        assert (out[entry, mine] - expected[mine]).nan_to_num(0).abs().sum() < 1e-3
        assert (call.lse()[entry] - lse).abs().max() < 5e-6
    assert torch.equal(serve.after_attention(call, Plan([Boost("factor")], steps=1, layers=1), foreign), out)


class Largest(TorchDispatchMode):
    """The most numbers a tensor has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.numel())
        return made


@pytest.mark.parametrize("name", changed(one_call(heads=3)))
def test_no_matrix_of_all_rows_and_columns_is_made(name):
    call = one_call(grid=probe.Grid(4, 16, 16), heads=3)
    change = changed(call)[name]
    if isinstance(change, Bias):
        columns = torch.arange(1031)
        change = Bias(entry=0, of=lambda rows: -0.1 * (columns[rows, None] - columns[None]).abs())
    call.change(change)
    with Largest() as seen:
        weigh.run(call)
    assert 0 < seen.most < 1031 * 1031


# ---- readouts of what was used


def reweighted(name, dtype=torch.float64, **case):
    call = one_call(dtype, heads=3, **case)
    call.change(changed(call)[name])
    weights = whole(call)[0]
    weigh.run(call)
    rows, columns = (side.total for side in call.sides(0))
    return call, weights[:, :rows, :columns]


USED = ["raise", "raise two", "lower", "hide", "raw", "soft columns", "soft rows", "added", "added to some"]
OPEN = ("raw", "added", "added to some")
"""Those that leave rows without unit sum."""

READ = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", READ)
@pytest.mark.parametrize("name", USED)
def test_entries_show_the_weights_that_were_used(name, dtype):
    for case in (JOINT[0], JOINT[2], CROSS[0])[: 3 if dtype == torch.float64 else 1]:
        call, weights = reweighted(name, dtype, **case)
        entry, values = call.entry(0), torch.randn(3, weights.shape[2], 16, dtype=torch.float64).to(dtype)
        means = (weights @ values.double(), weights[:, :, 2:5].sum(-1), weights.sum(1), weights.sum(-1))
        read = (
            entry.attend(values),
            torch.exp(entry.part([2, 3, 4]) - entry.lse),
            entry.column_means(slice(None)) * weights.shape[1],
            entry.row_sums,
        )
        assert (entry.weights() - weights).abs().max() < READ[dtype]
        for got, expected in zip(read, means, strict=True):
            assert (got - expected).abs().max() < READ[dtype] * max(1, expected.abs().max())
        shares = torch.stack([weights[..., part].sum(-1) for part in entry.columns.parts()], -1)
        assert (entry.shares - shares).abs().max() < READ[dtype]
        one = call.entry(0, (1,))
        assert (one.weights(rows=[4]) - weights[1:2, 4:5]).abs().max() < READ[dtype]


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("case", [JOINT[0], JOINT[2]])
def test_readouts_equal_the_matrix_that_was_used(name, case):
    call, weights = reweighted(name, **case)
    video, n = where(call, "columns", "video"), weights.shape[-1]
    text_start = call.entry(0).columns.text_slice.start
    maps = value_of(probe.WordMaps("red", per_head=True), call)
    word = text_start + 1
    assert torch.from_numpy(maps["vt"][:, 0]).flatten(1).sub(weights[:, video, word] * n).abs().max() < 1e-5
    assert torch.from_numpy(maps["tv"][:, 0]).flatten(1).sub(weights[:, word][:, video] * n).abs().max() < 1e-5
    columns = torch.from_numpy(value_of(probe.ColumnMass(), call)["mass"])
    assert columns[:, 0].sub(weights.mean(1)).abs().max() < 1e-6
    assert columns[:, 3].sub(weights[:, video].mean(1)).abs().max() < 1e-6
    shares = torch.from_numpy(value_of(probe.FrameMass(), call))
    for f in range(3):
        for g in range(3):
            inside = weights[:, where(call, "rows", "video", f)][:, :, where(call, "columns", "video", g)]
            assert (shares[:, f, g] - inside.sum(-1).mean(1)).abs().max() < 1e-6


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("case", [JOINT[0], JOINT[2]])
def test_region_mass_and_entropy_equal_the_matrix_that_was_used(name, case):
    call, weights = reweighted(name, **case)
    mass = torch.from_numpy(value_of(probe.RegionMass(), call))
    kinds = {kind: where(call, "columns", kind) for kind in ("text", "padding", "video")}
    for at, rows in enumerate(kinds):
        for column, columns in enumerate(("text", "padding")):
            expected = weights[:, kinds[rows]][:, :, kinds[columns]].sum(-1).mean(1)
            if kinds[rows]:
                assert (mass[:, at, column] - expected).abs().max() < 1e-6
    same = [
        weights[:, i, where(call, "columns", "video", frame)].sum(-1)
        for i, (kind, frame) in enumerate(tokens(call, "rows"))
        if kind == "video"
    ]
    assert (mass[:, 2, 2] - torch.stack(same).mean(0)).abs().max() < 1e-6
    given = weights[:, kinds["video"]].sum(-1).mean(1)  # not 1 with raw factors and added keys
    assert (mass[:, 2].sum(-1) - given).abs().max() < 1e-6
    if name in OPEN:
        assert (given - 1).abs().max() > 1e-3
        return
    entropy = torch.from_numpy(value_of(probe.Entropy(), call)["entropy"])
    expected = -torch.xlogy(weights, weights).sum(-1)[:, kinds["video"]].mean(1)
    assert (entropy[:, 2, 0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["raise", "hide", "soft rows"])
def test_entropy_of_changed_weights_stays_exact_in_lower_precision(name, dtype):
    call, weights = reweighted(name, dtype)
    entropy = torch.from_numpy(value_of(probe.Entropy(rows=True), call)["rows"]).flatten(1)
    expected = -torch.xlogy(weights, weights).sum(-1)[:, where(call, "rows", "video")]
    assert (entropy - expected).abs().max() < {torch.float32: 1e-4, torch.bfloat16: 1e-1}[dtype]


@pytest.mark.parametrize("name", OPEN)
def test_rows_without_unit_sum_cannot_be_kept_as_queries_and_keys(name):
    call, _ = reweighted(name)
    with pytest.raises(PlanError, match="rows that sum to one"):
        value_of(probe.KeepQK([(call.site.step, call.site.layer)], dtype="float32"), call)


@pytest.mark.parametrize("name", ["raise", "soft rows"])
def test_kept_queries_and_keys_give_the_weights_that_were_used(name):
    call, weights = reweighted(name)
    kept = value_of(probe.KeepQK([(call.site.step, call.site.layer)], dtype="float32"), call)
    q, k = (torch.from_numpy(kept[side]) for side in "qk")
    assert ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) - weights).abs().max() < 1e-5


def test_settling_compares_steps_whose_weights_were_changed_in_other_ways():
    plain, (call, weights) = one_call(torch.float64, heads=3), reweighted("raise")
    before = whole(plain)[0]
    settling = probe.Settling()
    settling.begin((), 2, 1)
    plain.lse()
    assert settling.reduce(plain.entry(0)) is None
    entry = call.entry(0)
    entry.site = replace(entry.site, step=1)
    alike = settling.reduce(entry)["bhattacharyya"]
    expected = (before * weights).sqrt().sum(-1)[:, where(call, "rows", "video")].mean(1)
    assert (alike[:, 0] - expected).abs().max() < 1e-5


def test_rows_that_see_nothing_give_zero_everywhere():
    call, weights = reweighted("blind", torch.float32)
    blind = torch.arange(31) % 3 == 1
    entry = call.entry(0)
    assert call.out[0, :, blind].abs().max() == 0
    assert call.lse()[0, :, blind].isneginf().all()
    assert entry.weights()[:, blind].abs().max() == 0
    assert (entry.weights() - weights).abs().max() < 1e-5
    assert entry.attend(torch.ones(3, 31, 16))[:, blind].abs().max() == 0
    assert torch.isfinite(entry.column_means(slice(None))).all()
    assert entry.shares[:, blind].abs().max() == 0


def test_an_entry_shows_changes_at_their_heads_only():
    call = one_call(torch.float64, heads=3)
    call.change(replace(changed(call)["hide"], heads=(0, 2)))
    call.change(replace(changed(call)["raise"], heads=(1, 2)))
    weights = whole(call)[0]
    weigh.run(call)
    assert (call.entry(0).weights() - weights).abs().max() < 1e-12
    assert (call.entry(0, (2, 1)).weights() - weights[[2, 1]]).abs().max() < 1e-12


def test_all_entries_of_a_changed_call_are_equally_wide():
    call = batch()
    call.change(factors(None, torch.arange(31) % 3, [[1.0, 0.3, 2.0]], entry=1))
    assert {call.entry(row).q.shape[-1] for row in range(3)} == {16}
    weigh.run(call)
    assert {(call.entry(row).q.shape[-1], call.entry(row).extra) for row in range(3)} == {(24, 8)}


@pytest.mark.parametrize("name", ["bias", "window", "move", "map", "negative"])
def test_what_readouts_cannot_show_is_refused(name):
    call = one_call(heads=3)
    call.change(changed(call)[name])
    plain = call.entry(0).weights().clone()  # before the attention: that of q and k
    weigh.run(call)
    with pytest.raises(probe.MmditError, match=r"must see changes that are factors or added keys.*stage=Stage\.BEFORE"):
        call.entry(0)
    if name == "map":  # not at this head
        assert (call.entry(0, (1,)).weights() - plain[1:2]).abs().max() < 1e-6


def test_the_entropy_of_rows_without_unit_sum_is_refused():
    call, _ = reweighted("added")
    with pytest.raises(probe.MmditError, match="must be over rows that sum to one. Got raw, hidden or added keys"):
        value_of(probe.Entropy(), call)


# ---- through a pipeline


@dataclass(eq=False)
class Boost(Handler):
    """Text columns of the second half of a batch, changed as asked."""

    change: str
    where: probe.Where = field(default_factory=lambda: probe.Where(branches=probe.Which(guided=True)))
    stage = Stage.EDIT
    touches = frozenset({"weights"})

    def serve(self, call, rows):
        text = (torch.arange(call.columns.total) < call.layout.text).long()
        for row in rows:
            if self.change == "factor":
                call.change(factors(None, text, [[1.0, 1.5]], entry=row))
            else:
                call.change(Bias(entry=row, of=lambda some: text.float()[None].expand(some.stop - some.start, -1)))

    def execution(self, layout):
        return f"{layout.text} columns raised"

    def __str__(self):
        return "Boost"


def run_tiny(*handlers):
    made = {}

    class Traced(Handler):
        where, stage = probe.Where(), Stage.USED

        def serve(self, call, rows):
            made[call.site] = call

    result = tiny.latents(probe.trace(tiny.pipeline(), *handlers, Traced()), steps=1)
    return result, made


def test_a_pipeline_goes_on_with_the_changed_attention():
    plain = tiny.latents(tiny.pipeline(), steps=1)
    before, used = probe.Entropy(stage=Stage.BEFORE), probe.WordMaps("cat", directions=("vt",), per_head=True)
    result, calls = run_tiny(Boost("factor"), before, used)
    assert not torch.equal(result, plain)
    assert before.values.keys() == used.values.keys()
    for at, maps in used.values.items():
        call = calls[probe.Site(at.step, 0, at.layer)]
        row = call.branches.index(at.branch)
        weights, out, _ = whole(call, row)
        assert (call.out[row] - out).abs().max() < 1e-5
        vt = weights[:, call.layout.video_slice, 2] * call.layout.total
        assert (torch.from_numpy(maps["vt"][:, 0]).flatten(1) - vt).abs().max() < 1e-4
        other = 1 - row
        own = F.scaled_dot_product_attention(call.q, call.k, call.v)
        assert torch.equal(call.out[other], own[other])
    again, _ = run_tiny(Boost("bias"))
    assert not torch.equal(again, plain)
    with pytest.raises(probe.MmditError, match="Read the model's own attention with stage=Stage.BEFORE"):
        run_tiny(Boost("bias"), probe.Entropy())


def test_the_plan_counts_how_calls_were_computed():
    plan = Plan([Boost("factor")], steps=1, layers=2)
    for layer in (0, 0, 1):
        call = one_call()
        call.site = replace(call.site, layer=layer)
        serve.before_attention(call, plan)
    assert {(site.layer, said): count for (site, said), count in plan.how.items()} == {(0, "thin"): 2, (1, "thin"): 1}


def test_an_explanation_can_say_how_a_handler_is_computed():
    plan = Plan([Boost("factor")], steps=1, layers=1)
    layout = probe.TokenLayout("text-video", 12, probe.Grid(3, 4, 4))
    assert plan.explain(0, 0).splitlines()[1:] == ["  edit: Boost", "  attention"]
    assert plan.explain(0, 0, layout).splitlines()[1:] == ["  edit: Boost", "    12 columns raised", "  attention"]
