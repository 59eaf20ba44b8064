"""A session: one plan at work. It decides which step a call is, and owns the caches.

A *branch* is one sequence of calls that shares a cache: `cond` and `uncond` of classifier-free guidance, for each
expert of a two-expert pipeline. Branches come from diffusers' `cache_context` names, or from `session.branch`.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from ..errors import SessionError
from ..passes.ir.contract import STEP_WEIGHTS
from ..plan.plan import Plan
from ..plan.schedule import StepKind
from .timing import Stopwatch

_SESSION: ContextVar[Session | None] = ContextVar("hetcache_session", default=None)
_BRANCH: ContextVar[str | None] = ContextVar("hetcache_branch", default=None)


def current_session() -> Session | None:
    """The session that is open in this thread or task, if any."""
    return _SESSION.get()


@dataclass
class Stats:
    """What a session has run so far."""

    kinds: list[StepKind] = field(default_factory=list)
    """The kind of each model call, in order; guidance in two calls counts two."""
    watches: list[Stopwatch] = field(default_factory=list)
    """The time of each call in the form that ran, compilation not included."""
    compile_seconds: float = 0.0
    """Seconds spent capturing, rewriting and compiling."""
    cache_bytes: int = 0
    """Bytes of all caches that the session holds."""

    @property
    def steps(self) -> dict[str, int]:
        """Model calls by step kind, in the order FULL, PARTIAL, REUSE."""
        return {kind.name: self.kinds.count(kind) for kind in StepKind}

    @property
    def seconds(self) -> dict[str, float]:
        """Median seconds of a call by step kind, for the kinds that ran."""
        by_kind: dict[StepKind, list[float]] = {}
        for kind, watch in zip(self.kinds, self.watches, strict=True):
            by_kind.setdefault(kind, []).append(watch.seconds)
        return {kind.name: median(by_kind[kind]) for kind in StepKind if kind in by_kind}

    @property
    def total_seconds(self) -> float:
        """Seconds in the model, compilation not included."""
        return sum(watch.seconds for watch in self.watches)


Remembered = tuple[tuple[torch.Tensor, int], ...]
"""Tensors of the last call, with their versions."""


@dataclass
class Branch:
    """Step counter and caches of one branch."""

    step: int = 0
    buffers: dict[Hashable, dict[str, torch.Tensor]] = field(default_factory=dict)
    filled: set[Hashable] = field(default_factory=set)
    last_call: tuple[Remembered, Remembered] | None = None


class Session:
    """Use it as a context manager; see `session`."""

    def __init__(self, plans: Plan | Sequence[Plan], *, check_finite: bool = True) -> None:
        self.plans = checked_plans(plans)
        self.check_finite = check_finite
        self.stats = Stats()
        self._branches: dict[str | None, Branch] = defaultdict(Branch)
        self._indices: dict[tuple[str, torch.device, int], torch.Tensor] = {}
        self._token: Token[Session | None] | None = None

    @property
    def plan(self) -> Plan:
        """The first plan: all agree in their steps, grid and budgets."""
        return self.plans[0]

    def __enter__(self) -> Session:
        if current_session() is not None:
            raise SessionError("a session is open already: close it before you open another")
        observe_cache_contexts()
        self._token = _SESSION.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _SESSION.reset(self._token)
        self._token = None
        self.restart()
        self._branches.clear()

    def restart(self) -> None:
        """Begin an edit anew: the next call of every branch is step 0. Buffers are kept for it."""
        for branch in self._branches.values():
            branch.step, branch.last_call = 0, None
            branch.filled.clear()

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Name the branch of the calls inside, where a hand-written loop makes several calls a step."""
        token = _BRANCH.set(name)
        try:
            yield
        finally:
            _BRANCH.reset(token)

    def next_step(
        self, cache_key: Hashable, latents: Sequence[torch.Tensor], conditions: Sequence[torch.Tensor]
    ) -> tuple[StepKind, Branch]:
        """The kind of the call that comes now, and its branch.

        A branch that has taken all steps of the plan begins the next edit. A call that finds no cache (the first
        of an expert, or of another shape) is FULL, whatever the plan says.
        """
        name = _BRANCH.get()
        branch = self._branches[name]
        if name is None:
            _check_unnamed(branch, latents, conditions)
        if branch.step >= len(self.plan.steps):
            branch.step = 0
            branch.filled.clear()
        kind = self.plan.steps[branch.step]
        return (kind if cache_key in branch.filled else StepKind.FULL), branch

    def index(
        self, name: str, device: torch.device, number: int = 0, *, kind: StepKind | None = None, step: int = 0
    ) -> torch.Tensor:
        """What a form takes of plan `number`, on a device, copied there once.

        Args:
            name: such as `active_index`; `step_weights` are those of step `step`, unless it is of another kind than
                planned.
            device: where the form runs.
            number: of the plan.
            kind: of the step.
            step: its number.
        """
        plan = self.plans[number]
        if name == STEP_WEIGHTS and plan.weights.size and kind is plan.steps[step]:
            return self._on_device("weights", device, number)[step]
        return self._on_device(name, device, number)

    def _on_device(self, name: str, device: torch.device, number: int) -> torch.Tensor:
        key = (name, device, number)
        if key not in self._indices:
            self._indices[key] = torch.as_tensor(getattr(self.plans[number], name), device=device)
        return self._indices[key]

    def count(self, kind: StepKind, watch: Stopwatch, compile_seconds: float) -> None:
        """Record one call."""
        self.stats.kinds.append(kind)
        self.stats.watches.append(watch)
        self.stats.compile_seconds += compile_seconds
        self.stats.cache_bytes = sum(
            tensor.untyped_storage().nbytes()
            for branch in self._branches.values()
            for buffers in branch.buffers.values()
            for tensor in buffers.values()
        )


