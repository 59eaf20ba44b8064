"""What passes that add state to finished forms share: the state's inputs, and the time of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from ..analysis.inputs import is_state
from ..ir.cache import CacheEntry
from ..ir.form import Form
from ..ir.graphs import device_of, fake_mode, has_side_effect, verify_shapes
from ..ir.refusal import Refusal, UnsupportedGraphError

aten = torch.ops.aten
NEVER = -1e30
"""The time of a value that was not computed yet. Not NaN, which engines may take for equal to itself."""
Call = Callable[..., Node]


def caller(graph: Graph, name: str, place: Node | None = None) -> Call:
    """A function that adds calls, named by their pass, in front of `place`: by default in front of the whole body."""
    before = place or next(node for node in graph.nodes if node.op != "placeholder")

    def call(op: Any, *args: Any, **kwargs: Any) -> Node:
        with graph.inserting_before(before):
            node: Node = graph.call_function(op, args, kwargs)
        node.meta["hetcache"] = name
        return node

    return call


class StateInputs:
    """The placeholders of a form that hold its state, which a pass adds to behind the ones there are."""

    def __init__(self, graph: Graph, form: Form) -> None:
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.graph, self.form, self.last = graph, form, placeholders[-1]
        values = [node.meta["val"] for node in placeholders if isinstance(node.meta["val"], FakeTensor)]
        self.mode = values[0].fake_mode
        self.device = next((value.device for value in values if value.device.type != "cpu"), values[0].device)
        reads: list[Node] = placeholders[len(placeholders) - len(form.reads) :]
        self.inputs = dict(zip(form.reads, reads, strict=True))

    def read(self, entry: CacheEntry) -> Node:
        """The input that holds an entry."""
        if entry not in self.inputs:
            with self.graph.inserting_after(self.last):
                node = self.graph.placeholder(entry.input_name.replace(".", "_"))
            with self.mode:
                node.meta["val"] = torch.empty(entry.shape, dtype=entry.dtype, device=self.device)
            self.inputs[entry] = self.last = node
        return self.inputs[entry]

    def finish(self, writes: dict[CacheEntry, Node]) -> Form:
        """The form with more state. History is stored first: it reads what the latest values are about to overwrite."""
        output = self.graph.output_node()
        results = list(output.args[0])  # type: ignore[arg-type]
        output.args = ((*results[: len(results) - len(self.form.writes)], *writes.values()),)
        self.graph.eliminate_dead_code(has_side_effect)
        self.graph.lint()
        module = GraphModule(self.form.module, self.graph)
        verify_shapes(module, {})
        return Form(self.form.kind, module, self.form.indices, tuple(self.inputs), tuple(writes))


def time_of(graph: Graph, form: Form, name: str | None) -> Node:
    """The input that holds the time of a step, by default the one called like `timestep`.

    Raises:
        UnsupportedGraphError: no input is the time.
    """
    placeholders: list[Node] = [node for node in graph.nodes if node.op == "placeholder"]
    given = placeholders[: len(placeholders) - len(form.indices) - len(form.reads)]
    inputs = [node for node in given if not is_state(node.name)]
    # Dynamo writes l_timestep_ for timestep; audio_timestep or timestep_r are other inputs.
    found = [node for node in inputs if node.name.lower().removeprefix("l_").strip("_") == (name or "timestep")]
    if not found and name is None:
        found = [node for node in inputs if "timestep" in node.name]
    if len(found) != 1:
        names = ", ".join(node.name for node in inputs)
        reason = "extrapolation needs the time of a step, and no input is called timestep"
        help = f"make the plan with extrapolation=0 and context_extrapolation=0; the inputs are {names}"
        raise UnsupportedGraphError([Refusal(reason, help=help)])
    return found[0]


def arithmetic_of(entry: CacheEntry) -> torch.dtype:
    """The type that an entry is predicted in and its times are kept in: its own, but at least float32."""
    return torch.promote_types(entry.dtype, torch.float32)


def latest_time(call: Call, time: Node, dtype: torch.dtype) -> Node:
    """The time of a step, `[1]`. Where tokens have their own, the latest: those of a given first frame stand at 0."""
    flat = call(aten.view.default, call(aten._to_copy.default, time, dtype=dtype), [-1])
    now: Node = call(aten.amax.default, flat, [0])
    return now


def index_inputs(graph: Graph, form: Form, inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[Node]:
    """More index inputs of these shapes and types, behind those that the form has."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    last = placeholders[len(placeholders) - len(form.reads) - 1]
    added = []
    for name, (shape, dtype) in inputs.items():
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        with fake_mode(form.module):
            last.meta["val"] = torch.empty(shape, dtype=dtype, device=device_of(form.module))
        added.append(last)
    return added
