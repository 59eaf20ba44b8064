"""From a form to the graph that is exported: the same graph, in the operators that engines like best.

`passes_for` is the whole pipeline. Nothing here knows what a form computes. Every pass is exact but for the order of
floating-point operations.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from ...capture.capture import Program
from ...passes.ir.form import Form
from ...passes.ir.pipeline import run_passes
from ..model.options import FIRST_FUSED_OPSET
from .attention import spell_out_attention
from .choose_by_logic import choose_by_logic
from .fold_constants import fold_constants
from .gather_parts import gather_parts
from .interleave import interleave_writes
from .rotary import fuse_rotary_embedding
from .strides import forget_strides
from .subject import Lowering, LoweringPass
from .sum_by_products import sum_by_products
from .unused import drop_unused


@dataclass(frozen=True)
class Lowered:
    """A form ready for export.

    Attributes:
        kind: name of the form.
        module: takes `weights`, then the inputs, as its placeholders say; returns a flat tuple.
        weights: tensors behind placeholders, by placeholder name.
        names: what a weight is called in the exported file, by placeholder name.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
    """

    kind: str
    module: GraphModule
    weights: Mapping[str, torch.Tensor]
    names: Mapping[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def passes_for(opset: int) -> list[LoweringPass]:
    """The passes for an opset, in order: later opsets fuse what earlier ones have to see spelled out."""
    of_opset = [fuse_rotary_embedding] if opset >= FIRST_FUSED_OPSET else [spell_out_attention]
    return [
        interleave_writes,
        fold_constants,
        gather_parts,
        choose_by_logic,
        sum_by_products,
        *of_opset,
        forget_strides,
        drop_unused,
    ]


def lower(form: Form, program: Program, opset: int) -> Lowered:
    """The exported graph of a form, for one opset. The form stays as it is.

    Raises:
        PassError: a pass failed; its name is in the text.
    """
    given = Lowering(GraphModule(form.module, copy.deepcopy(form.module.graph)), program.state, program.targets)
    name = f"{form.kind} form for opset {opset}"
    made = run_passes(name, passes_for(opset), given, lambda lowering: lowering.module)
    made.module.recompile()
    cache_names = {entry.input_name.replace(".", "_"): entry.input_name for entry in form.reads}
    placeholders = [node.name for node in made.module.graph.nodes if node.op == "placeholder"]
    outputs = [*output_names(program), *(entry.output_name for entry in form.writes)]
    return Lowered(
        form.kind,
        made.module,
        {name: made.weights[name] for name in placeholders if name in made.weights},
        {name: made.names[name] for name in placeholders if name in made.weights},
        tuple(cache_names.get(name, name) for name in placeholders if name not in made.weights),
        tuple(outputs),
    )


def output_names(program: Program) -> list[str]:
    """The model's own names of its outputs, where its output type has names; `sample` otherwise."""
    keys = program.out_spec.context
    count = program.out_spec.num_leaves
    if isinstance(keys, list) and len(keys) == count and all(isinstance(key, str) for key in keys):
        return list(keys)
    return ["sample"] if count == 1 else [f"sample.{number}" for number in range(count)]
