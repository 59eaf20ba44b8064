"""How far a video is from a reference, by region: fidelity to the uncached result, quality against ground truth.

`psnr` needs nothing but numpy. The other measures come with the extra `quality`:

* SSIM (Wang et al. 2004) from scikit-image, with the paper's Gaussian window.
* FLIP (Andersson et al. 2020), NVIDIA's own package `flip-evaluator`, is the perceptual distance. It models what an
  eye sees when two pictures alternate in place, needs no trained weights, and gives a map, so it can be kept to a
  region. LPIPS and DISTS (also in piq and pyiqa) need torchvision and a download of weights; HaarPSI on PyPI is
  research code and gives one number per picture; ColorVideoVDP gives one number per video.
* Consistency over time by warping along DIS optical flow of the reference, from OpenCV (Lai et al. 2018).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from ..errors import InputFileError, MissingExtraError

Video = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Comparison = dict[str, dict[str, float | None]]
"""Region -> metric -> value. JSON can hold it."""

REGIONS = ("generative", "band", "context", "overall")
METRICS = ("psnr_db", "ssim", "flip", "warp_error", "flicker")
OF_MOTION = {"warp_error", "flicker"}
BAND = 8
"""Pixels on each side of the mask edge: what one latent of Wan's VAE covers, where a seam would show."""


def psnr(a: Video, b: Video, region: Mask | None = None) -> float | None:
    """Peak signal-to-noise ratio in dB of two uint8 videos `[T, H, W, 3]`, over `region` `[T, H, W]` if given.

    Returns None where they are identical (the ratio is infinite) or the region is empty.
    """
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    if region is not None:
        error = error[region]
    if error.size == 0 or error.max() == 0:
        return None
    return float(10 * math.log10(255**2 / error.mean()))


def compare(
    result: Video, reference: Video, mask: Mask, *, band: int = BAND, inside: Sequence[str] = REGIONS,
    metrics: Sequence[str] = METRICS,
) -> Comparison:  # fmt: skip
    """Every metric in every region, or some of them.

    A region is judged alone: the reference stands in for the result everywhere else, so that an error outside it
    cannot reach its figures through a window, a filter or a flow.

    Args:
        result: uint8 `[T, H, W, 3]`.
        reference: the uncached result, or ground truth; as `result`.
        mask: bool `[T, H, W]`, true where the video was generated.
        band: how far the band reaches from the mask edge to each side, in pixels.
        inside: names of `regions`.
        metrics: which of `METRICS`.

    Returns:
        For each of `regions`: `psnr_db` in dB (None if identical), `ssim` up to 1, `flip` from 0 to 1, and in 8-bit
        levels `warp_error` (how much the result changes along the reference's motion) and `flicker` (how much its
        error does). None where there is nothing to measure: an empty region, or a single frame.

    Raises:
        InputFileError: the shapes or types do not fit.
        MissingExtraError: the extra `quality` is not installed.
    """
    _check(result, reference, mask)
    motion = list(_motion(reference)) if OF_MOTION & set(metrics) else []
    found = regions(mask, band)
    return {name: _measure(result, reference, found[name], motion, metrics) for name in inside}


def regions(mask: Mask, band: int = BAND) -> dict[str, Mask]:
    """Bool `[T, H, W]` by name.

    `generative` is the mask, `context` the rest, `band` the pixels of both within `band` pixels of the mask edge in
    their frame (the edge of the picture is none), `overall` everything.
    """
    near = np.stack([_near_edge(frame, band) for frame in mask])
    everything = np.ones(mask.shape, dtype=np.bool_)
    return dict(zip(REGIONS, (mask, near, ~mask, everything), strict=True))


def _check(result: Video, reference: Video, mask: Mask) -> None:
    shapes = result.shape == reference.shape == (*mask.shape, 3)
    if not shapes or result.dtype != np.uint8 or reference.dtype != np.uint8 or mask.dtype != np.bool_:
        raise InputFileError(
            "a comparison takes two uint8 videos [frames, height, width, 3] and their bool mask, got "
            f"{result.dtype} {result.shape}, {reference.dtype} {reference.shape} and {mask.dtype} {mask.shape}"
        )


