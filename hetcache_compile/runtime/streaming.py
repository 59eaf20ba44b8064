"""Keep a cache's keys and values in the host's memory: each comes to the GPU just ahead of the block that reads it.

Copies run on a stream of their own beside the computation. A FULL step copies out what it wrote; a PARTIAL step copies
in what it reads, and nothing out: the next one computes the same tokens anew. Weights that are in the host's memory
(`capture.offloading`) come in the same way, and are let go. A form that is compiled as a whole has everything copied in
before it runs.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch.fx import Node

from ..compilation.options import Compiled
from ..compilation.regional import Chain, Link
from ..passes.ir.cache import CacheEntry
from ..passes.ir.form import Form

AHEAD = 2
"""Regions that need something of the host whose copies are begun before the one that runs: one is copied, one waits."""


class Transfers(Protocol):
    """Copies between the host and a device."""

    def fetch(self, host: torch.Tensor, *, empty: bool) -> Any:
        """Begin to copy a tensor in, or only make room for it. What is returned goes to `ready`."""

    def ready(self, fetched: Any) -> torch.Tensor:
        """The tensor on the device, for whatever the device is given to do from now on."""

    def store(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        """Begin to copy a tensor out, after what the device was given to do until now."""


@dataclass(frozen=True)
class Use:
    """What a form does with a tensor in the host's memory.

    Attributes:
        read: whether it reads what is there.
        written: whether what it leaves there is needed.
    """

    read: bool
    written: bool


WEIGHT = Use(read=True, written=False)


def uses_of(form: Form) -> dict[int, Use]:
    """What a form in process does with keys and values, by the place of their buffers among its inputs."""
    placeholders = form.module.graph.find_nodes(op="placeholder")
    buffers = placeholders[len(placeholders) - len(form.reads) :]

    def is_store(user: Node, buffer: Node) -> bool:
        return user.target is torch.ops.aten.copy_.default and user.args[0] is buffer

    return {
        len(placeholders) - len(buffers) + number: Use(
            any(not is_store(user, node) or user.args[1] is node for user in node.users),
            form.kind == "full" and any(is_store(user, node) for user in node.users),
        )
        for number, (entry, node) in enumerate(zip(form.reads, buffers, strict=True))
        if entry.is_context
    }


class Streamed:
    """A compiled form, some of whose inputs are in the host's memory.

    Args:
        run: the form.
        hosted: what it does with these inputs, by their places.
        transfers: between host and device.
    """

    def __init__(self, run: Compiled, hosted: Mapping[int, Use], transfers: Transfers) -> None:
        self.run, self.hosted, self.transfers = run, hosted, transfers
        self.steps = schedule(run.links, self.hosted) if isinstance(run, Chain) else []

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """The outputs of the form."""
        values = list(inputs)
        if not isinstance(self.run, Chain):
            fetched = self._fetch(self.hosted, inputs)
            self._ready(self.hosted, fetched, values)
            outputs = tuple(self.run(*values))
            self._store(self.hosted, values, inputs)
            return outputs
        values += [None] * (self.run.num_values - len(values))
        fetched = {}
        for link, step in zip(self.run.links, self.steps, strict=True):
            fetched |= self._fetch(step.fetches, inputs)
            self._ready(step.needs, fetched, values)
            _run(link, values)
            self._store(step.drops, values, inputs)
        return self.run.results(values)

    def _fetch(self, places: Iterable[int], inputs: Sequence[Any]) -> dict[int, Any]:
        return {place: self.transfers.fetch(inputs[place], empty=not self.hosted[place].read) for place in places}

    def _ready(self, places: Iterable[int], fetched: dict[int, Any], values: list[Any]) -> None:
        for place in places:
            values[place] = self.transfers.ready(fetched.pop(place))

    def _store(self, places: Iterable[int], values: list[Any], inputs: Sequence[Any]) -> None:
        for place in places:
            if self.hosted[place].written:
                self.transfers.store(values[place], inputs[place])
            values[place] = None


@dataclass(frozen=True)
class Step:
    """What is copied around one link of a chain: places of inputs.

    Attributes:
        fetches: whose copies begin before it.
        needs: that have to be there, and were not until now.
        drops: that nothing needs after it.
    """

    fetches: tuple[int, ...]
    needs: tuple[int, ...]
    drops: tuple[int, ...]


def schedule(links: Sequence[Link], hosted: Collection[int]) -> list[Step]:
    """The copies around each link: those for the next `AHEAD` links that need some begin before the first of them."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, link in enumerate(links):
        for place in link.takes:
            if place in hosted:
                first.setdefault(place, number)
                last[place] = number
    waves = sorted(set(first.values()))
    begin = {number: waves[max(0, wave + 1 - AHEAD)] for wave, number in enumerate(waves)}
    return [
        Step(
            tuple(place for place, needed in first.items() if begin[needed] == number),
            tuple(place for place, needed in first.items() if needed == number),
            tuple(place for place, done in last.items() if done == number),
        )
        for number in range(len(links))
    ]


