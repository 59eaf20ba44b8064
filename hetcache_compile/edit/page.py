"""`report.html`: one page that needs no other file. Its template, style and script are `page.html`, `.css` and `.js`.

The frames of the input, of each result and of their difference are tiles of one WebP picture each. Videos would take
about half the space. But a browser does not show a chosen frame of several videos at the same moment, and not every
browser plays H.264. Small clips are stored without loss, as the two results differ by less than compression changes.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..plan.partition import TokenKind
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from .editing import EditRequest, Run
from .media import TINT, Frames
from .metrics import psnr

FOLDER = Path(__file__).parent
MOST_PIXELS = 2**23
"""Of a sheet, over all frames. Larger clips are shown smaller: phones refuse pictures of more than 2^24 pixels."""
MOST_EXACT_PIXELS = 2**19
"""Up to here sheets are stored without loss."""
QUALITY = 90
"""Of WebP beyond that, out of 100."""
DIFFERENCE_COLOURS = ("#000000", "#b5367a", "#fcfdbf")
"""Of the difference map, from no difference to the largest that is told apart."""
LEAST_TOP = 8
"""8-bit levels that the map spans at least: rounding alone, which nobody sees, should stay dark."""
ROLES = ("generative", "margin", "context, active", "read from the cache", "left out")
"""Of a token in PARTIAL steps. The first three are those of active tokens, by `TokenKind`."""


@dataclass(frozen=True)
class Words:
    """What the page says of the figures.

    Attributes:
        headline: name and value of what matters most.
        rows: the same of every figure.
        warning: a line to show first, or None.
    """

    headline: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, str]]
    warning: str | None = None


def render_page(
    report: dict[str, Any], words: Words, request: EditRequest, plan: Plan, cached: Run, uncached: Run | None
) -> str:
    """The page as HTML.

    Args:
        report: of `report.make_report`.
        words: the figures in words.
        request: of the edit.
        plan: that `cached` followed.
        cached: the run with a cache; its frames are needed.
        uncached: the run to compare with; without its frames nothing is compared.
    """
    compared = uncached is not None and uncached.frames is not None
    classes = ("compared" if compared else "alone", "still" if len(request.video) == 1 else "clip")
    data = page_data(report, request, plan, cached, uncached)
    height, width = request.mask.shape[1:]
    settings = [
        f"{_count(len(request.video), 'frame')} of {width} x {height}",
        _count(request.num_inference_steps, "step"),
        *([] if request.guidance_scale is None else [f"guidance {request.guidance_scale:g}"]),
        *(f"{name} {value}" for name, value in report["call"].items()),
        f"seed {request.seed}",
    ]
    machine = f"{report['processor']}, {_count(report['threads'], 'thread')}, torch {report['versions']['torch']}"
    return Template((FOLDER / "page.html").read_text("utf-8")).substitute(
        style=(FOLDER / "page.css").read_text("utf-8"),
        script=(FOLDER / "page.js").read_text("utf-8"),
        # No "<" may stand in a script element: "</script>" in a prompt would end it.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        classes=" ".join(classes),
        prompt=html.escape(request.prompt),
        setting=html.escape(", ".join(settings)),
        result="edit.png" if len(request.video) == 1 else "edit.mp4",
        warning=f'<p class="warning">{html.escape(words.warning)}</p>' if words.warning else "",
        headline="\n".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in words.headline
        ),
        plan=html.escape(plan.describe()),
        rows="\n".join(
            f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
            for name, value in words.rows
        ),
        command=html.escape(report["command"]),
        machine=html.escape(machine),
    )


def page_data(
    report: dict[str, Any], request: EditRequest, plan: Plan, cached: Run, uncached: Run | None
) -> dict[str, Any]:
    """All that the script of the page draws."""
    assert cached.frames is not None
    sheet = Sheet(request.mask.shape)
    sheets = {"input": sheet.pictures(request.video), "mask": sheet.mask(request.mask)}
    sheets["cached"] = sheet.pictures(cached.frames)
    data: dict[str, Any] = {
        "frames": sheet.frames, "height": sheet.height, "width": sheet.width, "columns": sheet.columns,
        "fps": float(request.playback.rate), "exact": sheet.exact, "full_size": sheet.scale == 1, "sheets": sheets,
        "plan": tokens_by_frame(plan, sheet.frames), "calls": calls_by_step(plan, cached),
        "seconds": report["total_seconds"], "median_seconds": report["seconds"], "steps": report["steps"],
        "uncached_call_seconds": None, "psnr": None, "difference": None,
    }  # fmt: skip
    if uncached is not None and uncached.frames is not None:
        sheets["uncached"] = sheet.pictures(uncached.frames)
        levels = difference(cached.frames, uncached.frames)
        top = largest_told_apart(levels)
        sheets["difference"] = sheet.differences(levels, top)
        data["difference"] = {"top": top, "largest": int(levels.max()), "colours": DIFFERENCE_COLOURS}
        data["uncached_call_seconds"] = uncached.median_seconds["FULL"]
        data["psnr"] = {
            "mask": psnr_by_frame(cached.frames, uncached.frames, request.mask),
            "whole": psnr_by_frame(cached.frames, uncached.frames, np.ones_like(request.mask)),
        }
    return data


class Sheet:
    """How the frames of a clip stand in one picture: row by row, in about a square.

    Args:
        shape: (T, H, W) of the clip.

    Attributes:
        scale: of the frames, at most 1.
        height: of a frame in the sheet, in pixels; `width` likewise.
        columns: frames in a row.
        exact: whether it is stored without loss.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.frames, height, width = shape
        self.scale = min(1.0, math.sqrt(MOST_PIXELS / math.prod(shape)))
        self.height, self.width = max(1, int(height * self.scale)), max(1, int(width * self.scale))
        self.columns = min(self.frames, max(1, round(math.sqrt(self.frames * self.height / self.width))))
        self.exact = math.prod(shape) <= MOST_EXACT_PIXELS

    def pictures(self, frames: Frames) -> str:
        """A video, uint8 `[T, H, W, 3]`, as the address of a picture in the page."""
        return self._encode((Image.fromarray(frame) for frame in frames), Image.Resampling.LANCZOS, self.exact)

    def mask(self, mask: NDArray[np.bool_]) -> str:
        """A mask, bool `[T, H, W]`, as a colour that lies half transparent over the input."""
        colour = np.array([*TINT, 128], dtype=np.uint8)
        tiles = (Image.fromarray(frame[..., None] * colour) for frame in mask)
        return self._encode(tiles, Image.Resampling.NEAREST, exact=True, mode="RGBA")

    def differences(self, levels: NDArray[np.uint8], top: int) -> str:
        """Differences in 8-bit levels, uint8 `[T, H, W]`, in the colours of the map; those of `top` and more alike."""
        ends = [tuple(bytes.fromhex(colour[1:])) for colour in DIFFERENCE_COLOURS]
        places = np.linspace(0, top, len(ends))
        channels = [np.interp(np.arange(256), places, channel) for channel in zip(*ends, strict=True)]
        colours = np.stack(channels, axis=-1).round().astype(np.uint8)
        return self._encode((Image.fromarray(colours[frame]) for frame in levels), Image.Resampling.BOX, self.exact)

    def _encode(
        self, tiles: Iterable[Image.Image], resampling: Image.Resampling, exact: bool, mode: str = "RGB"
    ) -> str:
        rows = -(-self.frames // self.columns)
        picture = Image.new(mode, (self.columns * self.width, rows * self.height))
        for number, tile in enumerate(tiles):
            row, column = divmod(number, self.columns)
            small = tile.resize((self.width, self.height), resampling) if self.scale < 1 else tile
            picture.paste(small, (column * self.width, row * self.height))
        file = io.BytesIO()
        picture.save(file, "webp", lossless=exact, quality=QUALITY)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def difference(a: Frames, b: Frames) -> NDArray[np.uint8]:
    """How far two videos `[T, H, W, 3]` are apart: uint8 `[T, H, W]`, that of the channel that differs most."""
    return np.asarray((np.maximum(a, b) - np.minimum(a, b)).max(axis=-1))


def largest_told_apart(levels: NDArray[np.uint8]) -> int:
    """Where the scale of the map ends, in levels: few pixels beyond must not leave the others dark."""
    return max(LEAST_TOP, math.ceil(np.percentile(levels, 99.9)))


def psnr_by_frame(result: Frames, reference: Frames, region: NDArray[np.bool_]) -> list[float | str]:
    """PSNR of each frame in dB over `region` `[T, H, W]`; "identical", or "empty" where the region is."""
    values: list[float | str] = []
    for a, b, where in zip(result, reference, region, strict=True):
        value = psnr(a, b, where)
        values.append(round(value, 2) if value is not None else "identical" if where.any() else "empty")
    return values


def tokens_by_frame(plan: Plan, frames: int) -> dict[str, Any]:
    """What each token is, as a digit into `ROLES`: a string for each latent frame; and which each frame lies in.

    A causal video VAE gives the first frame a latent of its own and then groups the frames (see
    `partition.to_token_grid`).
    """
    roles = np.full(plan.num_tokens, ROLES.index("left out"))
    roles[plan.context_index] = ROLES.index("read from the cache")
    roles[plan.active_index] = plan.token_kind[plan.active_index]
    latents, height, width = plan.grid
    lines = ["".join(map(str, frame)) for frame in roles.reshape(latents, -1)]
    latent_of = [-(-frame * (latents - 1) // max(1, frames - 1)) for frame in range(frames)]
    return {
        "height": height, "width": width, "roles": ROLES, "tokens": lines, "latent_of": latent_of,
        "num_active_roles": len(TokenKind), "changes": plan.selects_at_run_time,
    }  # fmt: skip


def calls_by_step(plan: Plan, cached: Run) -> list[list[dict[str, Any]]]:
    """The model calls of each step, with kind and seconds: two where guidance makes two.

    Where the calls are no multiple of the plan's steps, each call is shown as a step.
    """
    assert cached.stats is not None
    kinds = cached.stats.kinds or [StepKind.FULL] * len(cached.seconds)
    calls = [
        {"kind": kind.name, "seconds": round(seconds, 7)} for kind, seconds in zip(kinds, cached.seconds, strict=True)
    ]
    branches, rest = divmod(len(calls), len(plan.steps))
    branches = 1 if rest else branches
    return [calls[first : first + branches] for first in range(0, len(calls), branches)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
