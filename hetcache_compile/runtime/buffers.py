"""The buffers of a branch's cache: where they lie, who lends them, and what is in them before a form runs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import NotEnoughMemoryError, is_out_of_memory
from ..passes.ir.cache import CacheEntry
from ..plan.schedule import StepKind
from ..record.record import RecordedStep
from ..sessions.branches import Branch
from ..sessions.calls import Turn
from ..sessions.session import Session
from .prepare import CompiledForm
from .streaming import can_stream, free_bytes, host_buffers


@contextmanager
def normal_mode() -> Iterator[None]:
    """Tensors made here are of no inference mode, whatever mode the call is in: later calls may be in another one."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def buffers_for(
    session: Session, form: CompiledForm, branch: Branch, owner: Hashable, number: int, device: torch.device
) -> list[torch.Tensor]:
    """The branch's cache buffers for plan `number` that a form reads or writes; allocated once for a branch."""
    held = branch.num_bytes if not branch.has_memory(owner) else 0
    memory = branch.memory(owner)
    if held:
        session.allocated(-held)
    missing = [entry for entry in form.reads if (number, entry.input_name) not in memory]
    if missing:
        branch.hosted = branch.hosted or belongs_on_host(session, missing, device)
        with normal_mode():
            made = empty_buffers(missing, device, branch.hosted)
        for entry, buffer in zip(missing, made, strict=True):
            memory[number, entry.input_name] = buffer
            session.allocated(buffer.nbytes)
        session.stats.branch_bytes = max(session.stats.branch_bytes, branch.num_bytes)
    return [memory[number, entry.input_name] for entry in form.reads]


def share(session: Session, form: CompiledForm, turn: Turn, owner: Hashable) -> None:
    """Let a branch read the keys and values of its lender in place of its own, which are given back."""
    session.begun_full(turn)
    branch, lender = turn.branch, turn.lender
    assert lender is not None
    held, lent = branch.num_bytes, lender.memory(owner)
    branch.memory(owner)
    branch.hosted = lender.hosted
    entries = [entry.input_name for entry in form.reads if entry.group == "key_values"]
    branch.lend({(p, name): lent[p, name] for p in range(len(session.plans)) for name in entries})
    session.allocated(branch.num_bytes - held)


def read_in_place(
    session: Session, form: CompiledForm, branch: Branch, owner: Hashable, recorded: RecordedStep
) -> None:
    """Let streamed steps of a branch read keys and values in the record's own memory."""
    branch.memory(owner)
    branch.hosted = True
    held, names = branch.num_bytes, [entry.input_name for entry in form.reads if entry.is_context]
    branch.lend({(0, name): recorded.tensors[name] for name in names})
    session.allocated(branch.num_bytes - held)


def belongs_on_host(session: Session, entries: Sequence[CacheEntry], device: torch.device) -> bool:
    """Whether keys and values of a branch go into the host's memory: as the plan says, or where they do not fit."""
    if session.record is not None:
        return can_stream(device)  # the record is there
    where = session.plan.cache_device
    needed = sum(entry.num_bytes for entry in entries if entry.is_context)
    if where != "auto" or not needed or not can_stream(device):
        return where == "cpu" and can_stream(device)
    free = free_bytes(device)
    if needed <= free:
        return False
    session.notices.warn(
        f"a cache of {needed / 2**30:.2g} GiB does not fit into the {max(free, 0) / 2**30:.2g} GiB that are free on "
        f"{device}, and is kept in the host's memory: each PARTIAL step copies it in. cache_dtype='int8' makes it "
        "smaller, cache_device='same' keeps it on the device"
    )
    return True


def empty_buffers(entries: Sequence[CacheEntry], device: torch.device, hosted: bool) -> list[torch.Tensor]:
    """Memory for cache entries: keys and values in the host's, if `hosted`."""
    there = iter(host_buffers([entry for entry in entries if hosted and entry.is_context]))
    return [
        next(there) if hosted and entry.is_context else torch.empty(entry.shape, dtype=entry.dtype, device=device)
        for entry in entries
    ]


def prepare_buffers(
    session: Session,
    form: CompiledForm,
    turn: Turn,
    owner: Hashable,
    device: torch.device,
    buffers: Sequence[Sequence[torch.Tensor]],
    history: Mapping[Hashable, torch.Tensor],
) -> None:
    """Put what a form reads into its buffers: what was recorded, what another branch has, or that there is nothing yet.

    Args:
        session: the open one.
        form: about to run.
        turn: of the call.
        owner: of the memory: the graph and shape.
        device: where the form runs.
        buffers: those of each plan's samples.
        history: what was lent to the branch until now, by a record or another branch.
    """
    branch, lender, is_full = turn.branch, turn.lender, turn.kind is StepKind.FULL
    if is_full:
        session.begun_full(turn)
        if session.plan.context_extrapolation and not turn.fresh:
            settle(branch, device)
            for name, tensor in history.items():  # read by `passes.prediction.predict` in this step
                branch.memory(owner)[name].copy_(tensor)
    if turn.fresh and (is_full or turn.recalls or lender is not None):
        for own in buffers:
            forget(form, own, shared=lender is not None)
    if turn.recorded is not None and turn.recalls:
        settle(branch, device)
        session.restorers[0].restore(form.reads, buffers[0], turn.recorded.tensors, branch.correction)
    if lender is not None:
        settle(branch, device)
        lent = lender.memory(owner)
        for p, own in enumerate(buffers):
            there = {entry.input_name: lent[p, entry.input_name] for entry in form.reads}
            session.restorers[p].restore(form.reads, own, there)


def settle(branch: Branch, device: torch.device) -> None:
    """Wait for copies between a device and the host, before the host itself reads or writes what is there."""
    if branch.hosted and device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(form: CompiledForm, buffers: Sequence[torch.Tensor], *, shared: bool) -> None:
    """Nothing was computed yet: entries that say so. Keys and values that are shared are another branch's."""
    for entry, buffer in zip(form.reads, buffers, strict=True):
        if entry.initial is not None and not (shared and entry.group == "key_values"):
            buffer.fill_(entry.initial)


def own_outputs(outputs: Sequence[Any], buffers: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The outputs, with a copy of any that is a view of a branch's memory: a later step overwrites that one.

    A reuse step may return such a view, where nothing but views comes after the tokens; samplers keep outputs.
    """
    cached = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    return tuple(
        value.clone() if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in cached else value
        for value in outputs
    )


@contextmanager
def told_of_memory(needed: str) -> Iterator[None]:
    """Where memory runs out, raise `NotEnoughMemoryError` that says for what."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError(
            f"there is not enough memory: {needed}. Make the plan with cache_dtype='int8', with fewer FULL steps, or "
            "without context_extrapolation"
        ) from error
