"""Inputs that hold packed tokens `[B, N, C]`: declared, or found where only one input can be them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch.fx import GraphModule, Node

from ..ir.axis import Tokens
from ..ir.refusal import GridMismatchError, Refusal, UnsupportedGraphError, shape_of
from ..rules.patches import is_patchify
from ..rules.rule import wrap

TokenInputs = Mapping[str, int | tuple[int, int]]
"""The dim of the token axis of an input, or that dim and its first token row, by the input's name."""


def resolve_token_inputs(
    placeholders: Sequence[Node], token_inputs: TokenInputs, grid: tuple[int, int, int]
) -> tuple[dict[Node, Tokens], list[Refusal]]:
    """The placeholders that are declared to hold tokens, and refusals for names that are no inputs."""
    known: dict[Node, Tokens] = {}
    refusals = []
    for name, where in token_inputs.items():
        named = [node for node in placeholders if holds_input(node.name, name)]
        if not named:
            names = ", ".join(node.name for node in placeholders)
            refusals.append(Refusal(f"token_inputs names {name!r}, which is no input", help=f"the inputs are {names}"))
        known.update({node: _declared(node, where, grid) for node in named})
    return known, refusals


def holds_input(placeholder: str, name: str) -> bool:
    """Whether a placeholder is the input of this name, or an entry of the list of this name: `samples_0`."""
    return re.fullmatch(re.escape(plain_name(name)) + r"(_\d+)*", plain_name(placeholder)) is not None


def plain_name(name: str) -> str:
    """An input's name without what Dynamo adds: `L_hidden_states_` is `hidden_states`."""
    return name.removeprefix("L_").removeprefix("l_").removeprefix("kwargs_").rstrip("_")


def _declared(node: Node, where: int | tuple[int, int], grid: tuple[int, int, int]) -> Tokens:
    given, first = where if isinstance(where, tuple) else (where, None)
    shape, count = shape_of(node), prod(grid)
    dim = wrap(given, len(shape))
    size = shape[dim] if 0 <= dim < len(shape) else -1
    if first is None and size > count:
        raise GridMismatchError(
            f"the plan's token grid {grid} has {count} tokens, but dim {given} of the token input {node.name} {shape} "
            f"is larger: say at which row the tokens start, as in token_inputs={{{node.name!r}: ({given}, 0)}}"
        )
    first = first or 0
    if first < 0 or size < first + count:
        raise GridMismatchError(
            f"the plan's token grid {grid} has {count} tokens, but dim {given} of the token input "
            f"{node.name} {shape} does not have that size"
        )
    return Tokens(dim, (first, size - first - count))


def find_token_inputs(placeholders: Sequence[Node], grid: tuple[int, int, int]) -> dict[Node, Tokens]:
    """The one floating-point input `[B, N, C]`; none if there is no such input.

    Raises:
        UnsupportedGraphError: several inputs can be the tokens.
    """
    found = [
        node for node in placeholders if len(shape_of(node)) == 3 and shape_of(node)[1] == prod(grid) and _is_data(node)
    ]
    if len(found) > 1:
        names = " and ".join(f"{node.name} {shape_of(node)}" for node in found)
        raise UnsupportedGraphError(
            [
                Refusal(
                    f"several inputs may hold the {prod(grid)} tokens: {names}",
                    help=f"name the right one, as in token_inputs={{{plain_name(found[0].name)!r}: 1}}",
                )
            ]
        )
    return {node: Tokens(1) for node in found}


def _is_data(node: Node) -> bool:
    """Whether a placeholder holds floating-point data."""
    value = node.meta.get("val")
    return bool(value is not None and value.dtype.is_floating_point and not is_state(node.name))


def is_state(name: str) -> bool:
    """Whether a placeholder is a weight or buffer of the model, by the name that `torch.export` or Dynamo gives it.

    So is a tensor that a module inside the model holds in some other way, such as the scales of a quantised weight.
    """
    return re.match(r"[pbc]_|.*_(parameters|buffers|modules)_", name) is not None


def is_held(name: str) -> bool:
    """Whether a placeholder of Dynamo is a tensor that a module holds, and no buffer: a weight or what hangs on one."""
    held = re.match(r".*_(parameters|buffers|modules)_", name)
    return held is not None and held[1] != "buffers"


def no_tokens(module: GraphModule, grid: tuple[int, int, int]) -> list[Refusal]:
    """Why no token axis was born."""
    # A picture encoder has patches too; only patches of as many dims as the grid can be the wrong grid.
    rank = 3 if grid[0] > 1 else 2
    patches = [shape_of(node)[2:] for node in module.graph.nodes if is_patchify(node)]
    made = [shape for shape in patches if len(shape) >= rank]
    matching = any(shape == grid[3 - len(shape) :] for shape in made)
    if made and not matching:
        shapes = ", ".join(str(shape) for shape in dict.fromkeys(made))
        raise GridMismatchError(
            f"the plan's token grid is {grid} but the model's patch embedding makes {shapes}: "
            "make the plan for the height, width and number of frames of this call"
        )
    attentions = [n for n in module.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    longest = max((shape_of(n.args[1])[-2] for n in attentions), default=prod(grid))
    if longest < prod(grid):
        return [
            Refusal(
                f"no attention sees all {prod(grid)} tokens, the longest has {longest} keys: attention within frames, "
                "places or windows leaves no context to cache"
            )
        ]
    if matching:
        return [Refusal("no token axis found: the grid is never flattened to tokens in the order (T', H', W')")]
    return [
        Refusal(
            "no token axis found: no patch embedding makes the token grid",
            help="name the packed inputs with token_inputs={'hidden_states': 1}",
        )
    ]
