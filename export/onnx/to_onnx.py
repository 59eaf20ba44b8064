"""A lowered form as an ONNX model: clean names, no traces, weights under their module paths.

`torch.onnx` does the operators. What comes before it is an `ExportedProgram` around the form's own graph (no second
trace, so the graph is the backend's); what comes after it is cleaning up.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    TopologicalSortPass,
)
from onnxscript import optimizer
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ...engine.manifest import FormSpec
from ...errors import ExportError
from ..lowering.pipeline import Lowered
from .quantize_linear import FIRST_BLOCKED_OPSET, use_quantize_linear

LARGEST_NAMED_BY_VALUE = 8
SCOPES = "pkg.torch.onnx.name_scopes"


def to_onnx(lowered: Lowered, spec: FormSpec, opset: int, metadata: Mapping[str, str]) -> ir.Model:
    """The ONNX model of a form. Its weights are the form's own tensors: nothing is copied.

    Raises:
        ExportError: an operator has no form in ONNX.
    """
    try:
        with _quiet():
            program = torch.onnx.export(
                as_exported_program(lowered), dynamo=True, opset_version=opset, optimize=False, verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise ExportError(f"torch.onnx cannot express the {lowered.kind} form: {str(cause).splitlines()[0]}") from error
    assert program is not None
    model = program.model
    set_named_dims(model, spec)
    transpose_weights(model)
    # A limit on the size of what is folded keeps weights what they are.
    optimizer.optimize(model, input_size_limit=1024, output_size_limit=1024)
    is_int8 = any(one.role == "cache" and one.dtype == "int8" for one in (*spec.inputs, *spec.outputs))
    if is_int8 and opset >= FIRST_BLOCKED_OPSET:
        use_quantize_linear(model)
    for run in (LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0), IdentityEliminationPass()):
        run(model)
    tell_outputs_apart(model)
    TopologicalSortPass()(model)
    name_everything(model, lowered)
    ClearMetadataAndDocStringPass()(model)
    for node in model.graph:
        node.version = None
    model.graph.name = lowered.kind
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "hetcache_compile", metadata["hetcache.version"]
    model.doc_string = None
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    return model


def as_exported_program(lowered: Lowered) -> ExportedProgram:
    """The graph with a signature: weights are buffers under their exported names, everything else is an input."""
    graph = copy.deepcopy(lowered.module.graph)
    inputs, arguments, state = [], [], {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in lowered.weights:
            name = lowered.names[node.name]
            state[name] = lowered.weights[node.name].detach()
            inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
        else:
            inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
            arguments.append(node.meta["val"])
    results: Any = graph.output_node().args[0]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    call = ModuleCallSignature(
        inputs=[spec.arg for spec in inputs if spec.kind is InputKind.USER_INPUT],
        outputs=[spec.arg for spec in outputs],
        in_spec=pytree.tree_structure((tuple(arguments), {})),
        out_spec=pytree.tree_structure(tuple(range(len(outputs)))),
    )
    return ExportedProgram(
        GraphModule(torch.nn.Module(), graph),
        graph,
        ExportGraphSignature(inputs, outputs),
        state,
        {},
        [ModuleCallEntry("", call)],
        (tuple(arguments), {}),
        {},
    )


def set_named_dims(model: ir.Model, spec: FormSpec) -> None:
    """Give inputs and outputs the shapes of the manifest, and forget all others if any of them has a name.

    The graph was traced with one set of sizes; what folds constants must not see them."""
    specs = (*spec.inputs, *spec.outputs)
    if all(isinstance(size, int) for one in specs for size in one.shape):
        return
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    for value, one in zip((*model.graph.inputs, *model.graph.outputs), specs, strict=True):
        value.shape = ir.Shape(one.shape)


def tell_outputs_apart(model: ir.Model) -> None:
    """A value that is several outputs (a packed model's result, and the cache of it) is copied: it has one name."""
    seen: set[ir.Value] = set()
    for position, value in enumerate(model.graph.outputs):
        if value in seen:
            copied = ir.node("Identity", [value])
            copied.outputs[0].shape, copied.outputs[0].type = value.shape, value.type
            model.graph.append(copied)
            model.graph.outputs[position] = copied.outputs[0]
        seen.add(value)


def transpose_weights(model: ir.Model) -> None:
    """`Transpose(weight)` becomes a weight of its own, transposed when it is written, with `.T` after its name."""
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or "perm" not in node.attributes:
            continue
        permutation = list(node.attributes["perm"].as_ints())
        tensor, name = weight.const_value, f"{weight.name}.T"
        assert tensor is not None
        if name not in model.graph.initializers:
            shape = [int(tensor.shape[dim]) for dim in permutation]
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype))
            value.const_value = _transposed(tensor, permutation, shape, name)
            model.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(model.graph.initializers[name])
        model.graph.remove(node, safe=True)
    for name, weight in list(model.graph.initializers.items()):
        if not weight.uses() and not weight.is_graph_output():
            del model.graph.initializers[name]


def _transposed(tensor: ir.TensorProtocol, permutation: list[int], shape: list[int], name: str) -> ir.LazyTensor:
    def make() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().transpose(permutation).copy(), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)


def name_everything(model: ir.Model, lowered: Lowered) -> None:
    """Nodes are `blocks.0.attn1.to_q/MatMul`, values `.../MatMul.out`, small constants `.../Reshape.shape`."""
    for value, name in zip(model.graph.inputs, lowered.inputs, strict=True):
        value.name = name
    seen: Counter[str] = Counter()
    for node in model.graph:
        stem = "/".join(filter(None, (scope_of(node), node.op_type)))
        seen[stem] += 1
        node.name = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
        for number, value in enumerate(node.outputs):
            value.name = f"{node.name}.out" + (str(number) if len(node.outputs) > 1 else "")
    for value, name in zip(model.graph.outputs, lowered.outputs, strict=True):
        value.name = name
    name_constants(model, set(lowered.names.values()))


def name_constants(model: ir.Model, weights: set[str]) -> None:
    """Small constants are named by what they hold and kept once, others by their first user."""
    initializers = model.graph.initializers
    for name, value in list(initializers.items()):
        tensor = value.const_value
        if name.removesuffix(".T") in weights or tensor is None:
            continue
        if tensor.size > LARGEST_NAMED_BY_VALUE:
            node, position = next(iter(value.uses()))
            parameters = onnx.defs.get_schema(node.op_type, model.opset_imports[""]).inputs
            value.name = f"{node.name}.{parameters[min(position, len(parameters) - 1)].name}"
            continue
        shape = "x".join(str(size) for size in tensor.shape.numpy()) or "scalar"
        by_value = ".".join(["constants", tensor.dtype.name.lower(), shape, "_".join(map(str, tensor.numpy().flat))])
        if by_value not in initializers:
            value.name = by_value
        else:
            value.replace_all_uses_with(initializers[by_value])
            del initializers[name]


def scope_of(node: ir.Node) -> str:
    """The dotted path of the innermost module that a node comes from; that of its first user if it has none."""
    if SCOPES in node.metadata_props:
        scopes = [scope for scope in _read_list(node.metadata_props[SCOPES])[:-1] if scope]
        return scopes[-1] if scopes else ""
    users = [user for value in node.outputs for user, _ in value.uses() if SCOPES in user.metadata_props]
    return scope_of(users[0]) if users else ""


def _read_list(text: str) -> list[str]:
    return [item.strip().strip("'\"") for item in text.strip("[]").split(",")]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx logs every torchvision operator that it does not find, and warns of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
