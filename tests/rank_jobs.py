"""What ranks do in the tests: functions of a rank, and of what the test sends it."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from backend_checks import compiled, run, tiny_calls
from models import TinyDiT
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import hetcache_compile as hetcache


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...] | None) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def edit(
    rank: int, plan: Any, steps: str, shape: tuple[int, ...], names: tuple[str, ...] | None = None, inner: str = "eager"
) -> tuple[list[torch.Tensor], dict[str, int], int]:
    """An edit of one branch: its outputs, its steps, and the bytes of its cache."""
    model = compiled(TinyDiT(), inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hetcache.parallel(mesh_of(shape, names)), hetcache.session(plan, strict=True) as session:
            outputs = run(model, tiny_calls(steps))
    return outputs, session.stats.steps, session.stats.cache_bytes
