"""Which session and which branch a call is in, by thread and task; and what diffusers says of both."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from typing import Any, Protocol

import torch

from .notices import Notices


class OpenSession(Protocol):
    """What is known here of a `session.Session`."""

    is_open: bool
    notices: Notices

    def restart_model(self, module: torch.nn.Module) -> None:
        """The next call of one model begins an edit."""


SESSION: ContextVar[weakref.ref[Any] | None] = ContextVar("hetcache_session", default=None)
BRANCH: ContextVar[str | None] = ContextVar("hetcache_branch", default=None)
OPEN: weakref.WeakSet[Any] = weakref.WeakSet()
"""Sessions that are open in any thread or context. One that nobody holds any more is open no more."""
LOCK = threading.RLock()


def own_session() -> OpenSession | None:
    """The session that is open in this thread or task, if any."""
    reference = SESSION.get()
    session: OpenSession | None = None if reference is None else reference()
    return session if session is not None and session.is_open else None


def reset(variable: ContextVar[Any], token: Token[Any]) -> None:
    """Put a context variable back, unless a generator went on in another context, where it was never set."""
    with contextlib.suppress(ValueError):
        variable.reset(token)


_COMPILED_NO_MORE = (
    "pipe.{name} is compiled no more and runs plainly: it was compiled after pipe.enable_model_cpu_offload(), whose "
    "hooks put the model from before back at the end of an edit. Compile it first, or in its place: "
    "pipe.{name}.compile(backend=hetcache_backend)"
)


def _is_compiled_no_more(module: torch.nn.Module) -> bool:
    """Whether hooks of accelerate call the plain model in the place of the compiled one that they hang on."""
    compiled = isinstance(module, torch._dynamo.OptimizedModule) and hasattr(module, "_hf_hook")
    return compiled and not hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


@functools.cache
def observe_diffusers() -> None:
    """Let diffusers name branches, and say when an edit begins and ends, as it does for its own caches.

    diffusers tells hooks on the model only, and a hook would change the model's graph. So two methods of its
    `CacheMixin` are wrapped, once, and the one by which pipelines begin their loop over steps: an edit that was
    cancelled has had no end. They do what they did, and tell the session. Models are not touched.
    """
    from diffusers import DiffusionPipeline
    from diffusers.models.cache_utils import CacheMixin

    name_calls: Callable[..., Any] = CacheMixin.cache_context
    end_pipeline: Callable[..., Any] | None = getattr(CacheMixin, "_reset_stateful_cache", None)

    @functools.wraps(name_calls)
    @contextlib.contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        token = BRANCH.set(name)
        try:
            with name_calls(self, name, *args, **kwargs) as value:
                yield value
        finally:
            reset(BRANCH, token)

    begin_loop: Callable[..., Any] = DiffusionPipeline.progress_bar

    @functools.wraps(begin_loop)
    def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = own_session()
        if session is not None:
            for name, component in self.components.items():
                if isinstance(component, torch.nn.Module):
                    session.restart_model(component)
                    if _is_compiled_no_more(component):
                        session.notices.refused(_COMPILED_NO_MORE.format(name=name))
        return begin_loop(self, *args, **kwargs)

    DiffusionPipeline.progress_bar = progress_bar
    CacheMixin.cache_context = cache_context
    if end_pipeline is None:
        return

    @functools.wraps(end_pipeline)
    def _reset_stateful_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = own_session()
        if session is not None:
            session.restart_model(self)
        return end_pipeline(self, *args, **kwargs)

    CacheMixin._reset_stateful_cache = _reset_stateful_cache
