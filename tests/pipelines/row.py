"""What a row is: a tiny pipeline of diffusers, one short call of it, and what a plan has to know about that call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from zoo.entry import Grid

from hetcache_compile.edit.media import to_pictures

STEPS = 3
Arguments = Mapping[str, Any]


class Masking(Enum):
    """What a pipeline does with its mask."""

    BLEND = "it puts the known latents back after each step"
    HIDE = "it hides the masked pixels from the model"


@dataclass(frozen=True, eq=False)
class Row:
    """A pipeline of tiny random components and one short call of it.

    Attributes:
        name: the class's name, followed by the variant in brackets if the class has several rows.
        build: makes the pipeline, always with the same weights, and without a progress bar.
        call: the arguments of one call, without a generator; the result is latents.
        size: (frames, height, width) of the call in pixels.
        grid: (T', H', W') of the tokens that are denoised.
        shape: of the latents that the call returns.
        layout: of the latents that the model gets: batch, channels, frames, height, width; tokens where they come
            packed; items where references are items of their own.
        guided: arguments that turn classifier-free guidance on; none if the pipeline has none.
        guided_calls: how often a step then calls the model; once, if both branches are one batch.
        calls: how often a step calls the model otherwise.
        steps: how many steps denoise: fewer than `STEPS` where a strength skips some.
        reference_tokens: how many tokens of references a packed sequence has beside those of the grid.
        references_first: whether they stand in front of those of the grid, not behind.
        mask_argument: which argument takes the mask; none if the pipeline has no such argument.
        source_argument: which argument then takes the pictures that the mask lies on.
        masking: what the pipeline does with the mask.
        reason: why the row does not run.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    size: Grid
    grid: Grid
    shape: tuple[int, ...] = ()
    layout: str = "BCTHW"
    guided: Arguments = field(default_factory=dict)
    guided_calls: int = 2
    calls: int = 1
    steps: int = STEPS
    reference_tokens: int = 0
    references_first: bool = False
    mask_argument: str = ""
    source_argument: str = ""
    masking: Masking | None = None
    reason: str = ""

    @property
    def token_mask(self) -> NDArray[np.bool_]:
        """`[T', H', W']`: the tokens of `mask`."""
        return quarter(self.grid, self.grid)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """`[T, H, W]`: the pixels that are to be generated, a quarter of each frame."""
        return quarter(self.size, self.grid)

    def run(self, pipe: Any, seed: int = 0, guided: bool = False, **changes: Any) -> torch.Tensor:
        """The latents of one call; arguments can be changed.

        Some pipelines sample the encoded picture with torch's own generator: it is seeded too.
        """
        plain = {"generator": torch.Generator().manual_seed(seed), "return_dict": False, "output_type": "latent"}
        arguments = {**plain, **self.call(), **(self.guided if guided else {}), **changes}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            latents = pipe(**arguments)[0]
        return latents[-1] if isinstance(latents, list) else latents


def row(
    pipeline: type,
    parts: Callable[[], Arguments],
    call: Callable[[], dict[str, Any]],
    variant: str = "",
    attributes: Arguments | None = None,
    **facts: Any,
) -> Row:
    """The row of a pipeline that is made from its parts.

    Args:
        pipeline: its class.
        parts: makes the arguments of the class.
        call: see `Row`.
        variant: names the row beside others of the same class.
        attributes: are set on the pipeline once it is made.
        facts: the other fields of `Row`.
    """

    def build() -> Any:
        pipe = pipeline(**parts())
        pipe.set_progress_bar_config(disable=True)
        for name, value in (attributes or {}).items():
            setattr(pipe, name, value)
        return pipe

    return Row(f"{pipeline.__name__} ({variant})" if variant else pipeline.__name__, build, call, **facts)


def quarter(size: Grid, grid: Grid) -> NDArray[np.bool_]:
    """`[T, H, W]`: True in the middle quarter of the tokens of each frame; it lies on token edges."""
    (frames, *pixels), (_, h, w) = size, grid
    mask = np.zeros((h, w), dtype=bool)
    mask[h // 4 : h // 4 + h // 2, w // 4 : w // 4 + w // 2] = True
    for axis, (length, count) in enumerate(zip(pixels, (h, w), strict=True)):
        mask = mask.repeat(length // count, axis=axis)
    return np.broadcast_to(mask, (frames, *mask.shape))


def video(size: Grid, seed: int = 0) -> list[Image.Image]:
    """Random pictures."""
    return to_pictures(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def picture(size: Grid, seed: int = 0) -> Image.Image:
    """A random picture."""
    return video((1, *size[1:]), seed)[0]


def mask_video(size: Grid, grid: Grid) -> list[Image.Image]:
    """`quarter` as pictures: white is to be generated."""
    return to_pictures(quarter(size, grid))


def mask_picture(size: Grid, grid: Grid) -> Image.Image:
    """`quarter` as one picture."""
    return mask_video((1, *size[1:]), grid)[0]


def embeds(*shape: int, seed: int = 0) -> torch.Tensor:
    """`[1, *shape]` of normal values, in the place of an encoded prompt."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
