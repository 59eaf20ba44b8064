"""Tiny pipelines of diffusers, one row each, and what a plan has to know about them."""

from __future__ import annotations

from zoo.entry import has_class

from . import edits, flux, hunyuan, images, ltx, qwen, video, wan, world
from .row import Row

FAMILIES = (edits, flux, hunyuan, images, ltx, qwen, video, wan, world)
ROWS: tuple[Row, ...] = tuple(row for family in FAMILIES for row in family.ROWS if has_class(row))
