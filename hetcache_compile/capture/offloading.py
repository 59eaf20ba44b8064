"""Models whose weights come to the device part by part: diffusers' group offloading.

Its hooks bring the weights of a part ahead of that part, and take them away behind it. That is no part of what a model
computes: it is captured without them, and runs on weights that `runtime.streaming` copies in.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

REGISTRY = "_diffusers_hook"
"""The attribute of a module in which diffusers keeps its hooks."""
OFFLOADING = {"group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker"}
"""Names of hooks that move weights, or find out in which order to."""


def only_offloads(attributes: Mapping[str, Any]) -> bool:
    """Whether diffusers hooks a module, and no hook does more than to move its weights."""
    registry = attributes.get(REGISTRY)
    return registry is not None and registry.hooks.keys() <= OFFLOADING


def computes_as_written(module: nn.Module) -> bool:
    """Whether calling a module computes what its class says, but for weights that move."""
    attributes = vars(module)
    if "forward" not in attributes:
        return True
    own = inspect.unwrap(attributes["forward"], stop=lambda wrapped: isinstance(wrapped, MethodType))
    return only_offloads(attributes) and getattr(own, "__func__", None) is type(module).forward


def is_offloaded(model: nn.Module) -> bool:
    """Whether parts of a model move."""
    return any(only_offloads(vars(module)) and vars(module)[REGISTRY].hooks for module in model.modules())


def onload_device(model: nn.Module) -> torch.device | None:
    """Where the parts of a model run that are brought there in turn; None where they stay in one place."""
    return next((torch.device(group.onload_device) for group in _groups(model)), None)


def why_not_brought(model: nn.Module) -> str:
    """Why nobody but diffusers can bring the weights of a model to their device, or nothing."""
    groups = _groups(model)
    if any(group.offload_to_disk_path for group in groups):
        return "its weights are on disk (offload_to_disk_path)"
    devices = sorted({str(group.onload_device) for group in groups})
    return f"its parts run on several devices, {' and '.join(devices)}" if len(devices) > 1 else ""


def _groups(model: nn.Module) -> list[Any]:
    """Of weights that diffusers brings together."""
    registries = [vars(module)[REGISTRY] for module in model.modules() if REGISTRY in vars(module)]
    hooks = [registry.hooks.get("group_offloading") for registry in registries]
    return [hook.group for hook in hooks if hook is not None]


def lies_elsewhere(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor is not on a device; one without an index is any of its type."""
    there = tensor.device
    return there.type != device.type or (None not in (there.index, device.index) and there.index != device.index)


class StandIns:
    """Tensors like others on another device, for whoever asks for all but their numbers: in the memory of the largest.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.zeros(0, dtype=torch.uint8, device=device)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same type, shape and strides."""
        reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        num_bytes = max(reach, 1) * tensor.element_size()
        if num_bytes > len(self._memory):
            self._memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        numbers = self._memory[:num_bytes].view(tensor.dtype)
        return numbers.as_strided(tensor.shape, tensor.stride())
