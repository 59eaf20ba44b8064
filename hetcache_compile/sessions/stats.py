"""What a session has run, and how long it took: timed without waiting for the device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median

import torch

from ..plan.schedule import StepKind


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Stopwatch:
    """Starts when made; `stop` marks the end; `seconds` waits for the device only when it is read.

    It is CUDA events where there is CUDA, and the clock elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self.events = (_event(), _event())
            self.events[0].record(torch.cuda.current_stream(device))
        self.device = device
        self.start = self.end = time.perf_counter()

    def stop(self) -> Stopwatch:
        """Mark the end."""
        if self.events:
            self.events[1].record(torch.cuda.current_stream(self.device))
        self.end = time.perf_counter()
        return self

    @property
    def seconds(self) -> float:
        """Time between start and stop."""
        if self.events:
            self.events[1].synchronize()
            return float(self.events[0].elapsed_time(self.events[1])) / 1000
        return self.end - self.start


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
    branch_bytes: int = 0
    """Bytes of the largest cache of one branch that the session held."""
    record_bytes: int = 0
    """Bytes on the host that the record takes when every FULL step of the plan is done; known from the first on. Where
    experts share the steps it takes less."""
    recalled: int = 0
    """Calls that read the cache of their step from memory (`memory_of=`). They are PARTIAL."""
    shared: int = 0
    """Calls of FULL steps that read the keys and values of another one (`shared_context`). They are PARTIAL."""
    unplanned: int = 0
    """Calls that fit nothing in the plan: at a time that it does not know, or out of order. They are FULL."""

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
