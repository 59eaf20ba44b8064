"""A tiny entry for each transformer class of diffusers; `python -m tests.zoo` prints which run and are captured."""

from __future__ import annotations

from . import hunyuan, ltx, wan
from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
    *wan.ENTRIES,
    *ltx.ENTRIES,
    *hunyuan.ENTRIES,
)
