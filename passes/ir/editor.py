"""Edit a form: its parts by name, and one way to begin and to end.

    editor = FormEditor(form, "my pass")
    now = editor.at_start()(aten.mul.Tensor, editor.index("scale", (), torch.float32), 2.0)
    editor.writes = {**editor.writes, entry: now}
    form = editor.close()

A `FormPass` does the opening and closing, so that a pass is what it changes and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from .cache import CacheEntry
from .form import Form, Trait
from .graphs import AddNode, device_of, fake_mode, graph_module, has_side_effect, inline, verify_shapes

TRACES = ("stack_trace", "nn_module_stack")
"""What a node's `meta` says of the model's code."""
Decode = Callable[[AddNode, tuple[Node, ...], torch.dtype], Node]
"""`decode(call, inputs, dtype)` adds the node of a value, of inputs that hold it otherwise."""


class FormEditor:
    """A copy of a form's graph, with its parts by name.

    Attributes:
        kind: of the form.
        graph: to be edited freely; the parts below say what is input and output.
        model_inputs: the inputs that the model has.
        indices: the inputs that come from a plan, by name.
        reads: the inputs that hold cache entries.
        context_reads: see `Form`.
        mask_columns: see `Form`.
    """

    def __init__(self, form: Form, name: str) -> None:
        self.form, self.name, self.kind = form, name, form.kind
        self.graph = Graph()
        copies: dict[Node, Node] = {}
        results = list(self.graph.graph_copy(form.module.graph, copies))  # type: ignore[arg-type]
        self.graph.output(tuple(results))
        placeholders = self.placeholders
        self.mode, self.device = fake_mode(form.module), device_of(node.meta.get("val") for node in placeholders)
        num_reads, num_indices = len(form.reads), len(form.indices)
        given = len(placeholders) - num_reads - num_indices
        self.model_inputs = tuple(placeholders[:given])
        self.indices: dict[str, Node] = dict(zip(form.indices, placeholders[given:], strict=False))
        self.reads: dict[CacheEntry, Node] = dict(zip(form.reads, placeholders[given + num_indices :], strict=True))
        self._written = form.writes
        self.context_reads = [replace(read, rows=copies[read.rows]) for read in form.context_reads]
        self.mask_columns = [copies[node] for node in form.mask_columns]

    @property
    def outputs(self) -> list[Any]:
        """The model's outputs. They live in the graph: assign a new list to change them."""
        results = self._results()
        return results[: len(results) - len(self._written)]

    @outputs.setter
    def outputs(self, outputs: Iterable[Any]) -> None:
        self._return([*outputs, *self.writes.values()])

    @property
    def writes(self) -> dict[CacheEntry, Node]:
        """The cache entries that the form returns, in order. They live in the graph: assign a new dict."""
        results = self._results()
        return dict(zip(self._written, results[len(results) - len(self._written) :], strict=True))

    @writes.setter
    def writes(self, writes: dict[CacheEntry, Node]) -> None:
        outputs = self.outputs
        self._written = tuple(writes)
        self._return([*outputs, *writes.values()])

    def _results(self) -> list[Any]:
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def _return(self, results: list[Any]) -> None:
        self.graph.output_node().args = (tuple(results),)

    @property
    def placeholders(self) -> list[Node]:
        """All inputs, in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def index(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Node:
        """The input `name` that comes from a plan, added behind the others if the form has none yet."""
        if name not in self.indices:
            last = self.placeholders[-len(self.reads) - 1]
            self.indices[name] = self._placeholder(last, name, shape, dtype)
        return self.indices[name]

    def drop_unused_indices(self) -> None:
        """Drop the indices that nothing uses any more, dead code left aside."""
        self.sweep()
        for name, node in list(self.indices.items()):
            if not node.users:
                self.graph.erase_node(self.indices.pop(name))

    def read(self, entry: CacheEntry) -> Node:
        """The input that holds a cache entry, added behind the others if the form has none yet."""
        if entry not in self.reads:
            last = self.placeholders[-1]
            self.reads[entry] = self._placeholder(last, input_name(entry), entry.shape, entry.dtype)
        return self.reads[entry]

    def replace_read(self, old: CacheEntry, new: Sequence[CacheEntry], decode: Decode) -> tuple[Node, ...]:
        """Read `new` in place of `old`, from inputs in the same place.

        Args:
            old: an entry that the form reads.
            new: what stands for it; the first is what `context_reads` name from now on.
            decode: adds the node that stands for the old input: of its type and shape.

        Returns:
            The inputs that hold the new entries.
        """
        before = last = self.reads[old]
        given = []
        for entry in new:
            last = self._placeholder(last, input_name(entry), entry.shape, entry.dtype)
            given.append(last)
        if before.users:
            before.replace_all_uses_with(decode(self.before_users(before), tuple(given), old.dtype))
        self.graph.erase_node(before)
        for entry, node in zip(new, given, strict=True):
            node.name = node.target = input_name(entry)  # the old one had this name until now
        pairs = ((entry, node) for entry, node in self.reads.items())
        self.reads = {
            entry: node
            for known, place in pairs
            for entry, node in (zip(new, given, strict=True) if known == old else [(known, place)])
        }
        self.context_reads = [replace(read, entry=new[0]) if read.entry == old else read for read in self.context_reads]
        return tuple(given)

    def change_reads(self, changed: Callable[[CacheEntry], CacheEntry]) -> None:
        """Let every entry that the form reads be what `changed` makes of it: its input gets another shape."""
        for node, entry in [(node, changed(entry)) for entry, node in self.reads.items()]:
            with self.mode:
                node.meta["val"] = node.meta["val"].new_empty(entry.shape)
        self.reads = {changed(entry): node for entry, node in self.reads.items()}
        self.context_reads = [replace(read, entry=changed(read.entry)) for read in self.context_reads]

    def before(self, place: Node, *, traced: bool = False) -> AddNode:
        """A function that adds nodes in front of `place`; `traced`: with its traces, as what it stands for."""

        def call(op: Any, *args: Any, **kwargs: Any) -> Node:
            with self.graph.inserting_before(place):
                node: Node = self.graph.call_function(op, args, kwargs)
            node.meta = {key: place.meta[key] for key in TRACES if traced and key in place.meta}
            node.meta["hetcache"] = self.name
            return node

        return call

    def after(self, place: Node) -> AddNode:
        """A function that adds nodes right behind `place`."""
        return self.before(place.next)

    def before_users(self, node: Node) -> AddNode:
        """A function that adds nodes right in front of the first that uses `node`: they hold memory no sooner."""
        return self.before(next(one for one in self.graph.nodes if one in node.users))

    def at_start(self) -> AddNode:
        """A function that adds nodes in front of the whole body."""
        return self.before(next(node for node in self.graph.nodes if node.op != "placeholder"))

    def at_end(self) -> AddNode:
        """A function that adds nodes behind the whole body."""
        return self.before(self.graph.output_node())

    def inline(self, place: Node, function: Callable[..., Any], *operands: Any) -> list[Node]:
        """What a function of tensors does, traced and copied in front of `place` (see `graphs.inline`)."""
        return inline(self.graph, self.name, place, function, *operands)

    def sweep(self) -> None:
        """Drop what nothing needs."""
        self.graph.eliminate_dead_code(has_side_effect)

    def close(self, traits: Iterable[Trait] | None = None, *, check_shapes: bool = True) -> Form:
        """The edited form, cleaned up, with every shape checked on fake tensors.

        Args:
            traits: what holds of it; by default what held before.
            check_shapes: not needed where only stores were added: they make no tensor.

        Raises:
            VerificationError: the graph is not what an editor may make.
        """
        self.sweep()
        self.graph.lint()
        module = graph_module(self.form.module, self.graph)
        if check_shapes:
            verify_shapes(module, {})
        alive = set(self.graph.nodes)
        return Form(
            self.kind,
            module,
            tuple(self.indices),
            tuple(self.reads),
            self._written,
            self.form.traits if traits is None else frozenset(traits),
            tuple(read for read in self.context_reads if read.rows in alive),
            tuple(node for node in self.mask_columns if node in alive),
        )

    def _placeholder(self, after: Node, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Node:
        with self.graph.inserting_after(after):
            node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=self.device)
        return node


def input_name(entry: CacheEntry) -> str:
    """What the input is called that holds an entry."""
    return entry.input_name.replace(".", "_")


class FormPass(ABC):
    """One change to finished forms. A subclass is a frozen dataclass of its settings, and edits.

    Attributes:
        name: what its nodes and its errors are marked with.
        kinds: of the forms that it changes; others stay as they are.
        requires: traits that a form must have.
        ensures: traits that it has afterwards.
        ends: traits that it has no more.
        makes_tensors: whether shapes have to be checked after it.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("full", "partial", "reuse")
    requires: ClassVar[frozenset[Trait]] = frozenset({Trait.FUNCTIONAL})
    ensures: ClassVar[frozenset[Trait]] = frozenset()
    ends: ClassVar[frozenset[Trait]] = frozenset()
    makes_tensors: ClassVar[bool] = True

    @abstractmethod
    def edit(self, form: FormEditor) -> None:
        """Change the form."""

    def cached(self, entries: tuple[CacheEntry, ...]) -> tuple[CacheEntry, ...]:
        """What the cache holds after the pass, of what it held before: so its size is known without a form."""
        return entries

    def __call__(self, form: Form) -> Form:
        """The changed form; the given one stays as it is.

        Raises:
            PassError: the form lacks a trait that this pass requires.
        """
        if missing := self.requires - form.traits:
            raise PassError(f"it requires that {' and that '.join(sorted(trait.value for trait in missing))}")
        traits = (form.traits - self.ends) | self.ensures
        if form.kind not in self.kinds:
            return replace(form, traits=traits)
        editor = FormEditor(form, self.name)
        self.edit(editor)
        return editor.close(traits, check_shapes=self.makes_tensors)


class PassError(AssertionError):
    """A pass cannot run, or made what is no graph: a fault of this package or of a pass, never of a user's model."""
