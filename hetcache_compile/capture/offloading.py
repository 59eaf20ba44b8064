"""Models whose weights come to the device part by part: diffusers' group offloading.

Its hooks bring the weights of a part ahead of that part, and take them away behind it. That is no part of what a model
computes: it is captured without them, and runs on weights that `runtime.streaming` copies in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    if not isinstance(own, MethodType) or own.__self__ is not module or own.__func__ is not type(module).forward:
        return False
    # Hooks that were removed leave the module's own method where it was replaced.
    return only_offloads(attributes) or (own is attributes["forward"] and "_hf_hook" not in attributes)


def comes_from(attributes: Mapping[str, Any]) -> str:
    """From which device to which a module's weights are brought, or nothing."""
    hook = attributes[REGISTRY].hooks.get("group_offloading")
    return "" if hook is None else f"{hook.group.offload_device} to {hook.group.onload_device}"


def is_offloaded(model: nn.Module) -> bool:
    """Whether parts of a model move."""
    return any(only_offloads(vars(module)) and vars(module)[REGISTRY].hooks for module in model.modules())


def onload_device(model: nn.Module) -> torch.device | None:
    """Where the parts of a model run that are brought there in turn; None where they stay in one place."""
    return next(map(_device_of, _groups(model)), None)


def why_not_brought(model: nn.Module) -> str:
    """Why nobody but diffusers can bring the weights of a model to their device, or nothing."""
    groups = _groups(model)
    if any(group.offload_to_disk_path for group in groups):
        return "its weights are on disk (offload_to_disk_path)"
    devices = sorted({str(_device_of(group)) for group in groups})
    return f"its parts run on several devices, {' and '.join(devices)}" if len(devices) > 1 else ""


@contextmanager
def all_offloaded(model: nn.Module) -> Iterator[None]:
    """Take every part away that diffusers has on the device now, and bring it back behind this.

    In the middle of a call some parts are there, for code of the call that still runs.
    """
    there = [group for group in _groups(model) if _is_onloaded(group)]
    for group in there:
        group.offload_()
    try:
        yield
    finally:
        for group in there:
            group.onload_()
            if group.stream is not None:
                group.stream.synchronize()


def _groups(model: nn.Module) -> list[Any]:
    """Of weights that diffusers brings together."""
    registries = [vars(module)[REGISTRY] for module in model.modules() if REGISTRY in vars(module)]
    hooks = [registry.hooks.get("group_offloading") for registry in registries]
    return [hook.group for hook in hooks if hook is not None]


def _device_of(group: Any) -> torch.device:
    """Where a group runs, with its number where there are several."""
    return torch.empty(0, device=group.onload_device).device


def _is_onloaded(group: Any) -> bool:
    """Whether a group's weights are where they run."""
    tensors = [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
    first = next(iter([*tensors, *group.parameters, *group.buffers]), None)
    return first is not None and not lies_elsewhere(first, _device_of(group))


def lies_elsewhere(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor is not on a device."""
    return tensor.device != device


class StandIns:
    """Tensors like others on another device, for whoever asks for all but their numbers: in the memory of the largest.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.zeros(0, dtype=torch.uint8, device=device)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same type and shape, with the strides of a copy."""
        copy = torch.empty_like(tensor, device="meta")
        num_bytes = max(copy.nbytes, copy.element_size())
        if num_bytes > len(self._memory):
            self._memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        numbers = self._memory[:num_bytes].view(tensor.dtype)
        return numbers.as_strided(copy.shape, copy.stride())
