"""Write the static-shape forms of a graph: each is one reading of the edits that the analysis found.

=========  ==========================  ==============================  ============================
edit       full                        partial                         reuse
=========  ==========================  ==============================  ============================
Enter      -                           take the active rows            -
Gather     -                           take the active rows            -
Resize     -                           N becomes M                     -
Attend     emit context rows of K, V   append cached rows to K, V      -
Leave      emit the token tensor       write into the cached tensor    read the cached tensor
=========  ==========================  ==============================  ============================

In the reuse form everything before a `Leave` is then dead code. `FORMS` names the writers; a new form is one more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node

from .analyse import Analysis
from .axis import Attend, Enter, Gather, Leave, Resize, Tokens
from .refusal import module_path, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheEntry:
    """One tensor that passes from step to step.

    `rows` says what its dim `dim` counts: the C context tokens (keys and values) or all N tokens (the last
    tensor before the tokens are laid out as a video again). `module` is the module path it comes from.
    """

    name: str
    rows: Literal["context", "tokens"]
    dim: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str

    @property
    def input_name(self) -> str:
        """Its name where a form reads it, and its key in a cache dict: `past_key_values.3.key`."""
        return ("past_output." if self.rows == "tokens" else "past_key_values.") + self.name

    @property
    def output_name(self) -> str:
        """Its name where a form writes it: `present.3.key`."""
        return ("present_output." if self.rows == "tokens" else "present.") + self.name

    @property
    def num_bytes(self) -> int:
        """Its size in memory."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Budgets:
    """M active and C cached context tokens: all a form's shapes know of a plan."""

    num_active: int
    num_context: int


@dataclass(frozen=True)
class Form:
    """A graph with explicit state.

    `module(*model_inputs, *indices, *reads)` returns `(*model_outputs, *writes)`, in these orders.
    """

    kind: str
    module: GraphModule
    indices: tuple[str, ...]
    reads: tuple[CacheEntry, ...]
    writes: tuple[CacheEntry, ...]


def cache_layout(analysis: Analysis, budgets: Budgets) -> dict[tuple[Node, str], CacheEntry]:
    """Every cache entry of a graph, by the node it belongs to and its role there, in graph order."""
    layout: dict[tuple[Node, str], CacheEntry] = {}
    attends = [(node, edit) for node, edit in analysis.of_type(Attend) if isinstance(edit, Attend)]
    for number, (node, edit) in enumerate(attends):
        for role, operand in (("key", edit.key), ("value", edit.value)):
            shape = _with_rows(shape_of(operand), edit.dim, budgets.num_context)
            layout[node, role] = CacheEntry(
                f"{number}.{role}", "context", edit.dim, shape, operand.meta["val"].dtype, module_path(node)
            )
    leaves = dict.fromkeys((e.operand, e.dim) for _, e in analysis.of_type(Leave) if isinstance(e, Leave))
    for number, (operand, dim) in enumerate(leaves):
        layout[operand, "output"] = CacheEntry(
            f"{number}", "tokens", dim, shape_of(operand), operand.meta["val"].dtype, module_path(operand)
        )
    return layout


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
        self.gathered: dict[tuple[Node, int], Node] = {}
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
        mode, device = _fake_mode(self.source), _device(self.source)
        node = self.graph.placeholder(name)
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
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

    def call(self, op: Any, args: tuple[Any, ...], near: Node) -> Node:
        """A new call, which names the pass and keeps the trace of the node it stands for."""
        node = self.graph.call_function(op, args)
        node.meta = {k: near.meta[k] for k in ("stack_trace", "nn_module_stack") if k in near.meta}
        node.meta["hetcache"] = self.kind
        return node

    def take_rows(self, operand: Node, dim: int, index: Node, near: Node) -> Node:
        """The rows of `operand` that `index` names; made once."""
        if (operand, dim) not in self.gathered:
            self.gathered[operand, dim] = self.call(aten.index_select.default, (operand, dim, index), near)
        return self.gathered[operand, dim]

    def finish(self, replace: dict[Node, Node] | None = None) -> Form:
        """Add the outputs, drop dead code, and check every shape by running the graph on fake tensors."""
        replace = replace or {}
        output = self.source.graph.output_node()
        results = [(replace.get(o) or self.new[o]) if isinstance(o, Node) else o for o in _flat(output.args[0])]
        self.graph.output((*results, *self.writes.values()))
        module = GraphModule(self.source, self.graph)
        self.graph.eliminate_dead_code(has_side_effect)
        self.graph.lint()
        module.recompile()
        verify_shapes(module, self.expected)
        return Form(self.kind, module, tuple(self.indices), tuple(self.reads), tuple(self.writes))


def write_full(source: GraphModule, analysis: Analysis, budgets: Budgets) -> Form:
    """The plain model that also emits its cache."""
    writer = FormWriter("full", source, analysis, budgets)
    context_index = writer.index_input("context_index", budgets.num_context)
    for node in writer.body():
        writer.copy(node, shape_of(node))
        for edit in analysis.edits.get(node, ()):
            if isinstance(edit, Attend):
                for role, operand in (("key", edit.key), ("value", edit.value)):
                    rows = (writer.new[operand], edit.dim, context_index)
                    writer.writes[writer.layout[node, role]] = writer.call(aten.index_select.default, rows, node)
    for (node, role), entry in writer.layout.items():
        if role == "output":
            writer.writes[entry] = writer.new[node]
    return writer.finish()


