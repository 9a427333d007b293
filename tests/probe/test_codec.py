import numpy as np
import pytest

from probe.codec import FLOOR, decode, encode, error_bound
from probe.errors import StoreError


def both_ways(lift):
    return decode(*encode(lift))


def test_error_is_at_most_three_percent_over_the_whole_range():
    lift = 2.0 ** np.linspace(-7, 7, 6000, dtype=np.float32).reshape(2, 1, 3, 10, 10, 10)
    for maps in (lift, lift.reshape(1, 1, 1, 60, 10, 10)):
        error = np.abs(both_ways(maps) / maps - 1).max()
        assert error < 0.03, error
    assert error > 0.015  # the bound is of the size that 254 codes over 14 octaves must have


HEAVY = {
    "log-normal": lambda rng, shape: np.exp(rng.normal(0, 2, shape)),
    "Pareto": lambda rng, shape: rng.pareto(0.7, shape),
    "Cauchy": lambda rng, shape: np.abs(rng.standard_cauchy(shape)),
    "steep softmax": lambda rng, shape: np.exp(rng.normal(0, 5, shape)),
}


@pytest.mark.parametrize("name", HEAVY)
def test_the_stated_error_holds_for_heavy_tails(name):
    maps = HEAVY[name](np.random.default_rng(5), (3, 2, 4, 5, 12, 13))
    maps[1] = np.sort(maps[1].ravel()).reshape(maps[1].shape)  # narrow maps and wide ones
    maps = (maps / maps.mean((-3, -2, -1), keepdims=True)).astype(np.float32)  # one of them lifts 700 times
    codes, lo, hi = encode(maps)
    back, bound = decode(codes, lo, hi), np.broadcast_to(error_bound(lo, hi)[..., None, None, None], maps.shape)
    seen = maps >= FLOOR
    error = np.abs(back / np.where(seen, maps, 1) - 1)
    assert (error <= bound)[seen].all()
    assert (error > 0.95 * bound)[seen].any()  # the bound is no wider than it must be
    assert not back[~seen].any()
    assert bound.max() < np.exp2((np.log2(maps.max()) + 7) / 508) - 1 + 2e-5


def test_the_error_of_fourteen_octaves_is_two_percent():
    assert error_bound(np.array(-7.0), np.array(7.0)) == pytest.approx(0.0193, abs=1e-4)


def test_a_narrow_map_is_kept_more_exactly():
    lift = np.linspace(1, 2, 1000, dtype=np.float32).reshape(1, 1, 1, 10, 10, 10)
    assert np.abs(both_ways(lift) / lift - 1).max() < 0.0015


def test_zero_and_below_the_floor_come_back_as_exactly_zero():
    lift = np.array([0, FLOOR / 2, FLOOR, 1, 128, 0], np.float32).reshape(1, 1, 1, 1, 2, 3)
    back = both_ways(lift).ravel()
    assert back[[0, 1, 5]].tolist() == [0, 0, 0]
    np.testing.assert_allclose(back[2:5], [FLOOR, 1, 128], rtol=0.03)


def test_the_extremes_of_each_map_are_exact():
    lift = np.array([[0.5, 3, 7.25], [0.25, 1, 90]], np.float32).reshape(2, 1, 1, 1, 1, 3)
    back = both_ways(lift)
    np.testing.assert_allclose(back.min(-1), lift.min(-1), rtol=1e-6)
    np.testing.assert_allclose(back.max(-1), lift.max(-1), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 3.3])
def test_a_flat_map_is_exact(value):
    lift = np.full((1, 2, 1, 2, 3, 4), value, np.float32)
    np.testing.assert_allclose(both_ways(lift), lift, rtol=1e-6)


def test_each_map_has_its_own_range():
    lift = np.ones((1, 1, 2, 1, 2, 2), np.float32)
    lift[0, 0, 1] = [[64, 128], [32, 0]]
    _, lo, hi = encode(lift)
    assert lo.tolist() == [[[0, 5]]]
    assert hi.tolist() == [[[0, 7]]]


@pytest.mark.parametrize(("value", "said"), [(np.nan, "1 NaN"), (np.inf, "1 infinite"), (-0.5, "1 negative")])
def test_bad_values_are_refused_and_counted(value, said):
    lift = np.ones((1, 1, 1, 1, 2, 2), np.float32)
    lift[..., 0, 0] = value
    with pytest.raises(StoreError, match=f"^map lift must be finite and at least 0. Got {said}. Check"):
        encode(lift)
