"""Models that Dynamo hands over in parts: captured whole, where they can be.

Some models do what Dynamo cannot follow: they ask for the value of a mask, or make a table on another device. Then the
backend is given a part of the graph at a time, and no part can be cached. So the first part that runs in a session
looks for the compiled model that is being called, captures it as `rewrite` does (`capture.capture`), and takes its
place: from then on calls in sessions run the forms of the whole model. Outside sessions, and where the model is refused
as a whole too, it is called as it was compiled. The model itself is not touched: what is replaced is what
`torch.compile` put before it.

What Dynamo guards for its graphs is looked at here in each call: the arguments, the values that were assumed
(`capture.assumed_values`), and the model (`capture.structure`).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn
from torch._dynamo import eval_frame
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..capture.capture import Program, capture
from ..capture.structure import SCALARS, Structure
from ..compilation.options import BackendOptions
from ..passes.ir.refusal import Refusal, UnsupportedGraphError
from .branches import Remembered, holds, remember
from .context import reset
from .dispatch import PART, CompiledGraph, Refused, part_of_a_model, reason_of, signature_of
from .prepare import Prepared, Preparer, preparing
from .session import Session, current_session

MOST_CAPTURES = 8
"""Captures of a model for arguments of one kind that differ in the values that were assumed."""
ASIDE: ContextVar[bool] = ContextVar("hetcache_aside", default=False)
"""Whether parts of a model that is refused as a whole run: all is said."""


class DynamoGraph(CompiledGraph):
    """A graph of Dynamo: of a whole model, or of a part of one."""

    def __init__(self, graph: GraphModule, options: BackendOptions) -> None:
        super().__init__(graph, options)
        self.options = options

        self._only_in_parts: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def aside(self, session: Session, refused: Refused | None) -> Callable[[Sequence[Any]], Any] | None:
        """What runs a part of a model that was captured whole in this call, or of one that is refused whole."""
        if ASIDE.get():
            return self.run_plain if self.broken_by or refused is not None else None
        call = RunningCall.on_the_stack()
        if call is None or session.parallel is not None:
            return None
        if not call.taken:
            if not self.broken_by or call.model in self._only_in_parts:
                return None
            if why_only_in_parts(call.model):
                self._only_in_parts.add(call.model)
                return None
            call.take_over(session, self.options, self.broken_by)
        return self._run_eagerly

    def _run_eagerly(self, inputs: Sequence[Any]) -> Any:
        """The graph as Dynamo captured it. Nothing is compiled for one call."""
        return self.graph(*inputs) if self.plain is None else self.plain(*inputs)


@dataclass(frozen=True)
class RunningCall:
    """A call of a compiled model that is on the stack.

    Attributes:
        model: what `torch.compile` was given.
        holder: the object that calls what was compiled: an `OptimizedModule`, or the model after `model.compile()`.
        attribute: where it keeps that.
        args: of the call.
        kwargs: of the call.
    """

    model: nn.Module
    holder: nn.Module
    attribute: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def on_the_stack(cls) -> RunningCall | None:
        """The innermost one, if it is of a module."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not _is_compiled_call(frame):
            frame = frame.f_back
        if frame is None:
            return None
        known = frame.f_locals
        function = known["fn"]
        model = getattr(function, "__self__", None)
        if not isinstance(model, nn.Module):
            return None
        if function.__name__ == "_call_impl":
            return cls(model, model, "_compiled_call_impl", known["args"], known["kwargs"])
        while frame is not None:
            holder = frame.f_locals.get("self")
            if isinstance(holder, eval_frame.OptimizedModule) and holder._orig_mod is model:
                return cls(model, holder, "forward", known["args"], known["kwargs"])
            frame = frame.f_back
        return None

    @property
    def taken(self) -> bool:
        """Whether a `WholeModel` has taken the place of what was compiled. Calls that come later go to it at once."""
        return isinstance(getattr(self.holder, self.attribute), WholeModel)

    def take_over(self, session: Session, options: BackendOptions, broken_by: str) -> None:
        """Let a `WholeModel` take the place of what was compiled, and make this call. What is left of it runs plainly.

        The model runs once before it is captured: some keep tables from their first call.
        """
        compiled = getattr(self.holder, self.attribute)
        whole = WholeModel(self.model, compiled, options, broken_by)
        setattr(self.holder, self.attribute, whole)
        try:
            with torch.no_grad():
                self.model.forward(*self.args, **self.kwargs)
            whole.cached(session, self.args, self.kwargs)
        except _PlainlyError:
            return  # and it was said why
        except BaseException:
            setattr(self.holder, self.attribute, compiled)
            raise


def _is_compiled_call(frame: FrameType) -> bool:
    """Whether a frame is the one of `torch.compile` around a call."""
    code = frame.f_code
    return code.co_name == "compile_wrapper" and code.co_filename == eval_frame.__file__


def why_only_in_parts(model: nn.Module) -> str:
    """Why a model cannot be captured as a whole, or nothing: hooks on it or in it do more than compute."""
    for name, module in model.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked or ("forward" in vars(module) and (name or not hasattr(module, "_hf_hook"))):
            return f"hooks on {name or 'the model'}"
    if any(map(is_traceable_wrapper_subclass, model.parameters())):
        return "its weights are a tensor subclass"
    return ""


class _PlainlyError(Exception):
    """A call runs plainly, and it was said why."""


class WholeGraph(CompiledGraph):
    """A model that was captured whole. Its inputs are the weights, and after them the leaves of a call's arguments."""

    def __init__(self, program: Program, options: BackendOptions) -> None:
        super().__init__(program.module, options)
        self.preparer = _Captured(program, options)
        self._varying = lambda inputs: None

    def run_plain(self, inputs: Sequence[Any]) -> NoReturn:
        """Leave it to who calls.

        Raises:
            _PlainlyError: always.
        """
        raise _PlainlyError


