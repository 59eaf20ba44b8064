"""Which input of a model is the time of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from .inputs import is_state, plain_name

aten = torch.ops.aten
NAMES = ("timestep", "timesteps", "sigma", "sigmas", "t", "time", "noise_level")
"""What models call it, the most common name first."""
WAVES = (aten.sin.default, aten.cos.default)


def time_input(inputs: Sequence[Node]) -> Node | None:
    """The input that holds the time of a step, or None.

    1. The one with the first of the names in `NAMES`; `L_timestep_` is one, as Dynamo writes it.
    2. The one with `timestep` in its name.
    3. The first whose sines and cosines alone go into a linear layer: Dynamo calls positional arguments `args_1`.
    """
    numbers = [node for node in inputs if not is_state(node.name) and _is_number(node)]
    names = {node: plain_name(node.name).lower() for node in numbers}
    for known in NAMES:
        found = [node for node, name in names.items() if name == known]
        if len(found) == 1:
            return found[0]
    found = [node for node, name in names.items() if "timestep" in name]
    if len(found) == 1:
        return found[0]
    given = {node for node in inputs if not is_state(node.name)}
    flat = [node for node in numbers if not isinstance(node.meta["val"], torch.Tensor) or node.meta["val"].ndim <= 2]
    return next((node for node in flat if _is_embedded(node, given - {node})), None)


def _is_number(node: Node) -> bool:
    """A real number, or one for each sample or token."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        axes = sum(size > 1 for size in value.shape)  # Cosmos 2 has a time for each frame: [B, 1, T, 1, 1]
        return axes <= 2 and value.dtype != torch.bool and not value.is_complex()
    return isinstance(value, float | int) and not isinstance(value, bool)


def _is_embedded(time: Node, others: set[Node]) -> bool:
    """Whether a sine or cosine of this input, with nothing of the others, is what a linear layer takes."""
    alone, waves = {time}, set[Node]()
    for node in time.graph.nodes:
        operands = node.all_input_nodes
        if node.op != "call_function" or not any(operand in alone for operand in operands):
            if any(operand in others for operand in operands):
                others = others | {node}
            continue
        if any(operand in others for operand in operands):
            others = others | {node}
            continue
        if node.target is aten.linear.default:
            if node.args[0] in waves:
                return True
            continue
        alone.add(node)
        if node.target in WAVES or any(operand in waves for operand in operands):
            waves.add(node)
    return False
