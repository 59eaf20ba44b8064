"""A tiny entry for each transformer class of diffusers; `python -m tests.zoo` prints which run and are captured."""

from __future__ import annotations

from . import (
    audio,
    blocks,
    flux,
    hunyuan,
    images,
    kandinsky,
    ltx,
    multimodal,
    omni,
    packed,
    protein,
    qwen,
    sana_wm,
    streams,
    video,
    wan,
)
from .entry import Entry, has_class

FAMILIES = (
    wan,
    ltx,
    hunyuan,
    video,
    kandinsky,
    flux,
    qwen,
    images,
    packed,
    multimodal,
    omni,
    streams,
    sana_wm,
    audio,
    blocks,
    protein,
)
ENTRIES: tuple[Entry, ...] = tuple(entry for family in FAMILIES for entry in family.ENTRIES if has_class(entry))

# Classes that diffusers exports beside the ones above, and why they have no entry.
SKIPPED = {
    "MiniMaxMusic3RVQDepthDecoder": "it predicts codes one after the other: nothing is denoised",
    "PriorTransformer": "it denoises one image embedding: there is no grid of tokens",
}
