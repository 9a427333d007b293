"""How much a video moves, and how smoothly, from its pixels: what must be read beside CSCV. No torch.

Frames are uint8 [F, H, W, 3].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.registration import optical_flow_tvl1
from skimage.transform import resize_local_mean, warp

from probe.errors import UsageError

Grey = NDArray[np.floating[Any]]

SHORT = 64
"""Pixels of the shorter side in which motion is measured; larger frames are reduced by area."""

STILL = 0.25
"""Percent of the shorter side per frame below which a video hardly moves: noise of 3 grey levels measures 0.1, the
slowest objects of the miniature's world 1.2."""


@dataclass(frozen=True)
class Motion:
    """smoothness: 0 to 1, 1 where each frame lies half-way between its neighbours. degree: percent of the shorter side
    that the fastest twentieth of the pixels moves per frame.
    """

    smoothness: float
    degree: float

    @property
    def still(self) -> bool:
        """Whether the video hardly moves, so that its CSCV says nothing."""
        return self.degree < STILL


def motion(frames: NDArray[np.uint8]) -> Motion:
    """Smoothness and degree of motion of F >= 3 frames.

    Each frame t is predicted from t - 1 and t + 1: optical flow between the two (TV-L1), both warped half-way, and
    averaged. Smoothness is 1 - E / D, at least 0: E is the mean absolute error of the prediction, D that of simply
    repeating a neighbour, at least 1 grey level (else noise alone would decide on a still video). Degree is the mean
    over frames of the fastest 5 % of the flow. Both are measured on grey frames of `SHORT` pixels: a cut or a flash
    counts as unsmooth, jitter well below one such pixel is not seen.

    Source: ours. As in VBench (arXiv 2311.17982) smoothness is the error of an interpolation and the degree takes the
    fastest 5 % of the flow; there the models are learned (AMT, RAFT) and errors are not divided by the motion, so that
    its numbers lie near 1 and cannot be compared with these. TV-L1 was chosen on clips of `recipes.scene`: smoothness
    of even and of jittering ones (by up to one pixel) was 0.88 and 0.26 with it, 0.88 and 0.26 with Lucas-Kanade, which
    saw 1.6 % of motion in a still clip with noise (TV-L1 0.1 %), and 0.29 and 0.11 with the mean of the neighbours.

    Raises:
        UsageError: fewer than three frames.
    """
    if frames.ndim != 4 or len(frames) < 3:
        raise UsageError(f"Motion must be measured on three frames or more. Got {frames.shape}. Give a longer video.")
    grey = _reduced(frames)
    errors, steps, speeds = np.transpose([_triple(*grey[at : at + 3]) for at in range(len(grey) - 2)])
    smoothness = 1 - errors.mean() / max(steps.mean(), 1 / 255)
    return Motion(float(np.clip(smoothness, 0, 1)), float(100 * speeds.mean() / min(grey.shape[1:])))


def _triple(before: Grey, middle: Grey, after: Grey) -> tuple[float, float, float]:
    """Error of the prediction, error of repeating a neighbour, speed in pixels per frame."""
    step = float((np.abs(middle - before).mean() + np.abs(after - middle).mean()) / 2)
    if np.array_equal(before, after):
        return step, step, 0.0
    flow = optical_flow_tvl1(before, after, num_warp=10, tol=0.01)
    rows, columns = np.meshgrid(*map(np.arange, before.shape), indexing="ij")
    half = np.stack([rows, columns]), flow / 2
    guess = (_warped(before, half[0] - half[1]) + _warped(after, half[0] + half[1])) / 2
    speed = np.sort(np.hypot(*flow), axis=None)[-max(1, flow[0].size // 20) :].mean() / 2
    return float(np.abs(guess - middle).mean()), step, float(speed)


def _warped(picture: Grey, places: NDArray[np.floating]) -> Grey:
    return np.asarray(warp(picture, places, order=1, mode="edge"))


def _reduced(frames: NDArray[np.uint8]) -> Grey:
    """Grey levels 0 to 1, float32 [F, h, w]."""
    grey = frames.mean(-1, dtype=np.float32) / 255
    factor = min(grey.shape[1:]) / SHORT
    if factor <= 1:
        return grey
    size = round(grey.shape[1] / factor), round(grey.shape[2] / factor)
    return np.stack([resize_local_mean(frame, size) for frame in grey]).astype(np.float32)
