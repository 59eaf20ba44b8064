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
    qwen,
    sana_wm,
    streams,
    video,
    wan,
)
from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
    *wan.ENTRIES,
    *ltx.ENTRIES,
    *hunyuan.ENTRIES,
    *video.ENTRIES,
    *kandinsky.ENTRIES,
    *flux.ENTRIES,
    *qwen.ENTRIES,
    *images.ENTRIES,
    *packed.ENTRIES,
    *multimodal.ENTRIES,
    *omni.ENTRIES,
    *streams.ENTRIES,
    *sana_wm.ENTRIES,
    *audio.ENTRIES,
    *blocks.ENTRIES,
)
