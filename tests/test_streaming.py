"""A cache in the host's memory, with a stand-in for the device: what is copied when, and that results are the same."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import check, compiled, expected, plan_of, run
from models import call as vace_call
from models import vace

import hetcache_compile as hetcache
from hetcache_compile.errors import PlanError, SessionError
from hetcache_compile.passes.ir.axis import Tokens
from hetcache_compile.passes.ir.cache import CacheEntry
from hetcache_compile.runtime import buffers, dispatch, prepare, streaming


class Device:
    """Copies like a GPU: what was fetched is there when it is ready, and what is there is counted."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.here: list[torch.Tensor] = []
        self.most = 0
        self.bytes_in = self.bytes_out = 0

    def fetch(self, host: torch.Tensor, *, empty: bool) -> torch.Tensor:
        self.log.append("room" if empty else "in")
        self.bytes_in += 0 if empty else host.nbytes
        tensor = torch.full_like(host, 77 if not host.dtype.is_floating_point else torch.nan)
        self.here.append(tensor)
        self.most = max(self.most, len(self.here))
        return tensor if empty else tensor.copy_(host)

    def ready(self, fetched: torch.Tensor) -> torch.Tensor:
        self.log.append("ready")
        return fetched

    def store(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        self.log.append("out")
        self.bytes_out += host.nbytes
        host.copy_(tensor)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    torch._dynamo.reset()  # or it finds the forms of the test before, which know another device
    for module in (buffers, dispatch, prepare):
        monkeypatch.setattr(module, "can_stream", lambda _: True)
    monkeypatch.setattr(prepare, "transfers_of", lambda _: device)
    with torch.no_grad():
        yield device


STEPS = "FPRFP"


@pytest.mark.parametrize(
    ("options", "regional"),
    [
        pytest.param({}, True, id="as computed", marks=pytest.mark.wide),
        pytest.param({"cache_dtype": "int8", "context_extrapolation": 1}, True, id="int8, predicted"),
        pytest.param({"context_motion": 1}, True, id="moving", marks=pytest.mark.wide),
        pytest.param({"cache_dtype": "fp8"}, False, id="fp8, compiled whole", marks=pytest.mark.wide),
    ],
)
def test_results_are_the_same(device: Device, options: dict[str, Any], regional: bool) -> None:
    model = vace(num_layers=3, vace_layers=(0,))
    plan = replace(plan_of(STEPS), cache_device="cpu", **options)
    calls = [vace_call(model, seed=seed) for seed in range(len(STEPS))]
    fast = torch.compile(model, backend="hetcache", options={"inner": "eager", "regional": regional})
    with hetcache.session(plan, strict=True) as session:
        outputs = run(fast, calls)
    forms = hetcache.rewrite(model, plan, (), calls[0])
    check(outputs, expected(forms, STEPS, calls))
    assert session.stats.cache_bytes == forms.buffer_bytes


@pytest.mark.wide
def test_what_is_copied(device: Device) -> None:
    """A FULL step copies out, a PARTIAL step in, a REUSE step nothing; a few blocks are there at a time."""
    model = vace(num_layers=5, vace_layers=(0,))
    plan = replace(plan_of("FPR"), cache_device="cpu")
    calls = [vace_call(model, seed=seed) for seed in range(3)]
    fast = compiled(model)
    with hetcache.session(plan, strict=True):
        logs = []
        for kwargs in calls:
            device.log.clear()
            device.here.clear()
            fast(**kwargs)
            logs.append(list(device.log))
    full, partial, reuse = logs
    attentions = 6
    assert sorted(full) == sorted(["room", "ready", "out"] * 2 * attentions)
    assert sorted(partial) == sorted(["in", "ready"] * 2 * attentions)
    assert not reuse
    # Copied ahead, and not all at once: keys and values of two blocks are under way before the first is ready.
    assert partial[:5] == ["in", "in", "in", "in", "ready"]
    assert partial.index("ready") < len(partial) - 1 - partial[::-1].index("in")
    forms = hetcache.rewrite(model, plan, (), calls[0])
    keys_and_values = sum(entry.num_bytes for entry in forms.cache_entries if entry.group == "key_values")
    all_rows = keys_and_values * plan.num_tokens // plan.num_context
    assert device.bytes_in == device.bytes_out == all_rows


@pytest.mark.wide
def test_only_what_is_needed_is_there(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block is done with is let go before later ones come."""
    alive: list[Any] = []
    most = 0
    fetch = device.fetch

    def counted(host: torch.Tensor, *, empty: bool) -> torch.Tensor:
        nonlocal most
        tensor = fetch(host, empty=empty)
        device.here.clear()
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(device, "fetch", counted)
    model = vace(num_layers=5, vace_layers=(0,))
    with hetcache.session(replace(plan_of("FP"), cache_device="cpu"), strict=True):
        run(compiled(model), [vace_call(model, seed=seed) for seed in range(2)])
    assert most <= 2 * (streaming.AHEAD + 1)


@pytest.mark.parametrize(
    ("free", "hosted"),
    [(-(10**9), True), *(pytest.param(*one, marks=pytest.mark.wide) for one in ((10**9, False), (0, True)))],
)
def test_what_does_not_fit_goes_to_the_host(
    device: Device, monkeypatch: pytest.MonkeyPatch, free: int, hosted: bool
) -> None:
    """Unasked, once said, and with the same results; only those of what fits stay on the device."""
    monkeypatch.setattr(buffers, "free_bytes", lambda _: free)
    model = vace(num_layers=2, vace_layers=(0,))
    calls = [vace_call(model, seed=seed) for seed in range(3)]
    plan = plan_of("FPF")
    with warnings.catch_warnings(record=True) as caught, hetcache.session(plan) as session:
        warnings.simplefilter("always")
        outputs = run(compiled(model), calls)
    assert session.stats.kinds == list(plan.steps)
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FPF", calls))
    said = [str(one.message) for one in caught if "does not fit" in str(one.message)]
    assert len(said) == int(hosted)
    assert bool(device.log) is hosted


@pytest.mark.wide
def test_a_second_branch_that_does_not_fit(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's cache is on the device, the second one's on the host."""
    room = iter([10**9, 0])
    monkeypatch.setattr(buffers, "free_bytes", lambda _: next(room))
    model = vace(num_layers=2, vace_layers=(0,))
    calls = {name: [vace_call(model, seed=seed) for seed in (first, first + 1)] for name, first in (("a", 0), ("b", 7))}
    fast, plan = compiled(model), plan_of("FP")
    outputs: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    with warnings.catch_warnings(), hetcache.session(plan) as session:
        warnings.simplefilter("ignore")
        for step in range(2):
            for name in outputs:
                before = len(device.log)
                with session.branch(name):
                    kwargs = {**calls[name][step], "timestep": calls["a"][step]["timestep"]}
                    outputs[name].append(fast(**kwargs)[0])
                assert (len(device.log) > before) is (name == "b")
    for name in outputs:
        given = [{**kwargs, "timestep": calls["a"][step]["timestep"]} for step, kwargs in enumerate(calls[name])]
        check(outputs[name], expected(hetcache.rewrite(model, plan, (), given[0]), "FP", given))


def test_host_buffers_share_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit into a chunk, aligned, none over another; a larger one stands alone."""
    monkeypatch.setattr(streaming, "CHUNK", 1024)
    shapes = [(3, 5), (7,), (40, 10), (2, 2), (200,)]
    types = [torch.float32, torch.int8, torch.float32, torch.bfloat16, torch.int8]
    entries = [
        CacheEntry(f"{number}.key", "context", 0, shape, dtype, "", Tokens(0))
        for number, (shape, dtype) in enumerate(zip(shapes, types, strict=True))
    ]
    buffers = streaming.host_buffers(entries)
    assert [(tuple(buffer.shape), buffer.dtype) for buffer in buffers] == list(zip(shapes, types, strict=True))
    assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == 3
    for number, buffer in enumerate(buffers):
        buffer.fill_(number)
        assert not buffer.storage_offset() * buffer.itemsize % streaming.ALIGNMENT
    assert all(bool((buffer == number).all()) for number, buffer in enumerate(buffers))
    assert streaming.host_buffers([]) == []
    with torch.device("meta"):
        assert {buffer.device.type for buffer in streaming.host_buffers(entries)} == {"cpu"}


@pytest.mark.wide
def test_where_there_is_no_other_memory_it_changes_nothing() -> None:
    model = vace(num_layers=1, vace_layers=(0,))
    plan = replace(plan_of("FP"), cache_device="cpu")
    calls = [vace_call(model, seed=seed) for seed in range(2)]
    with torch.no_grad(), hetcache.session(plan, strict=True):
        outputs = run(compiled(model), calls)
    check(outputs, expected(hetcache.rewrite(model, plan, (), calls[0]), "FP", calls))


def test_a_plan_keeps_it(tmp_path: Any) -> None:
    plan = replace(plan_of("FP"), cache_device="cpu", cache_dtype="int8")
    plan.save(tmp_path / "a.hetplan")
    assert hetcache.Plan.load(tmp_path / "a.hetplan").cache_device == "cpu"
    assert "cached as int8 in the host's memory" in plan.describe()
    with pytest.raises(PlanError, match="cache_device must be one of auto, same, cpu, got 'disk'"):
        replace(plan, cache_device="disk")
    with pytest.raises(PlanError, match="cache_device must be a name, got 1"):
        hetcache.Plan.from_mask(np.ones((1, 2, 2), dtype=bool), (1, 2, 2), cache_device=1)
    with pytest.raises(SessionError, match="differ in cache_device"):
        hetcache.session([plan, replace(plan, cache_device="same")])
