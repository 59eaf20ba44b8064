"""Record what a form launches on a GPU, and replay it: one launch in place of thousands.

A small PARTIAL step is done sooner than a processor can launch its kernels. Inductor records CUDA graphs of what it
compiles as a whole; here the chain of a form's regions is recorded, so that blocks are still compiled once.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .options import Compiled

log = logging.getLogger(__name__)
MOST_RECORDINGS = 16
"""Recordings kept of one form, one for each set of addresses: branches of guidance have caches of their own."""
_STREAMS: dict[torch.device, Any] = {}
"""That things are recorded on, by device."""
_POOLS: dict[Hashable, torch.cuda.CUDAGraph] = {}
"""Graphs whose memory the others share, by device and stream: replays on one stream take turns. They are kept, since a
pool ends with the last graph in it."""
_LOCK = threading.Lock()
_address = torch.Tensor.data_ptr


@dataclass(frozen=True)
class Recording:
    """What one run launched.

    Attributes:
        replay: runs it again.
        inputs: memory that it reads, to be filled before.
        outputs: memory that it writes; the next recording that is replayed may overwrite it.
    """

    replay: Callable[[], None]
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[Any, ...]


class Recorder:
    """A compiled form that is recorded at its second call, and replayed from then on.

    Weights and caches are read and overwritten where they are, so there is a recording for each set of addresses; other
    tensors are copied to the recording's own. The first call at such a set runs as it is: kernels are loaded and tuned.

    Args:
        run: takes tensors, all on one GPU, and Python values; its outputs are a flat tuple.
        stays: which inputs are weights or caches.
        name: for the log.
    """

    def __init__(self, run: Compiled, stays: Sequence[bool], name: str) -> None:
        self._run, self._name = run, name
        self._stays = [number for number, yes in enumerate(stays) if yes]
        self._others = [number for number, yes in enumerate(stays) if not yes]
        self._tensors: list[int] | None = None
        self._device: torch.device | None = None
        self._recordings: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self._given_up = False

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """The outputs of the form, in memory of their own."""
        if self._given_up or self._cannot_be_recorded(inputs):
            return tuple(self._run(*inputs))
        assert self._tensors is not None
        assert self._device is not None
        stream = current_stream(self._device)
        with _LOCK:
            key = (
                stream,
                *(_key(inputs[number]) for number in self._keyed),
                *(inputs[number].stride() for number in self._tensors),
            )
            if key not in self._recordings:
                self._recordings[key] = None
                while len(self._recordings) > MOST_RECORDINGS:
                    self._recordings.popitem(last=False)
                return tuple(self._run(*inputs))
            self._recordings.move_to_end(key)
            recording = self._recordings[key]
            if recording is None:
                try:
                    recording = self._recordings[key] = self._record(inputs, self._device, stream)
                except RuntimeError as error:
                    self._give_up(str(error))
                    return tuple(self._run(*inputs))
            for held, number in zip(recording.inputs, self._tensors, strict=True):
                held.copy_(_once(inputs[number]))
            recording.replay()
            return tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in recording.outputs)

    def _cannot_be_recorded(self, inputs: Sequence[Any]) -> bool:
        """Look at what kinds of inputs there are, once: those of a form never change."""
        if self._tensors is None:
            self._tensors = [number for number in self._others if isinstance(inputs[number], torch.Tensor)]
            self._keyed = [number for number in range(len(inputs)) if number not in self._tensors]
            devices = {value.device for value in inputs if isinstance(value, torch.Tensor)}
            self._device = next(iter(devices), None)
            if len(devices) != 1:
                # What the processor reads when it launches would be in the recording as it was.
                self._give_up(f"its inputs are on {', '.join(sorted(map(str, devices)))}")
        return self._given_up

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self._recordings.clear()
        log.warning("no CUDA graph is recorded of the %s: %s", self._name, reason.splitlines()[0])

    def _record(self, inputs: Sequence[Any], device: torch.device, stream: Hashable) -> Recording:
        assert self._tensors is not None
        given, held = list(inputs), []
        for number in self._tensors:
            value = inputs[number]
            once = _once(value)
            own = torch.empty_strided(once.shape, once.stride(), dtype=value.dtype, device=value.device)
            held.append(own.copy_(once))
            given[number] = own.expand(value.shape)
        run = self._run
        replay, outputs = record(lambda: run(*given), device, stream)
        return Recording(replay, tuple(held), outputs)


def current_stream(device: torch.device) -> Hashable:
    """The device and stream that kernels for a device are launched on now."""
    return device, torch.accelerator.current_stream(device).stream_id


def _once(value: torch.Tensor) -> torch.Tensor:
    """A tensor without the repeats of what was expanded: these are one number in memory."""
    return value[tuple(slice(0, 1) if not stride else slice(None) for stride in value.stride())]


def _key(value: Any) -> Hashable:
    return _address(value) if isinstance(value, torch.Tensor) else value


def record(
    run: Callable[[], Sequence[Any]], device: torch.device, stream: Hashable
) -> tuple[Callable[[], None], tuple[Any, ...]]:
    """What replays a run, and the memory that its outputs will be in. It is recorded, not run.

    Args:
        run: launches kernels on the device.
        device: which need not be the current one.
        stream: of `current_stream`: those who replay on one share memory.

    Raises:
        RuntimeError: it does what cannot be recorded, such as waiting for the device.
    """
    with torch.cuda.device(device):
        if device not in _STREAMS:  # torch's own stream for this is that of the first device which records
            _STREAMS[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if stream not in _POOLS:
            _POOLS[stream], _ = _capture(lambda: (torch.zeros((), device=device),), device, None)
        graph, outputs = _capture(run, device, _POOLS[stream].pool())
    return graph.replay, outputs


def _capture(
    run: Callable[[], Sequence[Any]], device: torch.device, pool: Any
) -> tuple[torch.cuda.CUDAGraph, tuple[Any, ...]]:
    graph = torch.cuda.CUDAGraph()
    # Another thread may allocate meanwhile: that is no fault of this one.
    with torch.cuda.graph(graph, pool=pool, stream=_STREAMS[device], capture_error_mode="thread_local"):
        outputs = tuple(run())
    return graph, outputs