def write_partial(source: GraphModule, analysis: Analysis, budgets: Budgets) -> Form:
    """The residual stream on M tokens, attention on M fresh and C cached keys and values."""
    writer = FormWriter("partial", source, analysis, budgets)
    active_index = writer.index_input("active_index", budgets.num_active)
    for entry in writer.layout.values():
        writer.cache_input(entry)
    for node in writer._placeholders():
        _enter(writer, node, active_index)
    for node in writer.body():
        replace = _operands(writer, node, active_index)
        with_context = _with_context(writer, node)
        copy = writer.copy(node, _rows_of(node, analysis, budgets), replace)
        for position, rows in with_context.items():
            copy.update_arg(position, rows)
        for edit in analysis.edits.get(node, ()):
            if isinstance(edit, Resize):
                sizes = list(copy.args[edit.arg])  # type: ignore[arg-type]
                if sizes[edit.position] != -1:
                    sizes[edit.position] = budgets.num_active
                copy.update_arg(edit.arg, sizes)
        _enter(writer, node, active_index)
    return writer.finish(_operands(writer, source.graph.output_node(), active_index))


def _enter(writer: FormWriter, node: Node, active_index: Node) -> None:
    """The birth of the token axis: the node's users see its active rows."""
    for edit in writer.analysis.edits.get(node, ()):
        if isinstance(edit, Enter):
            whole = writer.new[node]
            writer.expected[whole] = shape_of(node)
            writer.new[node] = writer.take_rows(whole, edit.dim, active_index, node)


def _operands(writer: FormWriter, node: Node, active_index: Node) -> dict[Node, Node]:
    """The operands that a node of the partial form sees in place of its own."""
    replace: dict[Node, Node] = {}
    for edit in writer.analysis.edits.get(node, ()):
        if isinstance(edit, Gather):
            whole = writer.new[edit.operand]
            replace[edit.operand] = writer.take_rows(whole, edit.dim, active_index, node)
        elif isinstance(edit, Leave):
            replace[edit.operand] = _merge_rows(writer, edit, active_index, node)
    return replace


def _with_context(writer: FormWriter, node: Node) -> dict[int, Node]:
    """The key and value arguments of an attention, by position: cached context rows, then fresh rows.

    By position, because a query may be the same node as a key.
    """
    arguments: dict[int, Node] = {}
    for edit in writer.analysis.edits.get(node, ()):
        if isinstance(edit, Attend):
            for position, role, fresh in ((1, "key", edit.key), (2, "value", edit.value)):
                rows = [writer.cache_input(writer.layout[node, role]), writer.new[fresh]]
                arguments[position] = writer.call(aten.cat.default, (rows, edit.dim), node)
    return arguments


def _merge_rows(writer: FormWriter, edit: Leave, active_index: Node, near: Node) -> Node:
    """The whole token tensor: the cached one with the active rows written into it; made once."""
    entry = writer.layout[edit.operand, "output"]
    if entry not in writer.writes:
        args = (writer.cache_input(entry), edit.dim, active_index, writer.new[edit.operand])
        writer.writes[entry] = writer.call(aten.index_copy.default, args, near)
    return writer.writes[entry]


def write_reuse(source: GraphModule, analysis: Analysis, budgets: Budgets) -> Form:
    """What comes after the tokens, on the cached token tensors. Writes nothing."""
    writer = FormWriter("reuse", source, analysis, budgets)
    for (_, role), entry in writer.layout.items():
        if role == "output":
            writer.cache_input(entry)

    def cached(node: Node) -> dict[Node, Node]:
        leaves = (e for e in analysis.edits.get(node, ()) if isinstance(e, Leave))
        return {e.operand: writer.cache_input(writer.layout[e.operand, "output"]) for e in leaves}

    for node in writer.body():
        writer.copy(node, shape_of(node), cached(node))
    return writer.finish(cached(source.graph.output_node()))


FORMS: dict[str, Callable[[GraphModule, Analysis, Budgets], Form]] = {
    "full": write_full,
    "partial": write_partial,
    "reuse": write_reuse,
}


class VerificationError(AssertionError):
    """A form's graph does not have the shapes that the analysis promised: a wrong rule, never a user's error."""


def verify_shapes(module: GraphModule, expected: dict[Node, tuple[int, ...]]) -> None:
    """Run a form on fake tensors, store each result in `meta["val"]`, and compare it with what was promised."""

    class Verify(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if n.op != "output":
                n.meta["val"] = result
                if n in expected and shape_of(n) != expected[n]:
                    raise VerificationError(f"{n.name} ({n.target}) has shape {shape_of(n)}, expected {expected[n]}")
            return result

    inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    with _fake_mode(module):
        Verify(module).run(*inputs, enable_io_processing=False)


def has_side_effect(node: Node) -> bool:
    """FX takes attention for a random number generator, because it could drop out; a form has no dropout."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def _rows_of(node: Node, analysis: Analysis, budgets: Budgets) -> tuple[int, ...]:
    """The shape a node must have in the partial form. A birth is checked before its rows are taken."""
    state = analysis.states[node]
    born = any(isinstance(edit, Enter) for edit in analysis.edits.get(node, ()))
    if isinstance(state, Tokens) and not born:
        return _with_rows(shape_of(node), state.dim, budgets.num_active)
    return shape_of(node)


def _with_rows(shape: tuple[int, ...], dim: int, rows: int) -> tuple[int, ...]:
    return (*shape[:dim], rows, *shape[dim + 1 :])


def _fake_mode(module: GraphModule) -> FakeTensorMode:
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(values)
    assert mode is not None, "the graph was not captured on fake tensors"
    return mode


def _device(module: GraphModule) -> torch.device:
    values = (node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder")
    devices = [value.device for value in values if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), devices[0])


def _flat(outputs: Any) -> Iterable[Any]:
    return outputs if isinstance(outputs, tuple | list) else (outputs,)
