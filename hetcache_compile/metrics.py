"""How far two videos are apart."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8], region: NDArray[np.bool_] | None = None) -> float | None:
    """Peak signal-to-noise ratio in dB of two uint8 videos `[T, H, W, 3]`, over `region` `[T, H, W]` if given.

    Returns None where they are identical (the ratio is infinite) or the region is empty.
    """
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    if region is not None:
        error = error[region]
    if error.size == 0 or error.max() == 0:
        return None
    return float(10 * math.log10(255**2 / error.mean()))
