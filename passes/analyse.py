"""Apply the rule table to a whole graph: one walk, every reason collected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from torch.fx import GraphModule, Node

from .axis import FREE, Attend, AxisState, Edit, Enter, Flow, Grid, Leave, Tokens
from .query import Query, wrap
from .refusal import HetCacheError, Refusal, UnsupportedGraphError, module_path, refuse, shape_of
from .rules import RULES, is_patchify


@dataclass(frozen=True)
class Analysis:
    """The token axis of a graph: a state for each node, and the edits a partial form makes at it."""

    grid: tuple[int, int, int]
    states: Mapping[Node, AxisState]
    edits: Mapping[Node, tuple[Edit, ...]]
    token_sources: tuple[str, ...] = field(default=())
    """Placeholders whose data becomes tokens: the latents, and control latents where there are any."""

    def of_type(self, kind: type[Edit]) -> list[tuple[Node, Edit]]:
        """Every edit of one kind with its node, in graph order."""
        return [(node, edit) for node, edits in self.edits.items() for edit in edits if isinstance(edit, kind)]


class GridMismatchError(HetCacheError, ValueError):
    """No patch embedding makes the plan's token grid, or a token input has another number of tokens."""


def analyse(module: GraphModule, grid: tuple[int, int, int], token_inputs: Mapping[str, int] | None = None) -> Analysis:
    """Find the token axis of a normalised graph.

    Args:
        module: functional ATen graph with static shapes in `meta["val"]`.
        grid: the token grid (T', H', W'); N = T'·H'·W' tokens.
        token_inputs: placeholders that hold packed tokens, with the dim of their token axis.

    Raises:
        UnsupportedGraphError: with every operator that has no rule, or whose rule says no.
        GridMismatchError: the model makes another grid than `grid`.
    """
    states: dict[Node, AxisState] = {}
    edits: dict[Node, tuple[Edit, ...]] = {}
    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    refusals = [
        Refusal(f"token_inputs names {name!r}, which is no input", help=f"the inputs are {', '.join(placeholders)}")
        for name in token_inputs or {}
        if name not in placeholders
    ]
    for node in module.graph.nodes:
        flow = _flow(node, states, grid, token_inputs or {})
        if isinstance(flow, Refusal):
            refusals.append(flow)
            flow = Flow(FREE)  # go on, so that one run shows every reason
        states[node] = flow.state
        if flow.edits:
            edits[node] = flow.edits
    analysis = Analysis(grid, states, edits, _token_sources(module, edits))
    if not refusals:
        refusals = _nothing_to_cache(module, analysis)
    if refusals:
        raise UnsupportedGraphError(refusals)
    return analysis


def _flow(
    node: Node, states: dict[Node, AxisState], grid: tuple[int, int, int], token_inputs: Mapping[str, int]
) -> Flow | Refusal:
    """The flow of one node, or why there is none."""
    if node.op == "placeholder":
        return _input_flow(node, grid, token_inputs)
    carries_tokens = any(isinstance(states[operand], Tokens) for operand in node.all_input_nodes)
    if node.op == "output":
        leaves = [Leave(o, s.dim) for o in node.all_input_nodes if isinstance(s := states[o], Tokens)]
        return Flow(FREE, tuple(leaves))
    rule = RULES.get(node.target)
    if node.op != "call_function" or rule is None:
        if not carries_tokens:
            return Flow(FREE)
        return refuse(node, states, "no rule for this operator", help="add one to RULES in passes/rules.py")
    if not carries_tokens and not _may_bear_tokens(node, states):
        return Flow(FREE)
    answer = rule(Query(node, states, grid))
    return refuse(node, states, answer) if isinstance(answer, str) else answer


def _input_flow(node: Node, grid: tuple[int, int, int], token_inputs: Mapping[str, int]) -> Flow:
    if node.name not in token_inputs:
        return Flow(FREE)
    shape = shape_of(node)
    dim = wrap(token_inputs[node.name], len(shape))
    if not 0 <= dim < len(shape) or shape[dim] != prod(grid):
        raise GridMismatchError(
            f"the plan's token grid {grid} has {prod(grid)} tokens, but dim {token_inputs[node.name]} of the "
            f"token input {node.name} {shape} does not have that size"
        )
    return Flow(Tokens(dim), (Enter(dim),))


def _may_bear_tokens(node: Node, states: Mapping[Node, AxisState]) -> bool:
    return is_patchify(node) or any(isinstance(states[operand], Grid) for operand in node.all_input_nodes)


def _token_sources(module: GraphModule, edits: Mapping[Node, tuple[Edit, ...]]) -> tuple[str, ...]:
    """Placeholders of at least three dims that a birth of the token axis depends on through its data."""
    sources: set[Node] = set()
    todo = [node for node, es in edits.items() if any(isinstance(e, Enter) for e in es)]
    seen: set[Node] = set(todo)
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            sources.add(node)
            continue
        # Follow the data, not the weights: the first operand of a convolution or a linear.
        follow = node.all_input_nodes[:1] if is_patchify(node) else node.all_input_nodes
        for operand in follow:
            if operand not in seen:
                seen.add(operand)
                todo.append(operand)
    order = [node for node in module.graph.nodes if node in sources and len(shape_of(node)) >= 3]
    return tuple(node.name for node in order)


def _nothing_to_cache(module: GraphModule, analysis: Analysis) -> list[Refusal]:
    """A graph that every rule accepts may still hold nothing to save."""
    if not analysis.of_type(Enter):
        # A picture encoder has patches too; only patches of as many dims as the grid can be the wrong grid.
        rank = 3 if analysis.grid[0] > 1 else 2
        patches = [shape_of(node)[2:] for node in module.graph.nodes if is_patchify(node)]
        made = [shape for shape in patches if len(shape) >= rank]
        if any(shape == analysis.grid[3 - len(shape) :] for shape in made):
            reason = "no token axis found: the grid is never flattened to tokens in the order (T', H', W')"
            return [Refusal(reason)]
        if made:
            shapes = ", ".join(str(shape) for shape in dict.fromkeys(made))
            raise GridMismatchError(
                f"the plan's token grid is {analysis.grid} but the model's patch embedding makes {shapes}: "
                "make the plan for the height, width and number of frames of this call"
            )
        return [
            Refusal(
                "no token axis found: no patch embedding makes the token grid",
                help="name the packed inputs with token_inputs={'hidden_states': 1}",
            )
        ]
    if not analysis.of_type(Attend):
        return [Refusal("no attention has keys and values along the token axis: there is no context to cache")]
    if not analysis.of_type(Leave):
        return [Refusal("no output depends on the tokens")]
    return []


def attention_modules(analysis: Analysis) -> list[str]:
    """The module path of each cached attention, in graph order."""
    return [module_path(node) for node, _ in analysis.of_type(Attend)]
