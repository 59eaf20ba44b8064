"""Models that Dynamo hands over in parts: captured whole, where they can be.

Some models do what Dynamo cannot follow: they ask for the value of a mask, or make a table on another device. Then the
backend is given a part of the graph at a time, and no part can be cached. So the first part that runs in a session
looks for the compiled model that is being called, captures it as `rewrite` does (`capture.capture`), and takes its
place: from then on calls in sessions run the forms of the whole model. Outside sessions, and where the model is refused
as a whole too, it is called as it was compiled. The model itself is not touched: what is replaced is what
`torch.compile` put before it.

In each call the arguments are looked at, the values that were assumed (`capture.assumed_values`), and what the model
is (`capture.structure`), in the place of what Dynamo guards.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
from torch import nn
from torch._dynamo import eval_frame
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..capture.capture import Program, capture, is_more_than_data, sharing_weights
from ..capture.structure import SCALARS, TENSORS, Structure
from ..compilation.options import BackendOptions
from ..passes.ir.refusal import Refusal, UnsupportedGraphError
from .branches import Remembered, holds, remember
from .context import reset
from .dispatch import PART, CompiledGraph, Refused, reason_of, signature_of
from .prepare import Prepared, Preparer, preparing
from .session import Session, current_session

MOST_CAPTURES = 16
"""Captures that are kept of a model; the one not used for longest goes first."""
MOST_UNUSED = 6
"""Captures in a row of which no call but the first could use one. Then what they rely on changes from call to call."""
BETWEEN = {eval_frame.__file__, CompiledGraph.__call__.__code__.co_filename, __file__}
"""Files between the code that calls a graph and what is asked here."""
CALL = nn.Module._call_impl.__code__
"""What runs while a module is called."""
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
            broken_by = self.broken_by or call.part
            if not broken_by or call.model in self._only_in_parts:
                return None
            if why_only_in_parts(call.model):
                self._only_in_parts.add(call.model)
                return None
            call.take_over(session, self.options, broken_by)
        return self._run_eagerly

    def _run_eagerly(self, inputs: Sequence[Any]) -> Any:
        """The graph as Dynamo captured it. Nothing is compiled for one call."""
        return self.graph(*inputs) if self.plain is None else self.plain(*inputs)


@dataclass(frozen=True)
class RunningCall:
    """A call of a compiled model that is on the stack.

    Attributes:
        model: what `torch.compile` was given.
        holder: the object that calls what was compiled: an `OptimizedModule`, or the model itself, compiled in place.
        attribute: where it keeps that.
        args: of the call.
        kwargs: of the call.
        part: why what is called now is a part of the model, if the model's own code runs in Python.
    """

    model: nn.Module
    holder: nn.Module
    attribute: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: str

    @classmethod
    def on_the_stack(cls) -> RunningCall | None:
        """The innermost one, if it is of a module."""
        frames: list[FrameType] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not _is_compiled_call(frame):
            frames.append(frame)
            frame = frame.f_back
        if frame is None:
            return None
        known = frame.f_locals  # by these names in torch 2.11 to 2.15
        function = known.get("fn")
        model = getattr(function, "__self__", None)
        if not isinstance(model, nn.Module) or not {"args", "kwargs"} <= known.keys():
            return None
        given = known["args"], known["kwargs"], _why_a_part(model, frames)
        if getattr(function, "__name__", "") == "_call_impl":
            return cls(model, model, "_compiled_call_impl", *given)
        compiled = frame.f_code
        while frame is not None:
            # Frames that Dynamo made are not asked for their locals: in some torch that is not safe.
            holder = frame.f_locals.get("self") if frame.f_code is CALL else None
            if isinstance(holder, eval_frame.OptimizedModule) and holder._orig_mod is model:
                for attribute in ("forward", "_old_forward"):  # the latter behind a hook of accelerate
                    held = getattr(holder, attribute, None)
                    if isinstance(held, WholeModel) or getattr(held, "__code__", None) is compiled:
                        return cls(model, holder, attribute, *given)
            frame = frame.f_back
        return None

    @property
    def taken(self) -> bool:
        """Whether a `WholeModel` has taken the place of what was compiled. Calls that come later go to it at once."""
        return isinstance(getattr(self.holder, self.attribute), WholeModel)

    def take_over(self, session: Session, options: BackendOptions, broken_by: str) -> None:
        """Let a `WholeModel` take the place of what was compiled, and make this call; its parts run plainly."""
        compiled = getattr(self.holder, self.attribute)
        whole = WholeModel(self.model, compiled, options, broken_by, runs_hook=self.attribute != "_old_forward")
        setattr(self.holder, self.attribute, whole)
        try:
            whole.rehearse(self.args, self.kwargs)
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


def _why_a_part(model: nn.Module, frames: Sequence[FrameType]) -> str:
    """Whether the code that calls a graph is another than the model's, and that is on the stack."""
    own = _place(inspect.unwrap(type(model).forward).__code__)
    places = [_place(frame.f_code) for frame in frames if frame.f_code.co_filename not in BETWEEN]
    if own not in places[1:] or places[0] == own:
        return ""
    file, line, name = places[0]
    return f"it leaves the model's forward to Python, and hands over {name} at {file}:{line}"


