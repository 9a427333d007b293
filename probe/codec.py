"""Maps in one byte: the logarithm of lift, stretched over 254 codes.

A lift of 1.0 is uniform attention. Each map (one layer, head and word) keeps its own range `lo` to `hi` of log2(lift).
Code 0 says "below the floor" and comes back as exactly 0; codes 1 to 255 are evenly spaced from `lo` to `hi`. The error
is half a code (`error_bound`): 1.9 % of the value where the range is 2**14, less where it is narrower.

A probability is kept as a lift over `UNIT`: what is below 2**-23 (1.2e-7) is 0, the error at most 3.2 %.
"""

from __future__ import annotations

import numpy as np

from probe.errors import StoreError

ENCODING = "uint8_log2_lift"
FLOOR = 2.0**-7
"""Lift below which a map says nothing (1/128 of uniform); stored beside every map."""

UNIT = 2.0**-16
"""The probability that is kept as a lift of 1."""

_TOP = 254.0  # number of code intervals between lo and hi


def encode(lift: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes uint8 [..., F, Y, X] and lo, hi float32 [...] (log2 of lift) of maps float [..., F, Y, X].

    A map with nothing at or above the floor has lo = hi = 0.

    Raises:
        StoreError: a lift is negative, infinite or not a number.
    """
    if not np.isfinite(lift).all() or (lift < 0).any():
        raise StoreError(
            f"map lift must be finite and at least 0. Got {_bad_values(lift)}. Check the readout that made the map."
        )
    lift = np.asarray(lift, np.float32)
    seen = lift >= FLOOR
    log = np.log2(lift, where=seen, out=np.zeros_like(lift))
    axes = (-3, -2, -1)
    any_seen = seen.any(axes)
    lo = np.where(any_seen, np.min(log, axes, where=seen, initial=np.inf), 0).astype(np.float32)
    hi = np.where(any_seen, np.max(log, axes, where=seen, initial=-np.inf), 0).astype(np.float32)
    span = np.where(hi > lo, hi - lo, 1)[..., None, None, None]
    codes = np.rint((log - lo[..., None, None, None]) / span * _TOP) + 1
    return np.where(seen, codes, 0).astype(np.uint8), lo, hi


def decode(codes: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Return lift float32 [..., F, Y, X] from codes uint8 [..., F, Y, X] and lo, hi float32 [...]."""
    lo, hi = (np.asarray(edge, np.float32)[..., None, None, None] for edge in (lo, hi))
    log = lo + (codes.astype(np.float32) - 1) * ((hi - lo) / np.float32(_TOP))
    return np.where(codes > 0, np.exp2(log), 0).astype(np.float32)


def error_bound(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Return the largest relative error of a lift at or above the floor, by lo and hi [...] of its map.

    Half of one of 254 even steps in log2: 2**((hi - lo) / 508) - 1, and 1e-5 for the rounding of float32. What lies
    below the floor is off by less than the floor itself.
    """
    return np.exp2((np.asarray(hi, float) - lo) / (2 * _TOP)) - 1 + 1e-5


def _bad_values(lift: np.ndarray) -> str:
    kinds = {"NaN": np.isnan(lift), "infinite": np.isinf(lift), "negative": lift < 0}
    return ", ".join(f"{int(mask.sum())} {name}" for name, mask in kinds.items() if mask.any())