def session(plan: Plan | Sequence[Plan], *, check_finite: bool = True) -> Session:
    """Open a session: inside it, models compiled with `hetcache_backend` follow the plan.

    Args:
        plan: what each step computes; or several plans, for batches whose samples have masks of their own. With P of
            them, sample i of a batch follows plan `i % P`, so that guidance may put two batches of P samples into one
            call (`torch.cat([uncond, cond])`). They must agree in grid, budgets, extrapolation and steps.
        check_finite: raise `NonFiniteError` when a FULL step gets latents with NaN or infinity (one small
            reduction and one wait for the device in each FULL step).

    Example:
        >>> with hetcache.session(plan) as session:  # doctest: +SKIP
        ...     frames = pipe(...).frames
        >>> session.stats.steps  # doctest: +SKIP
        {'FULL': 6, 'PARTIAL': 4, 'REUSE': 10}
    """
    return Session(plan, check_finite=check_finite)


def checked_plans(plans: Plan | Sequence[Plan]) -> tuple[Plan, ...]:
    """One plan or several, as a tuple.

    Raises:
        SessionError: there is none, or they need forms or steps of their own.
    """
    if isinstance(plans, Plan):
        return (plans,)
    if not plans:
        raise SessionError("a session needs at least one plan")
    first, *rest = plans
    for number, plan in enumerate(rest, start=1):
        different = first.form_options.differences(plan.form_options) or ("steps" if first.steps != plan.steps else "")
        if different:
            raise SessionError(f"the plans of a batch must be alike, but plans 0 and {number} differ in {different}")
    return tuple(plans)


def _check_unnamed(branch: Branch, latents: Sequence[torch.Tensor], conditions: Sequence[torch.Tensor]) -> None:
    """Two calls on equal latents with other conditions are one step of guidance: they must not share a cache."""
    last, branch.last_call = branch.last_call, (_remember(latents), _remember(conditions))
    if last is not None and latents and _equal(last[0], latents) and not _equal(last[1], conditions):
        raise SessionError(
            "two calls in a row got the same latents with other conditions, so they are one step of guidance: "
            "put each into `with session.branch('cond'):` and `with session.branch('uncond'):` "
            "(diffusers' cache_context does this for you)"
        )


def _remember(tensors: Sequence[torch.Tensor]) -> Remembered:
    return tuple((tensor, _version(tensor)) for tensor in tensors)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; tensors of inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _equal(known: Remembered, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether each tensor holds what the remembered one held: by identity, and only then by value.

    A loop may convert its latents for each call, so equal latents need not be one object. A remembered tensor that
    was changed since is taken for another one.
    """
    return len(known) == len(tensors) and all(
        version == _version(old) and (old is new or _same_values(old, new))
        for (old, version), new in zip(known, tensors, strict=True)
    )


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


@functools.cache
def observe_cache_contexts() -> None:
    """Let diffusers' `model.cache_context(name)` name the branch, as it does for diffusers' own caches.

    diffusers hands the name to hooks on the model only, and a hook would change the model's graph. So its context
    manager is wrapped, once: it does what it did, and sets a context variable. Models are not touched.
    """
    from diffusers.models.cache_utils import CacheMixin

    original: Callable[..., Any] = CacheMixin.cache_context

    @functools.wraps(original)
    @contextlib.contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        token = _BRANCH.set(name)
        try:
            with original(self, name, *args, **kwargs) as value:
                yield value
        finally:
            _BRANCH.reset(token)

    CacheMixin.cache_context = cache_context
