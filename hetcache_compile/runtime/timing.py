"""Time a call without waiting for the device: CUDA events where there is CUDA, the clock elsewhere."""

from __future__ import annotations

import time

import torch


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Stopwatch:
    """Starts when made; `stop` marks the end; `seconds` waits for the device only when it is read."""

    def __init__(self, device: torch.device) -> None:
        self.events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self.events = (_event(), _event())
            self.events[0].record()
        self.start = self.end = time.perf_counter()

    def stop(self) -> Stopwatch:
        """Mark the end."""
        if self.events:
            self.events[1].record()
        self.end = time.perf_counter()
        return self

    @property
    def seconds(self) -> float:
        """Time between start and stop."""
        if self.events:
            self.events[1].synchronize()
            return float(self.events[0].elapsed_time(self.events[1])) / 1000
        return self.end - self.start