def _near_edge(mask: Mask, band: int) -> Mask:
    if mask.all() or not mask.any():
        return np.zeros_like(mask)
    return np.asarray(distance_transform_edt(mask) + distance_transform_edt(~mask) <= band)


def _measure(
    result: Video, reference: Video, region: Mask, motion: list[Motion], metrics: Sequence[str]
) -> dict[str, float | None]:
    if not region.any():
        return dict.fromkeys(metrics)
    alone = np.where(region[..., None], result, reference)

    def mean(map_of: Callable[[Video, Video], NDArray[Any]]) -> float:
        maps = np.stack([map_of(*pair) for pair in zip(alone, reference, strict=True)])
        return float(maps[region].mean())

    def changes(video: Video) -> list[NDArray[np.float32]]:
        return [_changes(video, t, motion[t], region) for t in range(len(motion))]

    measure: dict[str, Callable[[], float | None]] = {
        "psnr_db": lambda: psnr(result, reference, region),
        "ssim": lambda: mean(_ssim_map),
        "flip": lambda: mean(_flip_map),
        "warp_error": lambda: _root_mean_square(changes(alone)),
        "flicker": lambda: _root_mean_square(
            [change - known for change, known in zip(changes(alone), changes(reference), strict=True)]
        ),
    }
    return {name: measure[name]() for name in metrics}


def _ssim_map(a: Video, b: Video) -> NDArray[np.float64]:
    """`[H, W]`, the mean of the channels."""
    _, similarity = _quality_module("skimage.metrics").structural_similarity(
        a, b, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    return np.asarray(similarity.mean(axis=-1))


def _flip_map(a: Video, b: Video) -> NDArray[np.float32]:
    """`[H, W]`, at the package's own viewing distance: 67 pixels per degree."""
    reference, test = (picture.astype(np.float32) / 255 for picture in (b, a))
    error, _, _ = _quality_module("flip_evaluator").evaluate(reference, test, "LDR", applyMagma=False, parameters={})
    return np.asarray(error[..., 0])


Motion = tuple[NDArray[np.float32], Mask]
"""Where each pixel of a frame lies in the next, `[H, W, 2]` as x, y; and whether it can be seen there."""


def _motion(video: Video) -> Iterator[Motion]:
    """Flow from each frame to the next.

    A pixel can be seen in both if it stays inside the picture and the flow back leads home, within the bound of
    Sundaram et al. (2010).
    """
    cv2 = _quality_module("cv2")
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    height, width = video.shape[1:3]
    here = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
    for first, second in pairwise(grey):
        forward = flow.calc(first, second, None)
        there = here + forward
        back = _sample(flow.calc(second, first, None), there)
        inside = ((there >= 0) & (there <= (width - 1, height - 1))).all(axis=-1)
        lengths = (forward**2).sum(axis=-1) + (back**2).sum(axis=-1)
        home = ((forward + back) ** 2).sum(axis=-1) < 0.01 * lengths + 0.5
        yield there, np.asarray(inside & home)


def _changes(video: Video, t: int, motion: Motion, region: Mask) -> NDArray[np.float32]:
    """What frame `t` differs by from the next along the motion: `[P, 3]`, for pixels seen in the region in both."""
    there, visible = motion
    stays = _sample(region[t + 1].astype(np.float32), there) > 1 - 1e-5
    chosen = region[t] & stays & visible
    return np.asarray((video[t].astype(np.float32) - _sample(video[t + 1].astype(np.float32), there))[chosen])


def _sample(picture: NDArray[np.float32], at: NDArray[np.float32]) -> NDArray[np.float32]:
    """A picture `[H, W]` or `[H, W, C]` read between its pixels."""
    cv2 = _quality_module("cv2")
    return np.asarray(cv2.remap(picture, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))


def _root_mean_square(parts: list[NDArray[np.float32]]) -> float | None:
    values = np.concatenate([part.ravel() for part in parts]) if parts else np.zeros(0)
    return float(np.sqrt((values.astype(np.float64) ** 2).mean())) if values.size else None


def check_extra() -> None:
    """Raise `MissingExtraError` now rather than after a long run, if the extra `quality` is not installed."""
    for name in ("skimage.metrics", "flip_evaluator", "cv2"):
        _quality_module(name)


def _quality_module(name: str) -> Any:
    """A module that only the extra `quality` brings."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(error.name or name, "quality") from error
