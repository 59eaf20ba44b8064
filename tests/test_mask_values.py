"""Masks in memory: every shape and every kind of values that people have is the same mask, or refused in a line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image
from scipy.ndimage import gaussian_filter

from hetcache_compile import MaskError, Plan, to_mask
from hetcache_compile.edit.media import to_pictures
from hetcache_compile.reference.demo import moving_mask

MASK = moving_mask(5, 48, 64)
WHITE = MASK.astype(np.uint8) * 255
SHARE = MASK.astype(np.float32)
RED = np.where(MASK[..., None], np.uint8([255, 0, 0]), np.uint8(0))

OF_DIFFUSERS: dict[str, Any] = {
    "pictures": to_pictures(MASK),
    "colour pictures": [picture.convert("RGB") for picture in to_pictures(MASK)],
    "a batch of pictures": [to_pictures(MASK)],
    "arrays [H, W, 1]": list(SHARE[..., None]),
    "arrays [H, W, 3]": list(np.repeat(SHARE[..., None], 3, axis=-1)),
    "tensors [1, H, W]": list(torch.from_numpy(SHARE)[:, None]),
    "array [1, T, H, W, 1]": SHARE[None, ..., None],
    "array [1, T, H, W, 3]": np.repeat(SHARE[None, ..., None], 3, axis=-1),
    "tensor [1, T, 1, H, W]": torch.from_numpy(SHARE)[None, :, None],
    "list of a tensor [T, 1, H, W]": [torch.from_numpy(SHARE)[:, None]],
}
OTHERS: dict[str, Any] = {
    "bool": MASK,
    "bool tensor": torch.from_numpy(MASK),
    "nested list": MASK.tolist(),
    "bfloat16": torch.from_numpy(SHARE).bfloat16(),
    "0 and 1": MASK.astype(np.int64),
    "0 to 255": WHITE,
    "0 to 255 as floats": WHITE.astype(np.float32),
    "16 bits": WHITE.astype(np.uint16) * 257,
    "0 and 7": MASK.astype(np.uint8) * 7,
    "16 and 235": np.where(MASK, np.uint8(235), np.uint8(16)),
    "[T, 1, H, W]": MASK[:, None],
    "[T, 3, H, W]": np.repeat(WHITE[:, None], 3, axis=1),
    "[3, T, H, W]": np.repeat(WHITE[None], 3, axis=0),
    "[1, T, H, W]": MASK[None],
    "[1, 1, T, H, W]": torch.from_numpy(SHARE)[None, None],
    "[1, 3, T, H, W]": np.repeat(WHITE[None, None], 3, axis=1),
    "[T, H, W, 1]": MASK[..., None],
    "[T, H, W, 4]": np.stack([WHITE, WHITE, WHITE, np.full_like(WHITE, 255)], axis=-1),
    "alpha": np.stack([np.full_like(WHITE, 255)] * 3 + [WHITE], axis=-1),
    "arrays [H, W]": list(WHITE),
    "pictures of 1 bit": [Image.fromarray(frame) for frame in MASK],
    "pictures of 1 and 8 bits": [Image.fromarray(MASK[0]), *to_pictures(MASK[1:])],
    "red pictures": to_pictures(RED),
    "dark and bright colours": to_pictures(np.where((np.arange(64) < 32)[:, None], RED, RED[..., ::-1] // 4)),
    "1 bit and alpha": [Image.fromarray(MASK[0]), *(picture.convert("LA") for picture in to_pictures(MASK[1:]))],
}
SAME = {**OF_DIFFUSERS, **OTHERS}
PALETTE = [0, 0, 0, 64, 0, 0, 0, 32, 0]


def objects() -> np.ndarray:
    """Labels 0, 1 and 2."""
    labels = MASK.astype(np.uint8)
    labels[..., 32:] *= 2
    return labels


def palette_picture(labels: np.ndarray, palette: list[int]) -> Image.Image:
    picture = Image.fromarray(labels).convert("P")
    picture.putdata(labels.ravel().tolist())
    picture.putpalette(palette)
    return picture


@pytest.mark.parametrize("name", SAME)
def test_every_form_is_the_same_mask(name: str) -> None:
    mask = to_mask(SAME[name])
    assert mask.dtype == np.bool_
    assert np.array_equal(mask, MASK)
    assert np.array_equal(to_mask(SAME[name], size=(48, 64)), MASK)
    plans = [Plan.from_mask(form, (2, 3, 4)) for form in (SAME[name], MASK)]
    assert np.array_equal(plans[0].active_index, plans[1].active_index)


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_what_diffusers_takes_is_what_diffusers_generates(name: str) -> None:
    """As `WanVACEPipeline.preprocess_conditions` and `prepare_video_latents` do."""
    processed = VideoProcessor(vae_scale_factor=8).preprocess_video(OF_DIFFUSERS[name], 48, 64)
    assert np.array_equal((processed[0, 0] / 2 + 0.5).numpy() > 0.5, to_mask(OF_DIFFUSERS[name]))


@pytest.mark.parametrize("axis", [None, 0, -1], ids=str)
def test_one_picture_stands_for_every_frame(axis: int | None) -> None:
    still = WHITE[0] if axis is None else np.repeat(np.expand_dims(WHITE[0], axis), 3, axis=axis)
    still = still if axis != 0 else still[None]
    assert np.array_equal(to_mask(still), MASK[:1])
    for form in (still, Image.fromarray(WHITE[0]), torch.from_numpy(still)):
        tokens = Plan.from_mask(form, (2, 3, 4)).token_kind.reshape(2, 3, 4) == 0
        assert np.array_equal(*tokens)
        assert tokens[0].any()
        assert not tokens[0].all()


def test_a_token_grid_as_narrow_as_colours_is_no_picture() -> None:
    grid = np.zeros((3, 5, 3), dtype=bool)
    grid[1, 2, 1] = True
    plan = Plan.from_mask(grid, (3, 5, 3), margin=0, context_ratio=0, multiple=1)
    assert plan.active_index.tolist() == np.flatnonzero(grid).tolist()
    assert np.array_equal(to_mask(grid, size=(80, 48)), grid)


def test_soft_edges_are_cut_at_half_or_where_it_is_said() -> None:
    soft = gaussian_filter(WHITE.astype(np.float64), (0, 2, 2)).round().astype(np.uint8)
    assert np.array_equal(to_mask(soft), soft > 127)
    assert np.array_equal(to_mask(soft, threshold=0.1), soft > 25)
    assert np.array_equal(to_mask(soft / np.float64(255), threshold=0.1), soft > 25)
    assert not to_mask(np.full((2, 8, 8), 0.5)).any(), "0.5 itself is not masked, as in diffusers"


def test_black_is_generated_when_inverted() -> None:
    assert np.array_equal(to_mask(255 - WHITE, invert=True), MASK)


@pytest.mark.parametrize("form", ["array", "palette"])
def test_labels_pick_objects_and_all_objects_are_masked_without_them(form: str) -> None:
    labels = objects()
    mask = labels if form == "array" else [palette_picture(frame, PALETTE) for frame in labels]
    assert np.array_equal(to_mask(mask), labels > 0)
    assert np.array_equal(to_mask(mask, labels=[2]), labels == 2)
    assert np.array_equal(to_mask(mask, labels=[1, 2]), labels > 0)
    with pytest.raises(MaskError, match="no pixel has the label 3: the mask holds the values 0, 1, 2"):
        to_mask(mask, labels=[3, 1])


def test_a_palette_of_greys_is_read_by_its_greys() -> None:
    """Small pictures are often saved so, in any order of the palette."""
    pictures = [palette_picture((~frame).astype(np.uint8), [255, 255, 255, 0, 0, 0]) for frame in MASK]
    assert np.array_equal(to_mask(pictures), MASK)


def photo() -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(0).random(MASK.shape), 3)
    return ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)


def with_alpha(grey: np.ndarray, alpha: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(np.stack(pair, -1).astype(np.uint8)) for pair in zip(grey, alpha, strict=True)]


REFUSED: dict[str, tuple[Any, str]] = {
    "labels and white": (np.where(objects() == 2, 255, objects()), "the values 0, 1, 255, which may be labels or sha"),
    "three shades": (np.where(objects() == 1, 100, objects() // 2 * 255), "the values 0, 100, 255, which may be"),
    "labels without a background": (objects() + 1, "the values 1, 2, 3, which may be labels or shades"),
    "a photo": (photo(), "values from 0 to 255, [0-9]+% of it grey: give a threshold"),
    "a dark soft mask": (gaussian_filter(MASK * 76.0, 1).round().astype(np.uint8), "values from 0 to .* grey: give a"),
    "red on white": (np.where(MASK[..., None], np.uint8([255, 0, 0]), np.uint8(255)), "colours but no black"),
    "two masks": (with_alpha(WHITE, np.where(np.arange(64) < 32, WHITE * 0, 255)), "two masks: 50% of it is opaque"),
    "transparent": (with_alpha(WHITE, WHITE * 0), "transparent everywhere"),
    "negative": (SHARE * 2 - 1, "must lie between 0 and 1, 0 and 255 or 0 and 65535, got -1 to 1"),
    "too large": (WHITE.astype(np.int64) << 10, "values up to 261120"),
    "not finite": (np.full((2, 4, 4), np.nan), "finite numbers"),
    "words": (np.full((2, 4, 4), "a"), "finite numbers"),
    "a batch": (np.stack([WHITE, WHITE])[:, :, None], "2 masks: make a plan for each sample"),
    "a batch of pictures": ([to_pictures(MASK)] * 2, "2 masks: make a plan for each sample"),
    "no frames": (np.zeros((0, 4, 4)), r"\[frames, height, width\].* got shape \(0, 4, 4\)"),
    "six axes": (np.zeros((1,) * 6), r"\[frames, height, width\].* got shape"),
    "ragged": ([[[0.0]], [[0.0, 1.0]]], r"must be \[frames, height, width\]"),
    "pictures of two sizes": ([Image.new("L", (8, 8)), Image.new("L", (8, 9))], "different sizes"),
    "pictures of two depths": ([Image.new("L", (8, 8)), Image.new("I;16", (8, 8))], "depths: uint16, uint8"),
    "pictures and none": ([Image.new("L", (8, 8)), None], "pictures and other things"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_mask_is_refused_with_what_it_holds(name: str) -> None:
    mask, message = REFUSED[name]
    with pytest.raises(MaskError, match=message) as caught:
        to_mask(mask)
    assert "\n" not in str(caught.value)


def test_labels_and_a_threshold_exclude_each_other() -> None:
    for options in ({"threshold": 1.5}, {"threshold": 0.5, "labels": [1]}):
        with pytest.raises(MaskError, match="either labels or a threshold from 0 to 1"):
            to_mask(MASK, **options)
    with pytest.raises(MaskError, match="labels pick values of a label map, and the mask has colours"):
        to_mask(RED, labels=[1])
