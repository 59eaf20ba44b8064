"""Keep a cache's keys and values in the host's memory: each comes to the GPU just ahead of the block that reads it.

Copies run on a stream of their own beside the computation. A FULL step copies out what it wrote; a PARTIAL step copies
in what it reads, and nothing out: the next one computes the same tokens anew. A form that is compiled as a whole has
everything copied in before it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import Node

from ..compilation.options import Compiled
from ..compilation.regional import Chain, Link
from ..passes.ir.cache import CacheEntry
from ..passes.ir.form import Form

AHEAD = 2
"""Regions with cached keys and values whose copies are begun before the one that runs: one is copied, one waits."""


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
    """What a form does with a buffer of its cache.

    Attributes:
        entry: in the buffer.
        read: whether it reads what is there.
        written: whether what it leaves there is needed.
    """

    entry: CacheEntry
    read: bool
    written: bool


def is_hosted(entry: CacheEntry) -> bool:
    """Whether an entry may be in the host's memory: what each block has of its own."""
    return entry.group == "key_values" and entry.rows == "context"


def uses_of(form: Form) -> tuple[Use, ...]:
    """What a form in process does with each of its buffers, in order."""
    placeholders = form.module.graph.find_nodes(op="placeholder")
    buffers = placeholders[len(placeholders) - len(form.reads) :]

    def is_store(user: Node, buffer: Node) -> bool:
        return user.target is torch.ops.aten.copy_.default and user.args[0] is buffer

    return tuple(
        Use(
            entry,
            any(not is_store(user, node) or user.args[1] is node for user in node.users),
            form.kind == "full" and any(is_store(user, node) for user in node.users),
        )
        for entry, node in zip(form.reads, buffers, strict=True)
    )


class Streamed:
    """A compiled form, some of whose buffers are in the host's memory.

    Args:
        run: the form; its last inputs are its buffers.
        uses: of each buffer.
        transfers: between host and device.
    """

    def __init__(self, run: Compiled, uses: Sequence[Use], transfers: Transfers) -> None:
        self.run, self.uses, self.transfers = run, uses, transfers

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """The outputs of the form."""
        first = len(inputs) - len(self.uses)
        hosted = {first + number: use for number, use in enumerate(self.uses) if is_hosted(use.entry)}
        values = list(inputs)
        if not isinstance(self.run, Chain):
            fetched = {place: self._fetch(inputs[place], use) for place, use in hosted.items()}
            for place in hosted:
                values[place] = self.transfers.ready(fetched[place])
            outputs = tuple(self.run(*values))
            self._store(hosted, values, inputs)
            return outputs
        chain = self.run
        values += [None] * (chain.num_values - len(values))
        needs = [[place for place in link.takes if place in hosted] for link in chain.links]
        last = {place: number for number, places in enumerate(needs) for place in places}
        waiting: list[int] = list(dict.fromkeys(place for places in needs for place in places))
        waves = [places for places in needs if places]
        fetched, wave = {}, 0
        for number, link in enumerate(chain.links):
            if needs[number]:
                wanted = {place for places in waves[wave : wave + AHEAD] for place in places}
                wave += 1
                for place in [place for place in waiting if place in wanted]:
                    waiting.remove(place)
                    fetched[place] = self._fetch(inputs[place], hosted[place])
                for place in needs[number]:
                    if place in fetched:
                        values[place] = self.transfers.ready(fetched.pop(place))
            _run(link, values)
            done = {place: hosted[place] for place in needs[number] if last[place] == number}
            self._store(done, values, inputs)
            for place in done:
                values[place] = None
        return chain.results(values)

    def _fetch(self, host: torch.Tensor, use: Use) -> Any:
        return self.transfers.fetch(host, empty=not use.read)

    def _store(self, done: dict[int, Use], values: Sequence[Any], inputs: Sequence[Any]) -> None:
        for place, use in done.items():
            if use.written:
                self.transfers.store(values[place], inputs[place])


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


def host_buffer(entry: CacheEntry) -> torch.Tensor:
    """Memory on the host that a GPU can copy from while it computes."""
    return torch.empty(entry.shape, dtype=entry.dtype, pin_memory=torch.cuda.is_available())
