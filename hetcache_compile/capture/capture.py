"""From a model, or a graph that Dynamo captured, to one functional ATen graph with explicit inputs.

Composite operators (linear, norms, attention) stay whole: the passes read a graph of a model, not of kernels.
"""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import SessionError
from ..passes.analysis.normalise import normalise
from ..passes.analysis.packed import slices_for_places
from ..passes.ir.refusal import Refusal, UnsupportedGraphError, module_path, source_line
from .assumed_values import know
from .offloading import REGISTRY, StandIns, computes_as_written, lies_elsewhere, only_offloads

DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
"""What reading the data of a tensor calls."""


@dataclass(frozen=True)
class Program:
    """A normalised graph and what its placeholders stand for.

    Attributes:
        module: takes one value for each placeholder, returns a flat tuple.
        state: parameter, buffer or constant behind a placeholder, by placeholder name.
        targets: where the model holds it (`blocks.0.attn1.to_q.weight`), by placeholder name.
        inputs: names of the other placeholders, in the order of the flattened `(args, kwargs)`.
        in_spec: tree of `(args, kwargs)`.
        out_spec: tree of the model's own output.
        assumed: inputs that the graph is right for only if they have these values (see `assumed_values`).
    """

    module: GraphModule
    state: Mapping[str, torch.Tensor]
    targets: Mapping[str, str]
    inputs: tuple[str, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    assumed: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def with_weights_of(self, model: nn.Module) -> Program:
        """The program with the tensors that the model holds now; itself if they are the same.

        Raises:
            SessionError: a weight is gone, or has another shape, type or device: the graph is another one.
        """
        held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        changed: dict[str, torch.Tensor] = {}
        for name, tensor in self.state.items():
            target = self.targets[name]
            now = held.get(target, tensor)
            if now is tensor:
                continue
            if (now.shape, now.dtype, now.device) != (tensor.shape, tensor.dtype, tensor.device):
                raise SessionError(f"{target} has another shape, type or device than before: rewrite the model anew")
            if is_more_than_data(now):
                raise SessionError(f"{target} is another one, and so is what hangs on it: rewrite the model anew")
            changed[name] = now
        return replace(self, state={**self.state, **changed}) if changed else self

    def flat_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """One value for each placeholder, in order.

        Raises:
            TypeError: the call has other arguments than the captured one.
            SessionError: an input on which the shape of the graph depends has another value.
        """
        # The order of keywords does not matter in Python; it does in a tree.
        order = self.in_spec.child(1).context
        if set(kwargs) == set(order):
            kwargs = {name: kwargs[name] for name in order}
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if spec != self.in_spec:
            raise TypeError(f"the forms were made for arguments {self.in_spec}, but were called with {spec}")
        by_name = dict(zip(self.inputs, leaves, strict=True))
        for name, value in self.assumed.items():
            if not torch.equal(by_name[name], value):
                raise SessionError(
                    f"the graph was captured for another value of {name}, on which it depends: rewrite for this call"
                )
        names = (node.name for node in self.module.graph.nodes if node.op == "placeholder")
        return [self.state[name] if name in self.state else by_name[name] for name in names]


def is_more_than_data(tensor: Any) -> bool:
    """Whether a weight is of a class of its own that is not made of plain tensors (see `subclasses`)."""
    return (
        isinstance(tensor, nn.Parameter)
        and type(tensor) is not nn.Parameter
        and not is_traceable_wrapper_subclass(tensor)
    )


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device | None = None
) -> Program:
    """Capture one call of `model` with static shapes.

    Args:
        model: the model.
        args: of the call.
        kwargs: of the call.
        device: where it runs, if weights of it come there only to be used.

    Raises:
        UnsupportedGraphError: the call cannot be captured, or it changes a buffer.
    """
    assumed: set[int] = set()
    try:
        exported = export(sharing_weights(model, device), args, kwargs)
    except UnsupportedGraphError:
        knowing = sharing_weights(model, device)
        if knowing is model:
            raise
        assumed = know(knowing, args, kwargs)
        exported = export(knowing, args, kwargs)
    signature = exported.graph_signature
    changed = [spec.target for spec in signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
    if changed:
        raise UnsupportedGraphError([Refusal(f"the call changes its own state: {', '.join(map(str, changed))}")])
    state: dict[str, torch.Tensor] = {}
    targets: dict[str, str] = {}
    inputs: list[str] = []
    for spec in signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(spec.arg.name)
            continue
        assert spec.target is not None
        targets[spec.arg.name] = spec.target
        tensors = exported.state_dict if spec.target in exported.state_dict else exported.constants
        state[spec.arg.name] = tensors[spec.target]
    assert exported.call_spec.out_spec is not None
    assert exported.call_spec.in_spec is not None
    program = Program(
        normalise(exported.graph_module),
        state,
        targets,
        tuple(inputs),
        exported.call_spec.in_spec,
        exported.call_spec.out_spec,
        _assumed_values(assumed, inputs, args, kwargs),
    )
    return with_places_settled(program, pytree.tree_leaves((tuple(args), dict(kwargs))))


def _assumed_values(
    assumed: set[int], inputs: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    return {
        name: leaf.clone() for number, (name, leaf) in enumerate(zip(inputs, leaves, strict=True)) if number in assumed
    }


def export(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """A functional graph with static sizes.

    Raises:
        UnsupportedGraphError: there is none.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings(), _without_its_graph(), _DataByDetach():
            # torch warns of a class of its own when it copies its trees. Neither we nor users can mend that.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            # It says so of a table that a model keeps from its first call: here a copy of the model does.
            warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export", UserWarning)
            exported: ExportedProgram = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
            exported = exported.run_decompositions(composites_of_others(exported.graph_module))
    except Exception as error:
        reason = f"torch.export cannot capture it: {type(error).__name__}: {first_line(error)}"
        raise UnsupportedGraphError([Refusal(reason, module=type(model).__name__)]) from error
    _check_sizes(exported.graph_module)
    return exported


@contextmanager
def _without_its_graph() -> Iterator[None]:
    """Where torch cannot go on it prints the graph that it has, thousands of lines: they are dropped."""
    said = io.StringIO()
    with redirect_stderr(said):
        yield
    sys.stderr.write(said.getvalue())


class _DataByDetach(TorchFunctionMode):
    """Takes the data of a tensor, which tracing cannot follow, for the tensor detached: the same memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call what is asked for, or `detach`."""
        return args[0].detach() if func == DATA else func(*args, **(kwargs or {}))


def composites_of_others(module: GraphModule) -> dict[Any, Any]:
    """What takes apart the composite operators of other libraries in a graph: passes know those of ATen."""
    found = {node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    others = [op for op in found if op.namespace != "aten"]
    known = torch.export.default_decompositions() if others else {}  # it takes a third of a second
    return {op: known[op] for op in others if op in known}


def with_places_settled(program: Program, leaves: Sequence[Any]) -> Program:
    """The program with sequences that are packed by index packed by slices; it assumes the places (see `packed`)."""
    values = dict(zip(program.inputs, leaves, strict=True))
    settled = slices_for_places(program.module, values)
    return replace(program, assumed={**program.assumed, **{name: values[name].clone() for name in sorted(settled)}})


def first_line(error: Exception) -> str:
    """The first line of an error's text; errors of `torch.export` go on with the whole graph."""
    return next(iter(str(error).strip().splitlines()), "")


def with_input_names(program: Program, names: Sequence[str]) -> Program:
    """The program with its inputs named as in the graph it was captured from."""
    by_name = {node.name: node for node in program.module.graph.nodes if node.op == "placeholder"}
    for old, new in zip(program.inputs, names, strict=True):
        by_name[old]._rename(new)
        by_name[old].target = by_name[old].name
    program.module.recompile()
    inputs = tuple(by_name[old].name for old in program.inputs)
    assumed = {by_name[old].name: value for old, value in program.assumed.items()}
    return replace(program, inputs=inputs, assumed=assumed)


def sharing_weights(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A copy of `model` with the same weights, or itself where it cannot be copied.

    A model may keep tables from its first call, in an attribute or in a `functools.lru_cache`. Those of a captured
    call hold no data, and would spoil later calls of the model itself. Hooks that move the model or its parts to the
    device are no part of what is computed, and are left out.

    Args:
        model: the model.
        device: weights that are not there are without numbers in the copy, and there.
    """
    if isinstance(model, GraphModule):  # keeps nothing
        return model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    if device is not None:
        shared |= _stand_ins(model, device)
    for module in model.modules():
        if only_offloads(vars(module)):
            shared[id(vars(module)[REGISTRY])] = vars(module)[REGISTRY]
    offload = getattr(model, "_hf_hook", None)
    if offload is not None:
        shared[id(offload)] = offload  # it holds the model that it moves away: another one
    try:
        shared_model = copy.deepcopy(model, shared)
    except (TypeError, RuntimeError):
        return model
    if offload is not None and "forward" in vars(shared_model):
        # A hook of accelerate moves the model to its device before each call, which is no part of what is computed.
        own: Any = shared_model._old_forward
        shared_model.forward = own
    for module in shared_model.modules():
        if only_offloads(vars(module)) and computes_as_written(module):
            vars(module).pop("forward", None)
    return shared_model


def _stand_ins(model: nn.Module, device: torch.device) -> dict[int, torch.Tensor]:
    """Weights and buffers for a copy of a model, by the identity of those that are not on the device.

    Buffers are small, and some models ask for their numbers.
    """
    stand_ins = StandIns(device)
    found = {id(p): nn.Parameter(stand_ins.like(p), False) for p in model.parameters() if lies_elsewhere(p, device)}
    return found | {id(b): b.to(device) for b in model.buffers() if lies_elsewhere(b, device)}


def _check_sizes(module: GraphModule) -> None:
    """Raise `UnsupportedGraphError` for every operator whose result has a size that only the data knows."""
    refusals = [
        Refusal(
            "the size of its result depends on the data",
            op=str(node.target),
            module=module_path(node),
            source=source_line(node),
            help="pass inputs that need no such choice, such as a mask of ones or none",
        )
        for node in module.graph.nodes
        if _has_symbol(node) and not any(map(_has_symbol, node.all_input_nodes))
    ]
    if refusals:
        raise UnsupportedGraphError(refusals)


def _has_symbol(node: Node) -> bool:
    """Whether a size, or the value itself, is a symbol; a graph with static inputs has no other symbols."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    sizes = [size for leaf in leaves for size in (leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,))]
    return any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes)
