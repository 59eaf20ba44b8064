"""Exports that several test files read: made once in a test run, of models that are as small as can be."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch

from hetcache_compile import Plan
from hetcache_compile.export.check.verify import verify_with_ort
from hetcache_compile.export.exporter import ExportOptions, export_model
from hetcache_compile.export.model.sample_call import CallShape
from hetcache_compile.export.model.source import Source, load_source

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


def root() -> Path:
    """A folder that all workers of a test run share; pytest removes it in time."""
    folder = Path(os.environ["HETCACHE_TEST_EXPORTS"])
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def checkpoint() -> Path:
    """A model folder with the same model."""
    folder = Path(tempfile.mkdtemp(dir=root()))
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
    """The export folder for these options; fp32 ones are checked, and that of opset 20 has a baseline.

    All workers of a test run share it: the first one that needs it makes it.
    """
    out = root() / f"{dtype}-{opset}{'-dynamic' * dynamic}"
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            options = ExportOptions(
                dtype, opset, baseline=(dtype, opset) == ("fp32", 20),
                dynamic_active=(20, ACTIVE, 40) if dynamic else None,
            )  # fmt: skip
            checks = [verify_with_ort] if dtype == "fp32" else []
            export_model(str(checkpoint()), plan_of(), out, options, shape=shape(), checks=checks)
    return out
