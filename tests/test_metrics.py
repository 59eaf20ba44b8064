"""Quality measures on videos whose figures are known beforehand."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from hetcache_compile.edit.metrics import METRICS, REGIONS, compare, psnr, regions
from hetcache_compile.errors import InputFileError, MissingExtraError

FRAMES, SIZE = 4, 64


@pytest.fixture(scope="module")
def pan():
    """A smooth texture that moves 2 pixels a frame to the left, between 60 and 200."""
    noise = gaussian_filter(np.random.default_rng(0).normal(size=(SIZE, SIZE + 2 * FRAMES, 3)), (4, 4, 0))
    texture = 130 + 70 * noise / np.abs(noise).max()
    return np.stack([texture[:, 2 * t : 2 * t + SIZE] for t in range(FRAMES)]).astype(np.uint8)


@pytest.fixture(scope="module")
def mask():
    mask = np.zeros((FRAMES, SIZE, SIZE), dtype=bool)
    mask[:, 16:48, 20:44] = True
    return mask


def test_identical_videos_have_no_error_anywhere(pan, mask):
    figures = compare(pan, pan.copy(), mask)
    assert tuple(figures) == REGIONS
    for region in figures.values():
        assert tuple(region) == METRICS
        assert region["psnr_db"] is None
        assert region["ssim"] == pytest.approx(1)
        assert region["flip"] == 0
        assert region["flicker"] == 0
        assert region["warp_error"] < 2, "the flow of a pan is found"
    json.dumps(figures, allow_nan=False)


def test_a_constant_offset_has_a_known_psnr_and_does_not_flicker(pan, mask):
    figures = compare(pan + 5, pan, mask)
    for region in figures.values():
        assert region["psnr_db"] == pytest.approx(20 * math.log10(255 / 5))
        assert region["flicker"] == pytest.approx(0, abs=1e-4)
        assert 0 < region["flip"] < 0.2
        assert 0.9 < region["ssim"] < 1


def test_an_offset_of_every_other_frame_flickers_by_as_much(pan, mask):
    result = pan.copy()
    result[1::2] += 10
    figures = compare(result, pan, mask)
    for region in figures.values():
        assert region["flicker"] == pytest.approx(10, rel=1e-4)
        assert region["warp_error"] == pytest.approx(10, rel=0.1)


def test_what_moves_with_the_reference_is_steady_and_what_stands_still_is_not(pan, mask):
    steady, still = pan.copy(), pan.copy()
    for t in range(FRAMES):
        steady[t, 24:40, 28 - 2 * t : 36 - 2 * t] += 30
        still[t, 24:40, 28:36] += 30
    moving, standing = (compare(result, pan, mask)["overall"] for result in (steady, still))
    assert moving["psnr_db"] == pytest.approx(standing["psnr_db"])
    assert moving["flicker"] < 0.5 * standing["flicker"]


def test_worse_videos_have_worse_figures(pan, mask):
    noise = np.random.default_rng(1).normal(size=pan.shape)
    figures = [
        compare(np.clip(pan + scale * noise, 0, 255).astype(np.uint8), pan, mask)["generative"] for scale in (2, 8, 32)
    ]
    for metric, sign in (("psnr_db", -1), ("ssim", -1), ("flip", 1), ("warp_error", 1), ("flicker", 1)):
        values = [sign * figure[metric] for figure in figures]
        assert values == sorted(values), metric
        assert values[0] < values[2], metric


@pytest.mark.parametrize(("spoilt", "untouched"), [("context", "generative"), ("generative", "context")])
def test_an_error_in_one_region_does_not_reach_the_figures_of_the_other(pan, mask, spoilt, untouched):
    clean = compare(pan, pan, mask)
    where = regions(mask)[spoilt]
    result = np.where(where[..., None], pan ^ 64, pan)
    figures = compare(result, pan, mask)
    assert figures[untouched] == clean[untouched]
    for region in (spoilt, "band", "overall"):
        assert figures[region]["psnr_db"] < 20
        assert figures[region]["ssim"] < 0.9
        assert figures[region]["flip"] > 0.1


def test_the_band_is_what_lies_near_the_edge_on_both_sides(mask):
    near = regions(mask, band=3)["band"]
    grown, shrunk = np.zeros_like(mask), np.zeros_like(mask)
    grown[:, 13:51, 20:44] = grown[:, 16:48, 17:47] = True
    shrunk[:, 19:45, 23:41] = True
    assert (near & mask == mask & ~shrunk).all()
    row, column = near[0, 30], near[0, :, 30]
    assert np.flatnonzero(row).tolist() == [*range(17, 23), *range(41, 47)]
    assert np.flatnonzero(column).tolist() == [*range(13, 19), *range(45, 51)]
    assert (near & ~mask & grown == grown & ~mask).all()
    assert not near[:, 13, 17].any(), "the corner is further away than its row and its column"


def test_empty_regions_and_single_frames_have_no_figures(pan):
    everywhere = np.ones((1, SIZE, SIZE), dtype=bool)
    figures = compare(pan[:1] + 5, pan[:1], everywhere)
    assert figures["context"] == figures["band"] == dict.fromkeys(METRICS)
    assert figures["generative"] == figures["overall"]
    assert figures["generative"]["psnr_db"] is not None
    assert figures["generative"]["flicker"] is figures["generative"]["warp_error"] is None


def test_videos_that_do_not_fit_are_refused(pan, mask):
    with pytest.raises(InputFileError, match=r"\(3, 64, 64, 3\)"):
        compare(pan[:3], pan, mask)
    with pytest.raises(InputFileError, match="float64"):
        compare(pan / 255, pan, mask)


def test_a_missing_extra_is_named_and_psnr_works_without_it(pan, mask, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"cv2 is not installed: .*hetcache-compile\[quality\]"):
        compare(pan + 1, pan, mask)
    assert psnr(pan + 1, pan) == pytest.approx(20 * math.log10(255))
