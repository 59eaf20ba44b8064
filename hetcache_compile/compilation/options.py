"""What the backend takes: one dataclass, and the inner compiler that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..passes.analysis.inputs import TokenInputs

Compiled = Callable[..., Any]
Compiler = Callable[[GraphModule, Sequence[Any]], Compiled]
"""What makes a callable of a graph and inputs like those it will get."""


@dataclass(frozen=True)
class BackendOptions:
    """`torch.compile(..., options={...})` of the backend. Each field's `metadata["help"]` says what it is."""

    inner: str | Compiled = field(
        default="inductor", metadata={"help": "the backend that compiles each form: a name or a callable"}
    )
    inner_options: Mapping[str, Any] | None = field(default=None, metadata={"help": "options of that backend"})
    mode: str | None = field(
        default=None,
        metadata={
            "help": "a mode of Inductor; `torch.compile(..., mode=...)` is the same. Those that record CUDA graphs, "
            'such as "reduce-overhead", record a whole form, which pays where steps are small'
        },
    )
    regional: bool = field(
        default=True,
        metadata={
            "help": "compile each distinct block of a form once and call it wherever it occurs; False compiles forms "
            "whole, which takes longer the deeper the model is"
        },
    )
    token_inputs: TokenInputs | None = field(
        default=None,
        metadata={"help": "as in `rewrite`, for a model of packed tokens where it is not clear which input holds them"},
    )

    @classmethod
    def of(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> BackendOptions:
        """The options of a call of `torch.compile`.

        Raises:
            ValueError: there is no such option or mode.
        """
        given = dict(options or {})
        names = [one.name for one in fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"unknown options {unknown}: hetcache_backend takes {', '.join(names)}")
        if mode is not None:
            given["mode"] = mode
        return cls(**given)

    @property
    def records(self) -> bool:
        """Whether CUDA graphs are recorded."""
        return bool(self._patches().get("triton.cudagraphs"))

    def _patches(self) -> dict[str, Any]:
        """The inner compiler's options, with those that its mode stands for.

        Raises:
            ValueError: the inner compiler takes no mode, or there is no such mode.
        """
        given = dict(self.inner_options or {})
        if self.mode is None or self.mode == "default":
            return given
        if self.inner != "inductor":
            raise ValueError(f"mode={self.mode!r} is Inductor's: the inner compiler {self.inner!r} takes none")
        from torch._inductor import list_mode_options

        modes = list_mode_options()
        if self.mode not in modes:
            raise ValueError(f"there is no mode {self.mode!r}: Inductor has {', '.join(modes)}")
        return {**modes[self.mode], **given}

    def compiler(self, *, records: bool = True) -> Compiler:
        """The function `(graph, inputs) -> callable` that compiles a graph.

        Args:
            records: whether the inner compiler may record CUDA graphs; not of forms, which `Recorder` records.

        Raises:
            ValueError: the inner compiler takes no mode, or there is no such mode.
        """
        patches = self._patches()
        if self.records and not records:
            patches["triton.cudagraphs"] = False
        if self.inner == "inductor":
            from torch._inductor import compile_fx

            inductor: Any = compile_fx.compile_fx

            def compile_with_inductor(graph: GraphModule, inputs: Sequence[Any]) -> Compiled:
                with static_shapes() as mode:
                    alike = [_static(mode, value) for value in inputs]
                    compiled: Compiled = inductor(graph, alike, config_patches=patches)
                return compiled

            return compile_with_inductor
        compile_graph: Any = self.inner if callable(self.inner) else torch._dynamo.lookup_backend(self.inner)
        if patches:
            return lambda graph, inputs: compile_graph(graph, inputs, options=patches)
        compiler: Compiler = compile_graph
        return compiler


@contextmanager
def static_shapes() -> Iterator[FakeTensorMode]:
    """Let a compiler outside Dynamo know that every size is static, which torch's caches on disk ask to be told.

    Yields the mode of the fake tensors that it is to be given.
    """
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:  # Dynamo is compiling, and has told
        yield context.fake_mode
        return
    mode = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True))
    with tracing(TracingContext(mode)):
        yield mode


def _static(mode: FakeTensorMode, value: Any) -> Any:
    """An input as the compiler is to take it: of a real tensor it would make every size a symbol."""
    if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    return value
