"""Write the static-shape forms of a graph: each is one reading of the edits that the analysis found.

==========  ==========================  ==============================  ============================
edit        full                        partial                         reuse
==========  ==========================  ==============================  ============================
Enter       -                           take the active rows            -
Gather      -                           take the active rows            -
Resize      -                           N becomes M                     -
Attend      emit context rows of K, V   append cached rows to K, V      -
Accumulate  emit the sum over context   add the cached sum              -
Leave       emit the token tensor       write into the cached tensor    read the cached tensor
Keep        emit the tensor             emit the tensor                 read the cached tensor
Uncut       -                           leave out the cut               -
JoinPieces  -                           take each row from its piece    -
==========  ==========================  ==============================  ============================

The reuse form holds only what comes after the last `Leave` and `Keep`. `WRITERS` names the writers; a new form is one
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..analysis.analyse import Analysis
from ..ir.axis import Accumulate, Attend, Enter, Gather, JoinPieces, Keep, Leave, Parts, Piece, Resize, Tokens, Uncut
from ..ir.cache import CacheEntry, Role, with_rows
from ..ir.contract import Budgets
from ..ir.form import ContextRead, Form
from ..ir.graphs import device_of, fake_mode, graph_module, has_side_effect, verify_shapes
from ..ir.indices import rows_of, runs_of
from ..ir.refusal import shape_of
from ..rules.attention import queries_of_heads
from .cache_layout import cache_layout

aten = torch.ops.aten


class FormWriter:
    """Copies a graph node by node into a new one, which is checked as a whole by `finish`."""

    def __init__(self, kind: str, source: GraphModule, analysis: Analysis, budgets: Budgets) -> None:
        self.kind, self.source, self.analysis, self.budgets = kind, source, analysis, budgets
        self.layout = cache_layout(analysis, budgets)
        self.graph = Graph()
        self.new: dict[Node, Node] = {}
        self.expected: dict[Node, tuple[int, ...]] = {}
        self.indices: list[str] = []
        self.reads: dict[CacheEntry, Node] = {}
        self.writes: dict[CacheEntry, Node] = {}
        self.context_reads: list[ContextRead] = []
        self.mask_columns: list[Node] = []
        self.gathered: dict[tuple[Node, Tokens], Node] = {}
        self.row_indices: dict[tuple[Node, Tokens, bool], Node] = {}
        self.device = device_of(node.meta.get("val") for node in self._placeholders())
        for node in self._placeholders():
            self.copy(node, shape_of(node))

    def _placeholders(self) -> list[Node]:
        return [node for node in self.source.graph.nodes if node.op == "placeholder"]

    def body(self) -> list[Node]:
        """The nodes to copy after all placeholders have been made."""
        return [node for node in self.source.graph.nodes if node.op not in ("placeholder", "output")]

    def index_input(self, name: str, length: int) -> Node:
        """A new int64 input that names tokens."""
        self.indices.append(name)
        return self._input(name, (length,), torch.int64)

    def cache_input(self, entry: CacheEntry) -> Node:
        """The input that holds a cache entry."""
        if entry not in self.reads:
            self.reads[entry] = self._input(entry.input_name.replace(".", "_"), entry.shape, entry.dtype)
        return self.reads[entry]

    def _input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Node:
        node = self.graph.placeholder(name)
        with fake_mode(self.source):
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=self.device)
        self.expected[node] = shape
        return node

    def copy(self, node: Node, shape: tuple[int, ...], replace: dict[Node, Node] | None = None) -> Node:
        """Copy `node`, whose result must have `shape`, with some operands replaced."""
        replace = replace or {}
        new = self.graph.node_copy(node, lambda old: replace.get(old) or self.new[old])
        new.meta = dict(node.meta)
        self.expected[new] = shape
        self.new[node] = new
        return new

    def call(self, op: Any, args: tuple[Any, ...], near: Node, kwargs: dict[str, Any] | None = None) -> Node:
        """A new call, which names the pass and keeps the trace of the node it stands for."""
        node = self.graph.call_function(op, args, kwargs)
        node.meta = {k: near.meta[k] for k in ("stack_trace", "nn_module_stack") if k in near.meta}
        node.meta["hetcache"] = self.kind
        return node

    def row_index(self, tokens: Tokens, selected: Node, near: Node, *, runs_only: bool = False) -> Node:
        """The rows that `selected` names along a token axis, with whole rows or `runs_only`; made once."""
        key = (selected, tokens.at(0), runs_only)
        if key not in self.row_indices:
            number = prod(self.analysis.grid)

            def call(op: Any, *args: Any, **kwargs: Any) -> Node:
                return self.call(op, args, near, kwargs)

            self.row_indices[key] = (
                runs_of(tokens, selected, number, call)
                if runs_only
                else rows_of(tokens, selected, number, self.device, call)
            )
        return self.row_indices[key]

    def take_rows(self, operand: Node, tokens: Tokens, index: Node, near: Node) -> Node:
        """The rows of `operand` that `index` names; made once."""
        if (operand, tokens) not in self.gathered:
            args = (operand, tokens.dim, self.row_index(tokens, index, near))
            self.gathered[operand, tokens] = self.call(aten.index_select.default, args, near)
        return self.gathered[operand, tokens]

    def finish(self, replace: dict[Node, Node] | None = None) -> Form:
        """Add the outputs, drop dead code, and check every shape by running the graph on fake tensors."""
        replace = replace or {}
        output = self.source.graph.output_node()
        results = [(replace.get(o) or self.new[o]) if isinstance(o, Node) else o for o in _flat(output.args[0])]
        self.graph.output((*results, *self.writes.values()))
        module = graph_module(self.source, self.graph)
        self.graph.eliminate_dead_code(has_side_effect)
        self.graph.lint()
        module.recompile()
        verify_shapes(module, self.expected)
        alive = set(self.graph.nodes)
        return Form(
            self.kind, module, tuple(self.indices), tuple(self.reads), tuple(self.writes),
            context_reads=tuple(read for read in self.context_reads if read.rows in alive),
            mask_columns=tuple(node for node in self.mask_columns if node in alive),
        )  # fmt: skip


def write_full(source: GraphModule, analysis: Analysis, budgets: Budgets) -> Form:
    """The plain model that also emits its cache."""
    writer = FormWriter("full", source, analysis, budgets)
    context_index = writer.index_input("context_index", budgets.num_context)
    for node in writer.body():
        writer.copy(node, shape_of(node))
        for edit in analysis.edits.get(node, ()):
            if isinstance(edit, Attend):
                parts: tuple[tuple[Role, Node], ...] = (("key", edit.key), ("value", edit.value))
                for role, operand in parts:
                    writer.writes[writer.layout[node, role]] = _context_rows(
                        writer, operand, edit.tokens, context_index, node
                    )
            elif isinstance(edit, Accumulate):
                sides = ((edit.left, edit.left_tokens), (edit.right, edit.right_tokens))
                rows = tuple(_context_rows(writer, *side, context_index, node) for side in sides)
                writer.writes[writer.layout[node, "sum"]] = writer.call(node.target, rows, node)
    for (node, role), entry in writer.layout.items():
        if role == "whole":
            writer.writes[entry] = writer.new[node]
    return writer.finish()


def _context_rows(writer: FormWriter, operand: Node, tokens: Tokens, context_index: Node, near: Node) -> Node:
    rows = writer.row_index(tokens, context_index, near, runs_only=True)
    return writer.call(aten.index_select.default, (writer.new[operand], tokens.dim, rows), near)


def write_partial(source: GraphModule, analysis: Analysis, budgets: Budgets) -> Form:
    """The residual stream on M tokens, attention on M fresh and C cached keys and values."""
    writer = FormWriter("partial", source, analysis, budgets)
    active_index = writer.index_input("active_index", budgets.num_active)
    context_index = None
    if any(isinstance(e, Attend) and e.mask is not None for _, e in analysis.of_type(Attend)):
        context_index = writer.index_input("context_index", budgets.num_context)
    for (_, role), entry in writer.layout.items():
        if role != "whole" or entry.rows == "tokens":
            writer.cache_input(entry)
    for node in writer._placeholders():
        _enter(writer, node, active_index)
    for node in writer.body():
        if _pieces(writer, node, active_index):
            continue
        replaced = _operands(writer, node, active_index)
        attended = _with_context(writer, node, replaced, active_index, context_index)
        copy = writer.copy(node, _rows_of(node, analysis, budgets), replaced)
        for position, rows in attended.items():
            _set_argument(copy, position, rows)
        _resize(copy, node, analysis, budgets)
        _enter(writer, node, active_index)
        _add_context(writer, node)
    for (node, role), entry in writer.layout.items():
        if role == "whole" and entry.rows == "none":
            writer.writes[entry] = writer.new[node]
    return writer.finish(_operands(writer, source.graph.output_node(), active_index))


def _resize(copy: Node, node: Node, analysis: Analysis, budgets: Budgets) -> None:
    """Arguments that count tokens count the active ones."""
    for edit in analysis.edits.get(node, ()):
        if not isinstance(edit, Resize):
            continue
        size = edit.tokens.size(budgets.num_active)
        if edit.position is None:
            copy.update_arg(edit.arg, size)
            continue
        sizes = list(copy.args[edit.arg])  # type: ignore[arg-type]
        if sizes[edit.position] != -1:
            sizes[edit.position] = size
        copy.update_arg(edit.arg, sizes)


def _enter(writer: FormWriter, node: Node, active_index: Node) -> None:
    """The birth of the token axis: the node's users see its active rows."""
    for edit in writer.analysis.edits.get(node, ()):
        if isinstance(edit, Enter):
            whole = writer.new[node]
            writer.expected[whole] = shape_of(node)
            writer.new[node] = writer.take_rows(whole, edit.tokens, active_index, node)