def _place(code: CodeType) -> tuple[str, int, str]:
    """Where code stands; Dynamo's own copy of it stands there too."""
    return code.co_filename, code.co_firstlineno, code.co_name


def why_only_in_parts(model: nn.Module) -> str:
    """Why a model cannot be captured as a whole, or nothing: hooks on it or in it do more than compute."""
    for name, module in model.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked or ("forward" in vars(module) and (name or not hasattr(module, "_hf_hook"))):
            return f"hooks on {name or 'the model'}"
    weights: Iterator[Any] = model.parameters()
    odd = {type(w).__name__ for w in weights if is_traceable_wrapper_subclass(w) or is_more_than_data(w)}
    return f"weights of the class {odd.pop()}" if odd else ""


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
    """A model captured for arguments of one kind, its `key`, and where it asked for them, their values."""

    def __init__(
        self,
        model: nn.Module,
        options: BackendOptions,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        key: Hashable,
    ) -> None:
        self.key = key
        program = capture(model, args, kwargs)
        found = {name: place for name, target in program.targets.items() if (place := place_of(model, target))}
        weights, self.places = list(found), list(found.values())
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
        """Whether the assumed inputs have the assumed values. Those of the call before do, unless written since."""
        for number, value in self.assumed.items():
            leaf, known = leaves[number], self._last.get(number)
            same = known is not None and known[0] is leaf and not leaf.is_inference() and holds(known, leaf)
            if not same and not holds(value, leaf):
                return False
            self._last[number] = remember([leaf])[0]
        return True

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run a call in a session.

        Raises:
            _PlainlyError: it is refused.
        """
        outputs = self.graph(*(held[name] for held, name in self.places), *leaves)
        return pytree.tree_unflatten(outputs, self.out_spec)


def place_of(model: nn.Module, target: str) -> tuple[dict[str, torch.Tensor], str] | None:
    """The dict in which a module holds a weight or buffer, and its name there; None if it is none."""
    path, _, name = target.rpartition(".")
    try:
        holder = vars(model.get_submodule(path))
    except AttributeError:
        return None
    return next(((holder[kind], name) for kind in TENSORS if name in holder[kind]), None)


class WholeModel:
    """What stands in the place of a compiled model that Dynamo hands over in parts.

    Args:
        model: the model.
        compiled: what was called before.
        options: of the backend.
        broken_by: why Dynamo cut the model.
        runs_hook: whether a hook of accelerate on the model, which brings it to its device, is run from here.
    """

    def __init__(
        self,
        model: nn.Module,
        compiled: Callable[..., Any],
        options: BackendOptions,
        broken_by: str,
        *,
        runs_hook: bool,
    ) -> None:
        self.model, self.compiled, self.options, self.broken_by = model, compiled, options, broken_by
        self._torchdynamo_orig_callable = model  # by which torch and others know that a model is compiled
        self._runs_hook = runs_hook
        self._structure: Structure | None = None
        self._captures: list[Capture] = []
        self._unused = 0
        self._session: weakref.ref[Session] | None = None
        self._refused: dict[Hashable, Refused] = {}
        self._why_never = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeModel:
        """Itself, as functions are copied."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model: with the forms that the open session asks for, or as it was compiled."""
        if torch.compiler.is_dynamo_compiling():  # in another function that is compiled
            return self.compiled(*args, **kwargs)
        session = current_session()
        if session is None or session.parallel is not None:
            return self.compiled(*args, **kwargs)
        try:
            outputs = self.cached(session, args, kwargs)
        except _PlainlyError:
            token = ASIDE.set(True)
            try:
                return self.compiled(*args, **kwargs)
            finally:
                reset(ASIDE, token)
        return outputs if self._hook is None else self._hook.post_forward(self.model, outputs)

    @property
    def _hook(self) -> Any:
        return getattr(self.model, "_hf_hook", None) if self._runs_hook else None

    def rehearse(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Find out what a call does to the model beside its result, on a copy of it that shares its weights.

        Some models make tables in their first call: then the model itself makes them too, now. One that is changed by
        each call, as by a count of them, is no function of its arguments, and is never captured.
        """
        if self._hook is not None:
            args, kwargs = self._hook.pre_forward(self.model, *args, **kwargs)
        copy = sharing_weights(self.model)
        if copy is self.model:
            self._why_never = "it cannot be copied"
            return
        before = Structure(copy)
        with torch.no_grad():
            copy.forward(*args, **kwargs)
            if before.holds():
                return
            after = Structure(copy)
            copy.forward(*args, **kwargs)
            if not after.holds():
                self._why_never = "each call changes what it is"
                return
            self.model.forward(*args, **kwargs)

    def cached(self, session: Session, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make a call in a session.

        Raises:
            _PlainlyError: it is refused.
        """
        if self._hook is not None:
            args, kwargs = self._hook.pre_forward(self.model, *args, **kwargs)
        kwargs = dict(sorted(kwargs.items()))
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        found = self._find(session, (str(spec), _kinds(leaves), _modes()), leaves, args, kwargs)
        if isinstance(found, Refused):
            session.tried_calls += 1
            session.refused(found.reason, None, found.topic)
            raise _PlainlyError
        return found(leaves)

    def _find(
        self,
        session: Session,
        key: Hashable,
        leaves: Sequence[Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Capture | Refused:
        """The capture for a call, made if there is none, or why there can be none."""
        if self._session is None or self._session() is not session:
            self._session = weakref.ref(session)
            self._unused = min(self._unused, MOST_UNUSED - 1)  # what changed at each call may be steady now
        if self._structure is None or not self._structure.holds():
            self._structure = Structure(self.model)
            self._captures = []
            self._refused = {}
        found = self._known(key, leaves) or self._refused.get(key)
        if found is None and self._unused >= MOST_UNUSED:
            return self._refusal(self._what_changes(key))
        if found is not None:
            return found
        with preparing(), torch.inference_mode(False):
            found = self._known(key, leaves)  # another thread may have been here
            return found or self._capture(key, args, kwargs)

    def _known(self, key: Hashable, leaves: Sequence[Any]) -> Capture | None:
        """The capture that was made for such a call; it is the last to go then."""
        captures = self._captures
        found = next((capture for capture in captures if capture.key == key and capture.fits(leaves)), None)
        if found is not None:
            self._unused = 0
            self._captures = [*(capture for capture in captures if capture is not found), found]
        return found

    def _capture(self, key: Hashable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Capture | Refused:
        """Capture the model for a call, or say why it cannot be."""
        self._unused += 1
        try:
            why = self._why_never or why_only_in_parts(self.model)
            odd = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if not _is_known(leaf)), None)
            if odd is not None:
                why = f"it is given an object of type {type(odd).__name__}"
            if why:
                raise UnsupportedGraphError([Refusal(why)])
            capture = Capture(self.model, self.options, args, kwargs, key)
        except Exception as error:
            # Kept without the error itself, whose frames hold the arguments.
            self._refused[key] = self._refusal(reason_of(error))
            return self._refused[key]
        self._captures = [*self._captures[1 - MOST_CAPTURES :], capture]
        return capture

    def _refusal(self, why: str) -> Refused:
        reason = (
            f"Dynamo hands this model over in parts, because {self.broken_by}. It cannot be cached as a whole either, "
            f"because {why}"
        )
        return Refused(reason, PART)

    def _what_changes(self, key: Hashable) -> str:
        """Why no capture was of use to a later call."""
        if not self._captures:
            return "its attributes are others in each call"
        last = self._captures[-1]
        if last.key == key:
            return f"what it computes depends on the values of {', '.join(last.names)}, which are others in each call"
        return "its arguments that are no tensors, or the shapes of those that are, are others in each call"


def _modes() -> Hashable:
    """What changes the type of results beside the arguments."""
    devices = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    return torch.get_default_dtype(), *devices


def _kinds(leaves: Sequence[Any]) -> Hashable:
    """What makes a call static: shapes, types and devices of tensors, values of anything else.

    Of an object of any other type only the type counts: a call with one is refused.
    """
    return tuple(map(type, leaves)), signature_of([leaf for leaf in leaves if _is_known(leaf)])


def _is_known(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, *SCALARS))