def _run(link: Link, values: list[Any]) -> None:
    for place, value in zip(link.gives, link.run(*link.take(values)), strict=True):
        values[place] = value
    for place in link.drops:
        values[place] = None


class CudaTransfers:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fetch(self, host: torch.Tensor, *, empty: bool) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """See `Transfers`. The copy waits for what was given to the GPU before: its memory may be in use until then."""
        tensor = torch.empty_like(host, device=self.device)
        if empty:
            return tensor, None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            tensor.copy_(host, non_blocking=True)
            copied = self.stream.record_event()
        tensor.record_stream(self.stream)
        return tensor, copied

    def ready(self, fetched: tuple[torch.Tensor, torch.cuda.Event | None]) -> torch.Tensor:
        """See `Transfers`."""
        tensor, copied = fetched
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        return tensor

    def store(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        """See `Transfers`. Later copies into the GPU run on the same stream, and so after it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)


_TRANSFERS: dict[torch.device, CudaTransfers] = {}
_LOCK = threading.Lock()


def transfers_of(device: torch.device) -> Transfers:
    """The transfers of a device: one stream for all, so that copies stay in order."""
    with _LOCK:
        if device not in _TRANSFERS:
            _TRANSFERS[device] = CudaTransfers(device)
        return _TRANSFERS[device]


CHUNK = 2**30
"""Bytes of one allocation on the host, at most, where more than one buffer shares it."""
ALIGNMENT = 256
SPARE = 0.1
"""The share of a device's memory that caches leave to what is computed."""


def free_bytes(device: torch.device) -> int:
    """What caches may take of the memory that nobody uses now."""
    free, total = torch.cuda.mem_get_info(device)
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept_by_torch - SPARE * total)


def can_stream(device: torch.device) -> bool:
    """Whether a device has memory of its own."""
    return device.type == "cuda"


def host_buffers(entries: Sequence[CacheEntry]) -> list[torch.Tensor]:
    """Memory on the host that a GPU can copy from while it computes, a tensor for each entry.

    Many share an allocation, since torch rounds each pinned one up to a power of two: by up to twice one by one, by a
    few percent together.
    """
    room = [-(-entry.num_bytes // ALIGNMENT) * ALIGNMENT for entry in entries]
    buffers: list[torch.Tensor] = []
    while len(buffers) < len(entries):
        first = len(buffers)
        ends = list(accumulate(room[first:]))
        count = max(1, bisect_right(ends, CHUNK))
        pinned = torch.cuda.is_available()
        chunk = torch.empty(ends[count - 1], dtype=torch.uint8, device="cpu", pin_memory=pinned)
        for entry, begin in zip(entries[first : first + count], (0, *ends), strict=False):
            numbers = chunk[begin : begin + entry.num_bytes].view(entry.dtype)
            buffers.append(numbers.view(entry.shape))
    return buffers
