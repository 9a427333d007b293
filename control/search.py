"""Which layers and heads matter: greedy search, vitality, ablation, candidates with a control group. No torch.

Running a model is left to the functions that are passed in: the same search serves a one-step error and a whole video.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probe.errors import UsageError

T = TypeVar("T", bound=Hashable)
Output = TypeVar("Output")
Head = tuple[int, int]
"""(layer, head)."""


@dataclass(frozen=True)
class Greedy(Generic[T]):
    """What a greedy search chose, in order, and the score of each candidate it tried in each round."""

    chosen: tuple[T, ...]
    rounds: tuple[dict[T, float], ...]


def greedy(
    candidates: Iterable[T], score: Callable[[tuple[T, ...]], float], rounds: int = 1, keep: int = 1
) -> Greedy[T]:
    """In each round, score what is chosen so far with each candidate added, and add the `keep` best (HeadHunter).

    `score` is higher for better, of a tuple of candidates: for HeadHunter the mean preference score of videos whose
    perturbed pass has these heads perturbed. Equal scores keep the order of the candidates.

    Raises:
        UsageError: more to choose than candidates, a candidate twice, or a score that is no number.
    """
    left = list(candidates)
    if rounds < 1 or keep < 1 or rounds * keep > len(left) or len(set(left)) < len(left):
        raise UsageError(
            f"A greedy search must choose at least one and at most all of different candidates. Got {rounds} rounds of "
            f"{keep} among {len(set(left))}. Choose fewer."
        )
    chosen: tuple[T, ...] = ()
    seen = []
    for _ in range(rounds):
        scores = {one: _number(score((*chosen, one)), one) for one in left}
        best = sorted(left, key=lambda one: -scores[one])[:keep]
        chosen += tuple(best)
        left = [one for one in left if one not in best]
        seen.append(scores)
    return Greedy(chosen, tuple(seen))


def vitality(
    layers: Iterable[int],
    run: Callable[[int | None], Sequence[Output]],
    similarity: Callable[[Output, Output], float],
) -> dict[int, float]:
    """1 - mean similarity of what comes out with a layer skipped to what comes out plain (Stable Flow, arXiv
    2411.14430): the higher, the more vital.

    `run(layer)` gives the outputs for some prompts and seeds, always the same, with that layer skipped; None skips
    none. `similarity` is 1 for equal outputs; Stable Flow takes the cosine of DINOv2 features.

    Raises:
        UsageError: runs of different length, or none.
    """
    plain = run(None)
    return {layer: 1 - _mean_similarity(plain, run(layer), similarity, layer) for layer in layers}


def ablation(candidates: Iterable[T], predict: Callable[[tuple[T, ...]], ArrayLike]) -> dict[T, float]:
    """Relative change of a prediction without each candidate, |e - e_without| / |e| in the Euclidean norm.

    `predict(without)` is the prediction with some candidates ablated, the same otherwise; () is the plain one.

    Raises:
        UsageError: a plain prediction of zeros.
    """
    plain = _plain(predict)
    return {one: _change(plain, predict((one,))) for one in candidates}


def interaction(candidates: Iterable[T], predict: Callable[[tuple[T, ...]], ArrayLike]) -> dict[tuple[T, T], float]:
    """How much more two candidates change together than each by itself: change(a, b) - change(a) - change(b), in the
    measure of `ablation`. Below 0 they stand in for the same thing or cancel, above 0 one makes up for the other.

    Raises:
        UsageError: a plain prediction of zeros.
    """
    some, plain = list(candidates), _plain(predict)
    alone = {one: _change(plain, predict((one,))) for one in some}
    return {(a, b): _change(plain, predict((a, b))) - alone[a] - alone[b] for a, b in combinations(some, 2)}


@dataclass(frozen=True)
class Candidates:
    """Heads that stand out, best first, as many others to compare with, and the score of every head [L, H]."""

    heads: tuple[Head, ...]
    control: tuple[Head, ...]
    scores: NDArray[np.float64]


def head_candidates(
    metrics: Mapping[str, ArrayLike],
    count: int,
    weights: Mapping[str, float] | None = None,
    control: Literal["lowest", "random"] = "lowest",
    seed: int = 0,
) -> Candidates:
    """The `count` heads with the highest composite z-score, and a control group of as many.

    Each metric [layers, heads] is standardised over all heads (one that is constant counts 0) and enters times its
    weight, 1 if none is given; a negative weight looks for low values. NaN is a head that was not measured: it is never
    chosen. Intervene at both groups: an effect that the control group shows too is not of these heads. "lowest" are the
    lowest scores, "random" is drawn from the other heads with `seed`.

    Raises:
        UsageError: no metric, metrics of different shapes, a weight of none, or too few measured heads.
    """
    measured = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
    shapes = {values.shape for values in measured.values()}
    unknown = sorted(set(weights or {}) - set(measured))
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or unknown:
        raise UsageError(
            f"Metrics must be arrays [layers, heads] of one shape, and weights be of these. Got shapes {sorted(shapes)}"
            f" and unknown weights {unknown}. Measure all of them at the same heads."
        )
    if control not in ("lowest", "random"):
        raise UsageError(f"A control group must be lowest or random. Got {control!r}. Choose one of them.")
    scores = np.sum([(weights or {}).get(name, 1.0) * _standard(one) for name, one in measured.items()], axis=0)
    order = [int(i) for i in np.argsort(-scores.reshape(-1), kind="stable") if not np.isnan(scores.flat[i])]
    if not 1 <= count <= len(order) // 2:
        raise UsageError(
            f"Candidates and their control group must be at most all {len(order)} measured heads. Got {count} of each. "
            "Ask for fewer."
        )
    others = order[count:]
    drawn = np.random.default_rng(seed).choice(others, count, replace=False) if control == "random" else others[-count:]
    return Candidates(_heads(order[:count], scores), _heads(drawn, scores), scores)


def _heads(flat: Iterable[int], scores: NDArray[np.float64]) -> tuple[Head, ...]:
    width = scores.shape[1]
    return tuple((int(i) // width, int(i) % width) for i in flat)


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Deviations from the mean in standard deviations, over the heads that were measured."""
    known = values[~np.isnan(values)]
    spread = known.std() if known.size else 0.0
    return (values - known.mean()) / spread if spread else values * 0.0


def _number(score: float, one: object) -> float:
    if not np.isfinite(score):
        raise UsageError(f"A score must be a finite number. Got {score} for {one}. Check what was generated.")
    return float(score)


def _mean_similarity(
    plain: Sequence[Output], skipped: Sequence[Output], similarity: Callable[[Output, Output], float], layer: int
) -> float:
    if not len(plain) or len(plain) != len(skipped):
        raise UsageError(
            f"A run must give as many outputs as the plain one. Got {len(skipped)} without layer {layer}, and "
            f"{len(plain)} plain. Use the same prompts and seeds."
        )
    return float(np.mean([similarity(a, b) for a, b in zip(plain, skipped, strict=True)]))


def _plain(predict: Callable[[tuple[()]], ArrayLike]) -> NDArray[np.float64]:
    plain = np.asarray(predict(()), np.float64)
    if not np.linalg.norm(plain):
        raise UsageError("A plain prediction must not be all zeros. Got zeros. Check what was predicted.")
    return plain


def _change(plain: NDArray[np.float64], other: ArrayLike) -> float:
    return float(np.linalg.norm(plain - np.asarray(other, np.float64)) / np.linalg.norm(plain))