class _Captured(Preparer):
    """A preparer of what is captured already."""

    def __init__(self, program: Program, options: BackendOptions) -> None:
        super().__init__(program.module, options)
        self.program = program

    def capture(self, inputs: Sequence[Any]) -> Prepared:
        """The program."""
        return Prepared(self.program)


class Capture:
    """A model captured for arguments of one kind and, where it asked for them, their values."""

    def __init__(
        self, model: nn.Module, options: BackendOptions, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        program = capture(model, args, kwargs)
        modules = dict(model.named_modules())
        self.places: list[tuple[dict[str, Any], str]] = []
        weights = []
        for placeholder, target in program.targets.items():
            path, _, name = target.rpartition(".")
            held = vars(modules[path]) if path in modules else {}
            found = next((held[kind] for kind in ("_parameters", "_buffers") if name in held.get(kind, ())), None)
            if found is not None:
                self.places.append((found, name))
                weights.append(placeholder)
        state = {name: value for name, value in program.state.items() if name not in weights}
        inputs = (*weights, *program.inputs)
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        numbers = [program.inputs.index(name) for name in program.assumed]
        self.assumed: dict[int, Remembered] = {number: remember([leaves[number].clone()])[0] for number in numbers}
        self.names = list(program.assumed)
        self.out_spec = program.out_spec
        in_spec = pytree.tree_structure((tuple(range(len(inputs))), {}))
        self.graph = WholeGraph(replace(program, state=state, inputs=inputs, in_spec=in_spec, assumed={}), options)
        self._last: dict[int, Remembered] = {}

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether the assumed inputs have the assumed values. The very tensors of the call before do."""
        for number, value in self.assumed.items():
            known = self._last.get(number)
            same = known is not None and known[0] is leaves[number] and holds(known, leaves[number])
            if not same and not holds(value, leaves[number]):
                return False
            self._last[number] = remember([leaves[number]])[0]
        return True

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run a call in a session.

        Raises:
            _PlainlyError: it is refused.
        """
        outputs = self.graph(*(held[name] for held, name in self.places), *leaves)
        return pytree.tree_unflatten(outputs, self.out_spec)


class WholeModel:
    """What stands in the place of a compiled model that Dynamo hands over in parts.

    Args:
        model: the model.
        compiled: what was called before.
        options: of the backend.
        broken_by: why Dynamo cut the model.
    """

    def __init__(self, model: nn.Module, compiled: Callable[..., Any], options: BackendOptions, broken_by: str) -> None:
        self.model, self.compiled, self.options, self.broken_by = model, compiled, options, broken_by
        self._torchdynamo_orig_callable = model  # by which torch and others know that a model is compiled
        self._structure: Structure | None = None
        self._captures: dict[Hashable, list[Capture]] = {}
        self._refused: dict[Hashable, Refused] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model: with the forms that the open session asks for, or as it was compiled."""
        session = current_session()
        if session is None or session.parallel is not None or torch.compiler.is_compiling():
            return self.compiled(*args, **kwargs)
        hook = getattr(self.model, "_hf_hook", None)  # of accelerate: brings the model to its device
        try:
            if hook is None:
                return self.cached(session, args, kwargs)
            return hook.post_forward(self.model, self.cached(session, args, kwargs))
        except _PlainlyError:
            token = ASIDE.set(True)
            try:
                return self.compiled(*args, **kwargs)
            finally:
                reset(ASIDE, token)

    def cached(self, session: Session, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make a call in a session.

        Raises:
            _PlainlyError: it is refused.
        """
        hook = getattr(self.model, "_hf_hook", None)
        if hook is not None:
            args, kwargs = hook.pre_forward(self.model, *args, **kwargs)
        kwargs = dict(sorted(kwargs.items()))
        if self._structure is None or not self._structure.holds():
            self._structure = Structure(self.model)
            self._captures.clear()
            self._refused.clear()
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        key = (str(spec), _kinds(leaves), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
        known = next((known for known in self._captures.get(key, ()) if known.fits(leaves)), None)
        found = known or self._capture(key, args, kwargs)
        if isinstance(found, Refused):
            session.tried_calls += 1
            session.refused(found.reason, found.cause, found.topic)
            raise _PlainlyError
        return found(leaves)

    def _capture(self, key: Hashable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Capture | Refused:
        if key in self._refused:
            return self._refused[key]
        captures = self._captures.setdefault(key, [])
        try:
            why = why_only_in_parts(self.model)
            if why:
                raise UnsupportedGraphError([Refusal(why)])
            odd = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if not _is_known(leaf)), None)
            if odd is not None:
                raise UnsupportedGraphError([Refusal(f"it is given an object of type {type(odd).__name__}")])
            if len(captures) >= MOST_CAPTURES:
                names = ", ".join(captures[-1].names)
                raise UnsupportedGraphError([Refusal(f"it asks for the values of {names}, which change at each call")])
            with preparing(), torch.inference_mode(False):
                captures.append(Capture(self.model, self.options, args, kwargs))
        except Exception as error:
            reason = f"{self.broken_by}, and as a whole {reason_of(error)}"
            self._refused[key] = Refused(part_of_a_model(reason), PART, error)
            return self._refused[key]
        return captures[-1]


def _kinds(leaves: Sequence[Any]) -> Hashable:
    """What makes a call static: shapes, types and devices of tensors, values of anything else."""
    return tuple(map(type, leaves)), signature_of([leaf for leaf in leaves if _is_known(leaf)])


def _is_known(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, *SCALARS))
