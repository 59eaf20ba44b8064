"""The tiny pipelines keep what their rows promise: the same latents each time, calls of the model, tokens, masks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import ROWS
from pipelines.row import Masking, Row, quarter

pytestmark = pytest.mark.wide
RUNNING = tuple(row for row in ROWS if not row.reason)
every_row = pytest.mark.parametrize("row", RUNNING, ids=lambda row: row.name)


def rows_of(masking: Masking) -> Any:
    rows = [row for row in RUNNING if row.masking is masking]
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


@functools.cache
def built(row: Row) -> Any:
    return row.build()


@contextmanager
def recorded(pipe: Any) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every call of the pipeline's models; what has no name is called "latents"."""
    calls: list[dict[str, Any]] = []

    def record(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({"latents": args[0] if args else kwargs.get("hidden_states"), **kwargs})

    models = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    hooks = [model.register_forward_pre_hook(record, with_kwargs=True) for model in models if model is not None]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@functools.cache
def first_run(row: Row) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    pipe = built(row)
    with recorded(pipe) as calls:
        return row.run(pipe), calls


def latents_of(call: dict[str, Any]) -> torch.Tensor:
    """What the model denoises; Z-Image gets a list of samples."""
    latents = call["latents"]
    return latents[0] if isinstance(latents, list) else latents


def patch_of(config: Any) -> tuple[int, int, int]:
    patch = config.get("all_patch_size", (config.get("patch_size"),))[0]  # Z-Image has a list of them
    if not isinstance(patch, int):
        return tuple(patch)
    return config.get("patch_size_t") or 1, patch, patch


@every_row
def test_a_call_is_repeatable(row: Row) -> None:
    """Of the same pipeline, and of another one that is made in the same way."""
    latents, _ = first_run(row)
    assert latents.shape == row.shape
    assert latents.isfinite().all()
    assert torch.equal(row.run(built(row)), latents)
    assert torch.equal(row.run(row.build()), latents)


@every_row
def test_guidance_calls_the_model_as_often_as_the_row_says(row: Row) -> None:
    latents, plain = first_run(row)
    assert len(plain) == row.steps * row.calls
    if not row.guided:
        return
    with recorded(built(row)) as calls:
        assert not torch.equal(row.run(built(row), guided=True), latents)
    assert len(calls) == row.steps * row.guided_calls
    branches = row.guided_calls * len(calls[0]["latents"])
    assert branches == 2 * len(plain[0]["latents"]), "one batch of both, or a call of each"


@every_row
def test_the_model_gets_the_tokens_of_the_grid(row: Row) -> None:
    latents = latents_of(first_run(row)[1][0])
    assert latents.ndim == len(row.layout)
    size = dict(zip(row.layout, latents.shape, strict=True))
    if "N" in size:
        assert size["N"] == prod(row.grid) + row.reference_tokens
    else:
        patch = patch_of(built(row).transformer.config)
        assert (size.get("T", 1), size["H"], size["W"]) == tuple(g * p for g, p in zip(row.grid, patch, strict=True))


@pytest.mark.parametrize("row", [row for row in RUNNING if row.reference_tokens], ids=lambda row: row.name)
def test_references_stand_where_the_row_says(row: Row) -> None:
    """They are what the steps do not change."""
    first, second, *_ = (latents_of(call) for call in first_run(row)[1])
    if first.shape != second.shape:  # they come with the first call only: they are what the noise does not change
        with recorded(built(row)) as calls:
            row.run(built(row), seed=1)
        second = latents_of(calls[0])
    same = (first == second).all(-1)[0]
    if not row.references_first:
        same = same.flip(0)
    assert same[: row.reference_tokens].all()
    assert not same[row.reference_tokens :].all()


@pytest.mark.parametrize("row", [row for row in ROWS if row.mask_argument], ids=lambda row: row.name)
def test_the_mask_is_that_of_the_row(row: Row) -> None:
    assert 0.2 <= row.mask.mean() <= 0.3
    assert row.mask.shape == row.size
    assert np.array_equal(as_frames(row.call()[row.mask_argument])[..., 0] > 0.5, row.mask)


@rows_of(Masking.BLEND)
def test_known_latents_are_put_back(row: Row) -> None:
    """Another prompt changes every latent under the mask, and no other."""
    latents, _ = first_run(row)
    text = row.call()["prompt_embeds"]
    other = row.run(built(row), prompt_embeds=[-text[0]] if isinstance(text, list) else -text)
    if latents.ndim == 3:
        masked = torch.from_numpy(row.token_mask.copy()).reshape(1, -1, 1)
    else:
        masked = torch.from_numpy(quarter((1, *latents.shape[-2:]), row.grid).copy())
    assert torch.equal(latents != other, masked.expand_as(latents))


@rows_of(Masking.HIDE)
def test_masked_pixels_are_hidden(row: Row) -> None:
    """Other pixels under the mask change nothing; other pixels beside it do."""
    latents, _ = first_run(row)
    source = row.call()[row.source_argument]
    hidden = row.run(built(row), **{row.source_argument: inverted(source, row.mask)})
    assert torch.equal(hidden, latents)
    shown = row.run(built(row), **{row.source_argument: inverted(source, ~row.mask)})
    assert not torch.equal(shown, latents)


@pytest.mark.parametrize(
    ("name", "argument", "channels", "frames", "white"),
    [
        ("WanVACEPipeline", "control_hidden_states", slice(10, None), slice(None), 1),
        ("WanAnimatePipeline (replace)", "hidden_states", slice(5, 9), slice(1, None), 0),
    ],
)
def test_the_model_is_told_of_the_mask(name: str, argument: str, channels: slice, frames: slice, white: int) -> None:
    row = next(row for row in RUNNING if row.name == name)
    told = first_run(row)[1][0][argument][0, channels, frames]
    masked = torch.from_numpy(quarter(tuple(told.shape[1:]), row.grid).copy())
    assert torch.equal(told == white, masked.expand_as(told))


@pytest.mark.parametrize("row", [row for row in ROWS if row.reason], ids=lambda row: row.name)
def test_what_does_not_run_still_does_not(row: Row) -> None:
    """If this fails, the reason holds no longer: remove it from the row."""
    with pytest.raises(TypeError):
        row.run(built(row))


def test_names_are_distinct() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def as_frames(pictures: Any) -> np.ndarray:
    """`[T, H, W, C]` from 0 to 1."""
    if isinstance(pictures, torch.Tensor):
        return pictures[0].permute(1, 2, 3, 0).numpy()
    frames = [np.asarray(frame) for frame in (pictures if isinstance(pictures, list) else [pictures])]
    return np.stack([frame[..., None] if frame.ndim == 2 else frame for frame in frames]) / 255


def inverted(pictures: Any, where: np.ndarray) -> Any:
    """The pictures, in the form they have, with the values of some pixels turned around."""
    frames = as_frames(pictures)
    frames = np.where(where[..., None], 1 - frames, frames)
    if isinstance(pictures, torch.Tensor):
        return torch.from_numpy(frames.astype(np.float32)).permute(3, 0, 1, 2)[None]
    images = [Image.fromarray((255 * frame).round().astype(np.uint8)) for frame in frames]
    return images if isinstance(pictures, list) else images[0]
