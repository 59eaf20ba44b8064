"""Whether an edit is one of the recorded clip: what its first call is given, outside the active tokens, and how each
call is run.

The graph up to where tokens are born runs on the recorded inputs and on those of the call. What it makes of them for
inactive tokens must be the same: the noise, which the recorded outputs move on from, and the clip. Texts may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Graph, GraphModule, Node

from ..capture.capture import Program
from ..errors import RecordError
from ..passes.analysis.analyse import Analysis
from ..passes.analysis.inputs import is_state, plain_name
from ..passes.ir.axis import Enter, Tokens
from ..passes.ir.graphs import device_of
from .caches import on_host, rows_of

ALIKE = 0.1
"""The largest relative difference (L2) of what is given for inactive tokens. A mask that moves changes what a codec
makes of the pixels beside it; another clip or other noise differs by about 1 (docs/second-edit.md)."""
MOST_NUMBERS = 1024
"""Inputs with at most so many numbers and at most one dim say how the model is to be run: scales, guidance, rates."""

Inputs = Mapping[str, torch.Tensor]


def inputs_of(program: Program, analysis: Analysis, inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The inputs of a call that become tokens, copied to the host.

    Args:
        program: whose inputs they are.
        analysis: of it.
        inputs: of the call.
    """
    given = zip(program.inputs, inputs, strict=True)
    return {name: on_host(value) for name, value in given if name in analysis.token_sources}


def is_setting(name: str, value: Any) -> bool:
    """Whether an input says how the model is to be run."""
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter) or is_state(name):
        return False
    return value.ndim < 2 and value.numel() <= MOST_NUMBERS


def check_alike(
    program: Program, analysis: Analysis, inputs: Sequence[Any], recorded: Inputs, inactive: NDArray[np.bool_]
) -> None:
    """See that a call may go on from a recorded one.

    Args:
        program: of both calls.
        analysis: of it.
        inputs: of the call.
        recorded: what `inputs_of` kept of the recorded call.
        inactive: bool `[N]`, the tokens that are not computed.

    Raises:
        RecordError: what is given for inactive tokens differs.
    """
    given = dict(zip(program.inputs, inputs, strict=True))
    for name, value in recorded.items():
        now = given.get(name)
        if not isinstance(now, torch.Tensor) or (now.shape, now.dtype) != (value.shape, value.dtype):
            raise RecordError(f"{plain_name(name)} has another shape or type than in the recorded edit")
    if not inactive.any():
        return
    births = first_births(analysis)
    born = up_to(list(births), program.module)
    device = device_of(given[name] for name in recorded)
    needed = {node.name for node in born.graph.find_nodes(op="placeholder") if node.users}
    for name in needed & given.keys():  # weights may be in the host's memory
        given[name] = given[name].to(device) if isinstance(given[name], torch.Tensor) else given[name]
    then = {name: value.to(given[name].device) for name, value in recorded.items()}
    pairs = zip(born(*_flat(program, given)), born(*_flat(program, {**given, **then})), births.items(), strict=True)
    for now, before, (node, tokens) in pairs:
        rows = torch.from_numpy(rows_of(tokens, inactive)).to(now.device)
        now, before = (value.index_select(tokens.dim, rows).float() for value in (now, before))
        difference = float((now - before).norm() / before.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if difference > ALIKE:
            names = " and ".join(_sources(node, analysis))
            raise RecordError(
                f"{names} differs by {difference:.0%} from the recorded edit's outside the active tokens. Keep the "
                "clip, and the noise outside the mask: new noise belongs inside (docs/second-edit.md). Or record anew"
            )


def first_births(analysis: Analysis) -> dict[Node, Tokens]:
    """Where the token axis is born of inputs; not where it is born again behind what is computed whole."""
    births = {node: edit.tokens for node, edit in analysis.of_type(Enter) if isinstance(edit, Enter)}
    return {node: tokens for node, tokens in births.items() if not (ancestors_of([node]) - {node}) & births.keys()}


def ancestors_of(nodes: Sequence[Node]) -> set[Node]:
    """The nodes, and all that they are computed from."""
    found, waiting = set(nodes), list(nodes)
    while waiting:
        more = [operand for operand in waiting.pop().all_input_nodes if operand not in found]
        found.update(more)
        waiting += more
    return found


def up_to(nodes: Sequence[Node], module: GraphModule) -> GraphModule:
    """The part of a graph that computes some of its nodes, which are its outputs."""
    graph, needed = Graph(), ancestors_of(nodes)
    new: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in needed:
            new[node] = graph.node_copy(node, lambda operand: new[operand])
    graph.output(tuple(new[node] for node in nodes))
    return GraphModule(module, graph)


def _flat(program: Program, given: Mapping[str, Any]) -> list[Any]:
    """A value for each placeholder."""
    names = [node.name for node in program.module.graph.find_nodes(op="placeholder")]
    return [program.state[name] if name in program.state else given[name] for name in names]


def _sources(node: Node, analysis: Analysis) -> list[str]:
    """Which of the inputs that become tokens a node is computed from, as users know them."""
    return sorted(plain_name(one.name) for one in ancestors_of([node]) if one.name in analysis.token_sources)


def setting_differs(name: str, now: torch.Tensor, before: torch.Tensor) -> RecordError:
    """The error for a setting that was another one in the recorded call."""
    return RecordError(
        f"{plain_name(name)} is {_shown(now)} and was {_shown(before)} in the recorded edit: record it anew"
    )


def _shown(value: torch.Tensor) -> str:
    return str([round(number, 4) for number in value.flatten().tolist()[:4]])
