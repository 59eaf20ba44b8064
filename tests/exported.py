"""Exports that several test files read: made once in a test run, of models that are as small as can be."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch

from hetcache_compile import Plan
from hetcache_compile.export.exporter import ExportOptions, export_model
from hetcache_compile.export.source import CallShape, Source, load_source
from hetcache_compile.export.verify import verify_with_ort

ACTIVE = 27


def plan_of(active: int = ACTIVE, seed: int = 0, **kwargs: Any) -> Plan:
    """A plan with that many active tokens, at random places of `models.GRID`."""
    mask = np.zeros(models.NUM_TOKENS, dtype=bool)
    mask[np.random.default_rng(seed).permutation(models.NUM_TOKENS)[:active]] = True
    return Plan.from_token_mask(mask, models.GRID, num_inference_steps=20, **kwargs)


def tiny_vace(plan: Plan) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A factory for `hetcache-export exported:tiny_vace`."""
    assert plan.grid == models.GRID
    model = models.vace(num_layers=1, vace_layers=(0,))
    return model, models.call(model)


def tiny_dit(plan: Plan) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A factory of a model that exports in a moment."""
    return models.TinyDiT(), models.tiny_call(0)


@functools.cache
def checkpoint() -> Path:
    """A model folder with the same model."""
    folder = Path(tempfile.mkdtemp(prefix="hetcache-test-"))
    model, _ = tiny_vace(plan_of())
    model.save_pretrained(folder)
    return folder


def shape(seed: int = 0) -> CallShape:
    """The shape of `tiny_vace`'s call."""
    return CallShape(plan_of(), text_tokens=models.TEXT_TOKENS, seed=seed)


def source(dtype: str = "fp32", seed: int = 0) -> Source:
    """The exported model with a call of it."""
    return load_source(str(checkpoint()), shape(seed), dtype)


def export(dtype: str, opset: int, dynamic: bool = False) -> Path:
    """The export folder for these options; fp32 ones are checked and have a baseline."""
    return _export(dtype, opset, dynamic)


@functools.cache
def _export(dtype: str, opset: int, dynamic: bool) -> Path:
    out = Path(tempfile.mkdtemp(prefix="hetcache-test-")) / "export"
    checked = dtype == "fp32"
    options = ExportOptions(dtype, opset, baseline=checked, dynamic_active=(20, ACTIVE, 40) if dynamic else None)
    finish = [verify_with_ort] if checked else []
    export_model(str(checkpoint()), plan_of(), out, options, shape=shape(), finish=finish)
    return out
