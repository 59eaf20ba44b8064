"""diffusers' context parallelism: its configuration says which processes there are; a model that has it is refused."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from diffusers import ContextParallelConfig, ParallelConfig

ROWS = "rows"
"""The dim of a mesh along which processes share the tokens of a step."""


def mesh_of(config: ContextParallelConfig | ParallelConfig) -> DeviceMesh:
    """The processes that share tokens under a configuration of diffusers.

    Raises:
        ValueError: it is none of context parallelism, or not of all processes.
    """
    context: Any = getattr(config, "context_parallel_config", config)
    if not hasattr(context, "ulysses_degree"):
        raise ValueError(
            f"hetcache.parallel takes a DeviceMesh or a ContextParallelConfig, not {config}: weights are not shared"
        )
    if context.mesh is not None:
        shared: DeviceMesh = context.mesh["ring", "ulysses"]._flatten(ROWS)
        return shared
    size, count = context.ring_degree * context.ulysses_degree, dist.get_world_size()
    if size != count:
        raise ValueError(
            f"ring_degree {context.ring_degree} times ulysses_degree {context.ulysses_degree} is not the number of "
            f"processes, {count}. To share guidance too, give a mesh: init_device_mesh('cuda', (2, {size}), "
            "mesh_dim_names=('guidance', 'rows'))"
        )
    everybody = dist.group.WORLD
    assert everybody is not None
    return DeviceMesh.from_group(everybody, device_type(), mesh_dim_names=(ROWS,))


def device_type() -> str:
    """Of the devices that processes exchange tensors of: their accelerators, unless they talk by gloo alone."""
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None or dist.get_backend() == "gloo" else accelerator.type


def why_not_shared_here() -> str | None:
    """What to say of a call by a model that diffusers has made parallel; None in any other call.

    Its hooks split what the model is given, and often cut the graph in pieces: nothing in a piece says that it is of a
    few of the tokens. The model itself says so, and it is on the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        # No others: to look at the variables of a frame keeps them alive until it ends, in Python before 3.13.
        of_module = frame.f_code.co_filename == torch.nn.modules.module.__file__
        model = frame.f_locals.get("self") if of_module else None
        if isinstance(model, torch.nn.Module) and getattr(model, "_parallel_config", None) is not None:
            return (
                "the model runs plainly, because model.enable_parallelism(config=...) lets it share its tokens or "
                "weights among processes. Leave that out, and put `with hetcache.parallel(config):` around the "
                "session, which takes a ContextParallelConfig"
            )
        frame = frame.f_back
    return None
