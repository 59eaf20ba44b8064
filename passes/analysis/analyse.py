"""Apply the rule table to a whole graph: one walk, every reason collected."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ..ir.axis import (
    FREE,
    Accumulate,
    Attend,
    AxisState,
    Edit,
    Enter,
    Flow,
    Keep,
    Leave,
    Never,
    OnGrid,
    Parts,
    Piece,
    Reborn,
    Tokens,
)
from ..ir.graphs import graph_module
from ..ir.refusal import GridMismatchError, Refusal, UnsupportedGraphError, module_path, refuse, shape_of
from ..rules.patches import input_state, is_patchify
from ..rules.rule import Query
from ..rules.table import rule_of
from .cut_rows import along_pieces, cut_out
from .fuse_attention import fuse_attention
from .inputs import TokenInputs, find_token_inputs, no_tokens, resolve_token_inputs

__all__ = ["Analysis", "GridMismatchError", "analyse", "attention_modules"]


COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor")
"""Namespaces of the operators by which processes exchange tensors."""


@dataclass(frozen=True)
class Analysis:
    """The token axis of a graph: a state for each node, and the edits a partial form makes at it."""

    module: GraphModule
    """The graph: that which was given, or a copy in which attention of tokens that is written by hand is one
    operator."""
    grid: tuple[int, int, int]
    states: Mapping[Node, AxisState]
    edits: Mapping[Node, tuple[Edit, ...]]
    token_sources: tuple[str, ...] = field(default=())
    """Placeholders whose data becomes tokens: the latents, and control latents where there are any."""
    after: frozenset[Node] = frozenset()
    """Nodes that a step computes which computes no token: what comes after the last tokens."""
    whole: Mapping[Node, Refusal] = field(default_factory=dict)
    """Nodes that look across tokens and are computed whole, on operands that are merged from the cache."""

    def of_type(self, kind: type[Edit]) -> list[tuple[Node, Edit]]:
        """Every edit of one kind with its node, in graph order."""
        return [(node, edit) for node, edits in self.edits.items() for edit in edits if isinstance(edit, kind)]


def analyse(module: GraphModule, grid: tuple[int, int, int], token_inputs: TokenInputs | None = None) -> Analysis:
    """Find the token axis of a normalised graph.

    Where an operator would have to be computed whole or refused, attention by hand whose keys come from tokens becomes
    one operator in a copy, and the copy is analysed. Where that brings nothing, and where keys come from elsewhere,
    attention by hand keeps the model's own operators, and with them its rounding.

    Args:
        module: functional ATen graph with static shapes in `meta["val"]`.
        grid: the token grid (T', H', W'); N = T'·H'·W' tokens.
        token_inputs: inputs that hold packed tokens, with the dim of their token axis, or `(dim, first row)` where
            other rows follow or come before. Without it, packed tokens are found where only one input can be them.

    Raises:
        UnsupportedGraphError: with every operator that has no rule, or whose rule says no.
        GridMismatchError: the model makes another grid than `grid`.
    """
    _check_of_one_process(module)
    analysis, refusals = _analyse(module, grid, token_inputs or {})
    if refusals or analysis.whole:
        fused = graph_module(module, copy.deepcopy(module.graph))
        born = {node.name for node, _ in analysis.of_type(Enter)}
        if fuse_attention(fused, [node for node in fused.graph.nodes if node.name in born]).modified:
            better, fewer = _analyse(fused, grid, token_inputs or {})
            if (len(fewer), len(better.whole)) < (len(refusals), len(analysis.whole)):
                analysis, refusals = better, fewer
    if not refusals:
        refusals = _nothing_to_cache(analysis)
    if refusals:
        raise UnsupportedGraphError(refusals)
    return analysis


def _analyse(
    module: GraphModule, grid: tuple[int, int, int], token_inputs: TokenInputs
) -> tuple[Analysis, list[Refusal]]:
    """`analyse` of the graph as it is, and all refusals."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    known, refusals = resolve_token_inputs(placeholders, token_inputs, grid)
    analysis, more = walk(module, grid, known)
    if not token_inputs and not analysis.of_type(Enter) and not more:
        analysis, more = walk(module, grid, find_token_inputs(placeholders, grid))
    return analysis, refusals + more


def _check_of_one_process(module: GraphModule) -> None:
    """A model that exchanges tensors with other processes holds a share of the tokens, or of the weights.

    Whatever else would be said of its graph would be about that share.

    Raises:
        UnsupportedGraphError: it does.
    """
    found = next((node for node in module.graph.nodes if _is_collective(node)), None)
    if found is not None:
        reason = "the model itself exchanges tensors with other processes"
        help = (
            "leave out what makes it do so, such as model.enable_parallelism(config=...), and share the edit by "
            "`with hetcache.parallel(...):`, which takes a ContextParallelConfig too"
        )
        raise UnsupportedGraphError([refuse(found, {}, reason, help)])


def _is_collective(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace in COLLECTIVES


def walk(
    module: GraphModule, grid: tuple[int, int, int], token_inputs: Mapping[Node, Tokens]
) -> tuple[Analysis, list[Refusal]]:
    """The analysis of every node, and the refusals among them. `token_inputs` are placeholders with a token axis."""
    barred: set[Node] = set()
    while True:
        analysis, refusals, misused = _walk_once(module, grid, token_inputs, barred)
        if not misused:
            return analysis, refusals
        barred |= misused


def _walk_once(
    module: GraphModule, grid: tuple[int, int, int], token_inputs: Mapping[Node, Tokens], barred: set[Node]
) -> tuple[Analysis, list[Refusal], set[Node]]:
    """`walk` with some slices barred from cutting pieces, and the slices that must be barred too."""
    states: dict[Node, AxisState] = {}
    edits: dict[Node, tuple[Edit, ...]] = {}
    whole: dict[Node, Refusal] = {}
    refusals: list[Refusal] = []
    misused: set[Node] = set()
    for node in module.graph.nodes:
        pieces = [state for operand in node.all_input_nodes if isinstance(state := states[operand], Piece)]
        flow: Flow | Refusal | None
        if pieces:
            rule = rule_of(node.target)
            flow = along_pieces(node, states, grid, rule) if rule else None
            if flow is None:
                misused = misused.union(*(piece.cuts for piece in pieces))
                flow = Flow(FREE)
        else:
            flow = _flow(node, states, grid, token_inputs, whole, barred)
        if isinstance(flow, Refusal):
            refusals.append(flow)
            flow = Flow(FREE)  # go on, so that one run shows every reason
        states[node] = flow.state
        if flow.edits:
            edits[node] = flow.edits
    after, kept = after_tokens(module, states, edits)
    for node, operands in kept.items():
        edits[node] = (*edits.get(node, ()), *map(Keep, operands))
    return Analysis(module, grid, states, edits, _token_sources(module, edits), after, whole), refusals, misused


def _flow(
    node: Node,
    states: dict[Node, AxisState],
    grid: tuple[int, int, int],
    token_inputs: Mapping[Node, Tokens],
    whole: dict[Node, Refusal],
    barred: set[Node],
) -> Flow | Refusal:
    """The flow of one node, or why there is none."""
    if node.op == "placeholder":
        if node in token_inputs:
            return Flow(token_inputs[node], (Enter(token_inputs[node]),))
        return Flow(FREE if token_inputs else input_state(node, grid))
    operands = node.all_input_nodes
    leaves = [Leave(o, s) for o in dict.fromkeys(operands) if isinstance(s := states[o], Tokens)]
    if node.op == "output":
        return Flow(FREE, tuple(leaves))
    carries_tokens = bool(leaves) or any(_has_token_parts(states[o]) for o in operands)
    rule = rule_of(node.target)
    if node.op != "call_function" or rule is None:
        if not carries_tokens:
            return Flow(FREE)
        return refuse(node, states, "no rule for this operator", help="add one to RULES in passes/rules/table.py")
    if (
        not carries_tokens
        and not is_patchify(node)
        and not any(isinstance(states[o], OnGrid | Parts) for o in operands)
    ):
        return Flow(FREE)
    query = Query(node, states, grid)
    answer = rule(query)
    if isinstance(answer, Flow):
        return answer
    if not carries_tokens:
        return Flow(FREE)
    if isinstance(answer, Never):
        return refuse(node, states, answer.reason, answer.help)
    if node not in barred and (piece := cut_out(query)) is not None:
        return piece
    if isinstance(answer, Reborn):
        whole[node] = refuse(node, states, answer.reason)
        return Flow(answer.tokens, (*leaves, Enter(answer.tokens)))
    whole[node] = refuse(node, states, answer)
    return Flow(FREE, tuple(leaves))


def _has_token_parts(state: AxisState) -> bool:
    return isinstance(state, Parts) and any(isinstance(part, Tokens) for part in state.states)


def after_tokens(
    module: GraphModule, states: Mapping[Node, AxisState], edits: Mapping[Node, tuple[Edit, ...]]
) -> tuple[frozenset[Node], dict[Node, list[Node]]]:
    """What a step computes that computes no token, and the whole operands it has to take from the cache.

    It can compute what depends on no token, or on whole token tensors only, which the cache holds. It computes no
    attention over tokens. So the text rows of a joint attention, where an output needs them, are kept.
    """
    computable: dict[Node, bool] = {}
    for node in module.graph.nodes:
        own = edits.get(node, ())
        meets = isinstance(states[node], Tokens | Piece) or any(isinstance(e, Attend | Accumulate) for e in own)
        computable[node] = not meets and all(computable[o] for o in _read(node, own))
    output = module.graph.output_node()
    after, kept, todo = {output}, dict[Node, list[Node]](), [output]
    while todo:
        node = todo.pop()
        for operand in _read(node, edits.get(node, ())):
            if not computable[operand]:
                kept.setdefault(node, []).append(operand)
            elif operand not in after:
                after.add(operand)
                todo.append(operand)
    return frozenset(after), kept


def _read(node: Node, edits: tuple[Edit, ...]) -> list[Node]:
    """The operands that a node reads, but for the token tensors that the cache holds."""
    cached = {edit.operand for edit in edits if isinstance(edit, Leave)}
    return [operand for operand in node.all_input_nodes if operand not in cached]


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
        # A token axis that is born again was born before.
        follow = [o for o in follow if not any(isinstance(e, Leave) for e in edits.get(node, ()))]
        for operand in follow:
            if operand not in seen:
                seen.add(operand)
                todo.append(operand)
    order = [node for node in module.graph.nodes if node in sources and len(shape_of(node)) >= 3]
    return tuple(node.name for node in order)


def _nothing_to_cache(analysis: Analysis) -> list[Refusal]:
    """A graph that every rule accepts may still hold nothing to save."""
    if not analysis.of_type(Enter):
        return no_tokens(analysis.module, analysis.grid)
    if not analysis.of_type(Attend) and not analysis.of_type(Accumulate):
        return [
            Refusal("no attention has keys and values along the token axis: there is no context to cache"),
            *analysis.whole.values(),
        ]
    if not analysis.of_type(Leave):
        return [Refusal("no output depends on the tokens")]
    return []


def attention_modules(analysis: Analysis) -> list[str]:
    """The module path of each cached attention, in graph order."""
    kinds = Attend | Accumulate
    return [module_path(node) for node, edits in analysis.edits.items() if any(isinstance(e, kinds) for e in edits)]