def _operands(writer: FormWriter, node: Node, active_index: Node) -> dict[Node, Node]:
    """The operands that a node of the partial form sees in place of its own."""
    replaced: dict[Node, Node] = {}
    for edit in writer.analysis.edits.get(node, ()):
        if isinstance(edit, Gather):
            whole = writer.new[edit.operand]
            replaced[edit.operand] = writer.take_rows(whole, edit.tokens, active_index, node)
        elif isinstance(edit, Leave):
            replaced[edit.operand] = _merge_rows(writer, edit, active_index, node)
    return replaced


def _with_context(
    writer: FormWriter, node: Node, replaced: dict[Node, Node], active_index: Node, context_index: Node | None
) -> dict[int, Node]:
    """The key, value and mask arguments of an attention, by position: cached context rows, then fresh rows.

    By position, because a query may be the same node as a key.
    """
    arguments: dict[int, Node] = {}
    for edit in writer.analysis.edits.get(node, ()):
        if not isinstance(edit, Attend):
            continue
        parts: tuple[tuple[int, Role, Node], ...] = ((1, "key", edit.key), (2, "value", edit.value))
        for position, role, fresh in parts:
            entry = writer.layout[node, role]
            rows = [writer.cache_input(entry), writer.new[fresh]]
            arguments[position] = writer.call(aten.cat.default, (rows, edit.tokens.dim), node)
            queries = queries_of_heads(node, writer.analysis.states)
            writer.context_reads.append(ContextRead(arguments[position], entry, queries))
        if edit.mask is not None:
            assert context_index is not None
            mask = replaced.get(edit.mask) or writer.new[edit.mask]
            context = writer.row_index(edit.tokens, context_index, node, runs_only=True)
            columns = [context, writer.row_index(edit.tokens, active_index, node)]
            columns_index = writer.call(aten.cat.default, (columns,), node)
            arguments[3] = writer.call(aten.index_select.default, (mask, -1, columns_index), node)
            writer.mask_columns.append(arguments[3])
    return arguments


