"""Let a form keep its cache in buffers that its caller owns, instead of taking and returning tensors.

The functional form is the one we reason about and export. This pass makes the one that runs in a process: state
stays where it is in memory, and a second edit allocates nothing.
"""

from __future__ import annotations

import copy

from torch.fx import Graph, GraphModule, Node

from ..ir.form import Form
from ..ir.graphs import has_side_effect
from .write import aten


def write_in_place(form: Form) -> Form:
    """A form with `writes` empty: every entry it touches is one of its `reads`, a buffer, and is overwritten."""
    graph = copy.deepcopy(form.module.graph)
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    num_outputs = len(results) - len(form.writes)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    buffers = dict(zip(form.reads, placeholders[len(placeholders) - len(form.reads) :], strict=True))
    last = placeholders[-1]
    for entry, value in zip(form.writes, results[num_outputs:], strict=True):
        if entry not in buffers:
            with graph.inserting_after(last):
                last = buffers[entry] = graph.placeholder(entry.input_name.replace(".", "_"))
        _store(graph, buffers[entry], value)
    output.args = (tuple(results[:num_outputs]),)
    graph.eliminate_dead_code(has_side_effect)
    graph.lint()
    return Form(form.kind, GraphModule(form.module, graph), form.indices, tuple(buffers), ())


def _store(graph: Graph, buffer: Node, value: Node) -> None:
    """Overwrite a buffer at the end of the graph; compilers sink the write into what computes the value."""
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(aten.copy_.default, (buffer, value))
    node.meta = {k: value.meta[k] for k in ("stack_trace", "nn_module_stack") if k in value.meta}
    node.meta["hetcache"] = "in place"
