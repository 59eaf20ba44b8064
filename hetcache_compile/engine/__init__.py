"""Exported engines: `load` makes one a drop-in `transformer` of a diffusers pipeline."""

from .engine import Engine, load

__all__ = ["Engine", "load"]