def _set_argument(node: Node, position: int, value: Node) -> None:
    """Replace an argument that is passed by position, or by the name that the schema gives it."""
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(node.target._schema.arguments[position].name, value)  # type: ignore[union-attr]


def _pieces(writer: FormWriter, node: Node, active_index: Node) -> bool:
    """Whether a node only cuts pieces of a token axis, or puts them together: then every piece has all active rows."""
    for edit in writer.analysis.edits.get(node, ()):
        if isinstance(edit, Uncut):
            writer.new[node] = writer.new[edit.operand]
            return True
        if isinstance(edit, JoinPieces):
            rows = writer.row_index(edit.tokens, active_index, node)
            shape = [-1 if dim == edit.tokens.dim else 1 for dim in range(len(shape_of(node)))]
            *before, last = (writer.new[piece] for piece in edit.pieces)
            for piece, end in reversed(list(zip(before, edit.ends, strict=False))):
                inside = writer.call(aten.lt.Scalar, (rows, end), node)
                last = writer.call(
                    aten.where.self, (writer.call(aten.view.default, (inside, shape), node), piece, last), node
                )
            writer.new[node] = last
            writer.expected[last] = _rows_of(node, writer.analysis, writer.budgets)
            return True
    return False


def _add_context(writer: FormWriter, node: Node) -> None:
    """A sum over tokens: the fresh rows, and the cached sum over the context."""
    for edit in writer.analysis.edits.get(node, ()):
        if isinstance(edit, Accumulate):
            cached = writer.cache_input(writer.layout[node, "sum"])
            writer.new[node] = writer.call(aten.add.Tensor, (writer.new[node], cached), node)


