"""Models that Dynamo hands over in parts: captured whole, where they can be.

Some models do what Dynamo cannot follow: they ask for the value of a mask, or make a table on another device; and
diffusers' group offloading hooks a model's blocks. Then the backend is given a part of the graph at a time, and no part
can be cached. So the first part that runs in a session looks for the compiled model that is being called, captures it
as `rewrite` does (`capture.capture`), and takes its place: from then on calls in sessions run the forms of the whole
model. Outside sessions, and where the model is refused as a whole too, it is called as it was compiled. The model
itself is not touched: what is replaced is what `torch.compile` put before it.

In each call the arguments are looked at, the values that were assumed (`capture.assumed_values`), and what the model
is (`capture.structure`), in the place of what Dynamo guards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...capture.capture import first_line, is_more_than_data, sharing_weights
from ...capture.offloading import computes_as_written, onload_device, why_not_brought
from ...capture.structure import SCALARS, Structure
from ...compilation.options import BackendOptions
from ...passes.ir.refusal import Refusal, UnsupportedGraphError
from ...sessions.context import reset
from ...sessions.session import Session, current_session
from ..inputs import signature_of
from ..prepare import preparing
from ..refusals import PART, Refused, reason_of
from .captured import Capture, PlainlyError

MOST_CAPTURES = 16
"""Captures that are kept of a model; the one not used for longest goes first."""
MOST_UNUSED = 6
"""Captures in a row of which no call but the first could use one. Then what they rely on changes from call to call."""
ASIDE: ContextVar[bool] = ContextVar("hetcache_aside", default=False)
"""Whether parts of a model that is refused as a whole run: all is said."""


def why_only_in_parts(model: nn.Module) -> str:
    """Why a model cannot be captured as a whole, or nothing: hooks on it or in it do more than compute."""
    for name, module in model.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        moves = not name and hasattr(module, "_hf_hook")
        if hooked or not (moves or computes_as_written(module)):
            return f"there are hooks on {name or 'it'}"
    not_brought = why_not_brought(model)
    if not_brought:
        return not_brought
    weights: Iterator[Any] = model.parameters()
    odd = {type(w).__name__ for w in weights if is_traceable_wrapper_subclass(w) or is_more_than_data(w)}
    return f"it has weights of the class {odd.pop()}" if odd else ""


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
        self._device: torch.device | None = None
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
        except PlainlyError:
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
        args, kwargs = self._on_its_device(args, kwargs)
        copy = sharing_weights(self.model, self._device)
        if copy is self.model:
            self._why_never = "it cannot be copied"
            return
        before = Structure(copy)
        with torch.no_grad():
            try:
                copy.forward(*args, **kwargs)
                if before.holds():
                    return
                after = Structure(copy)
                copy.forward(*args, **kwargs)
            except Exception as error:
                if self._device is None:
                    raise  # the model's own
                self._why_never = f"a copy of it fails: {type(error).__name__}: {first_line(error)}"
                return
            if not after.holds():
                self._why_never = "each call changes what it is"
                return
            self.model.forward(*args, **kwargs)

    def cached(self, session: Session, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make a call in a session.

        Raises:
            PlainlyError: it is refused.
        """
        args, kwargs = self._on_its_device(args, kwargs)
        kwargs = dict(sorted(kwargs.items()))
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        found = self._find(session, (str(spec), _kinds(leaves), _modes()), leaves, args, kwargs)
        if isinstance(found, Refused):
            session.notices.tried_calls += 1
            session.notices.refused(found.reason, None, found.topic)
            raise PlainlyError
        return found(leaves)

    def _on_its_device(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """The arguments, where the model runs, which a hook of accelerate is brought there for."""
        if self._structure is None or not self._structure.holds():
            self._structure, self._device = Structure(self.model), onload_device(self.model)
            self._captures = []
            self._refused = {}
        if self._hook is not None:
            args, kwargs = self._hook.pre_forward(self.model, *args, **kwargs)
        if self._device is not None:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self._device), (tuple(args), dict(kwargs)))
        return args, kwargs

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
            capture = Capture(self.model, self.options, args, kwargs, key, self._device)
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
