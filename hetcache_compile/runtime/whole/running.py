"""The call of a compiled model that is on the stack, and how a whole model takes its place."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch._dynamo import eval_frame

from ...capture.offloading import all_offloaded, is_offloaded
from ...compilation.options import BackendOptions
from ...sessions.session import Session
from ..dispatch import CompiledGraph
from .captured import PlainlyError
from .model import WholeModel

OWN = map(str, Path(__file__).parent.glob("*.py"))
BETWEEN = {eval_frame.__file__, CompiledGraph.__call__.__code__.co_filename, *OWN}
"""Files between the code that calls a graph and what is asked here."""
CALL = nn.Module._call_impl.__code__
"""What runs while a module is called."""


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
            with all_offloaded(self.model):
                whole.rehearse(self.args, self.kwargs)
                whole.cached(session, self.args, self.kwargs)
        except PlainlyError:
            return  # and it was said why
        except BaseException:
            setattr(self.holder, self.attribute, compiled)
            raise


def runs_whole_in_sessions() -> bool:
    """Whether the model that is being called is one of which parts are compiled, and are not what sessions run."""
    call = RunningCall.on_the_stack()
    return call is not None and (call.taken or is_offloaded(call.model))


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