def _merge_rows(writer: FormWriter, edit: Leave, active_index: Node, near: Node) -> Node:
    """The whole token tensor: the cached one with the active rows written into it; made once."""
    entry = writer.layout[edit.operand, "whole"]
    if entry not in writer.writes:
        index = writer.row_index(edit.tokens, active_index, near)
        args = (writer.cache_input(entry), edit.tokens.dim, index, writer.new[edit.operand])
        writer.writes[entry] = writer.call(aten.index_copy.default, args, near)
    return writer.writes[entry]


def write_reuse(source: GraphModule, analysis: Analysis, budgets: Budgets) -> Form:
    """What comes after the tokens, on the cached token tensors. Writes nothing."""
    writer = FormWriter("reuse", source, analysis, budgets)
    for (_, role), entry in writer.layout.items():
        if role == "whole" and entry.group == "output":
            writer.cache_input(entry)

    def cached(node: Node) -> dict[Node, Node]:
        ends = (e for e in analysis.edits.get(node, ()) if isinstance(e, Leave | Keep))
        return {e.operand: writer.cache_input(writer.layout[e.operand, "whole"]) for e in ends}

    for node in writer.body():
        if node in analysis.after:
            writer.copy(node, shape_of(node), cached(node))
    return writer.finish(cached(source.graph.output_node()))


WRITERS: dict[str, Callable[[GraphModule, Analysis, Budgets], Form]] = {
    "full": write_full,
    "partial": write_partial,
    "reuse": write_reuse,
}


def _rows_of(node: Node, analysis: Analysis, budgets: Budgets) -> tuple[int, ...]:
    """The shape a node must have in the partial form. A birth is checked before its rows are taken."""
    state = analysis.states[node]
    state = state.tokens if isinstance(state, Piece) else state
    born = any(isinstance(edit, Enter) for edit in analysis.edits.get(node, ()))
    if isinstance(state, Tokens) and not born:
        return with_rows(shape_of(node), state.dim, state.size(budgets.num_active))
    if isinstance(state, Parts) and isinstance(first := state.states[0], Tokens):
        return with_rows(shape_of(node), first.dim, first.size(budgets.num_active))
    return shape_of(node)


def _flat(outputs: Any) -> Iterable[Any]:
    return outputs if isinstance(outputs, tuple | list) else (outputs,)
