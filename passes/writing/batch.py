"""Some samples of a batched graph: the same graph for fewer rows of the batch dim.

A graph that Dynamo captured has its batch size B written into reshapes and constants. But a batch dim is what a token
axis is to operators that act on rows independently, so the same rules follow it: with a grid of B "tokens", of which
some are active, the partial form is the graph for some of the samples. It is exact for the same reason. Where the
samples of a batch meet (in an attention, in a norm), there is no such graph.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..analysis.analyse import Analysis, walk
from ..analysis.inputs import is_state
from ..ir.axis import FREE, Accumulate, Attend, AxisState, Tokens
from ..ir.contract import Budgets
from ..ir.refusal import Refusal, UnsupportedGraphError, refuse, shape_of
from .write import write_partial

SAMPLE_INDEX = "sample_index"


def take_samples(
    module: GraphModule, latents: Collection[str], size: int, count: int
) -> tuple[GraphModule, tuple[AxisState, ...]]:
    """The graph for `count` of the `size` samples of a batch.

    Args:
        module: normalised graph.
        latents: placeholders whose dim 0 is the batch dim.
        size: B.
        count: samples to compute.

    Returns:
        A graph that takes the same inputs, for all B samples, and one more, `sample_index` int64 `[count]`; and for
        each output where its samples lie (`Tokens`), or that it has none.

    Raises:
        UnsupportedGraphError: with every operator in which the samples of a batch meet.
    """
    analysis = _samples(module, latents, size)
    output = module.graph.output_node()
    # Without the edits that end the axis, outputs hold the rows that were computed.
    edits = {node: own for node, own in analysis.edits.items() if node is not output}
    form = write_partial(module, replace(analysis, edits=edits), Budgets(count, 0))
    (index,) = (node for node in form.module.graph.nodes if node.op == "placeholder" and node.name in form.indices)
    index._rename(SAMPLE_INDEX)
    index.target = index.name
    form.module.recompile()
    return form.module, _output_states(analysis, output)


def _samples(module: GraphModule, latents: Collection[str], size: int) -> Analysis:
    """The batch dim of a whole graph.

    An input with B rows, that is no weight or buffer of the model, has most likely one for each sample. Where that
    guess leads to a refusal it is dropped: the input is whole then, and its rows are taken where it meets the samples.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    known = [node for node in placeholders if node.name in latents]
    guesses = [n for n in placeholders if n not in known and shape_of(n)[:1] == (size,) and not is_state(n.name)]
    analysis, refusals = _follow(module, [*known, *guesses], size)
    if refusals:
        for guess in guesses:
            if not _follow(module, [*known, guess], size)[1]:
                known.append(guess)
        analysis, refusals = _follow(module, known, size)
    if refusals:
        raise UnsupportedGraphError(refusals)
    return analysis


def _follow(module: GraphModule, batched: Sequence[Node], size: int) -> tuple[Analysis, list[Refusal]]:
    """Where the samples go from these inputs, and every place where they meet."""
    analysis, refusals = walk(module, (size, 1, 1), {node: Tokens(0) for node in batched})
    meeting = [node for kind in (Attend, Accumulate) for node, _ in analysis.of_type(kind)]
    refusals += [refuse(node, dict(analysis.states), "the samples of a batch meet in it") for node in meeting]
    refusals += [replace(refusal, reason=f"across the batch, {refusal.reason}") for refusal in analysis.whole.values()]
    states = _output_states(analysis, module.graph.output_node())
    if any(isinstance(state, Tokens) and state.whole != (0, 0) for state in states):
        refusals.append(Refusal("an output has other rows beside those of the samples"))
    return analysis, refusals


def _output_states(analysis: Analysis, output: Node) -> tuple[AxisState, ...]:
    results = output.args[0]
    assert isinstance(results, tuple | list)
    return tuple(analysis.states[result] if isinstance(result, Node) else FREE for result in results)


def join_samples(parts: Sequence[Any], state: AxisState) -> Any:
    """One output for the whole batch: sample i comes from part `i % len(parts)`."""
    if not isinstance(state, Tokens):
        return parts[0]
    dim, outer = state.dim, state.outer
    rows = [part.unflatten(dim, (outer, -1, state.inner)) for part in parts]
    return torch.stack(rows, dim + 2).flatten(dim, dim + 3)
