"""Recording forms, with a stand-in for the device: what a graph replays are the calls that were recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hetcache_compile.compilation import cuda_graphs
from hetcache_compile.compilation.cuda_graphs import MOST_RECORDINGS, Recorder
from hetcache_compile.compilation.options import BackendOptions


class Device:
    """Records a run as a GPU does: the memory it reads and writes stays the same, and it is run when replayed only."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.stream = 0

    def record(self, run: Callable[[], Any], device: Any, stream: Any) -> Any:
        """Outputs hold nothing yet."""
        self.recorded += 1
        caches = [tensor.clone() for tensor in CACHES]
        outputs = tuple(run())
        for tensor, before in zip(CACHES, caches, strict=True):
            tensor.copy_(before)
        for tensor in outputs:
            tensor.fill_(torch.nan)

        def replay() -> None:
            self.replayed += 1
            for tensor, value in zip(outputs, run(), strict=True):
                tensor.copy_(value)

        return replay, outputs


CACHES: list[torch.Tensor] = []


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    CACHES.clear()
    monkeypatch.setattr(cuda_graphs, "record", device.record)
    monkeypatch.setattr(cuda_graphs, "current_stream", lambda _: device.stream)
    return device


def form(latents: torch.Tensor, scale: float, weight: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Its output is computed from what the cache held; then the cache is overwritten."""
    result = latents * weight * scale + cache
    cache.copy_(latents)
    return (result,)


STAYS = (False, False, True, True)


def test_what_is_replayed_is_what_would_be_run(device: Device) -> None:
    recorder, weight = Recorder(form, STAYS, "form"), torch.full((3,), 2.0)
    mine, other = torch.zeros(3), torch.zeros(3)
    CACHES.append(mine)
    outputs = []
    for step in range(5):
        latents = torch.full((3,), float(step))  # other memory at each step
        (found,) = recorder(latents, 1.5, weight, mine)
        (expected,) = form(latents, 1.5, weight, other)
        assert torch.equal(found, expected)
        assert torch.equal(mine, other)
        outputs.append((found, expected))
    assert device.recorded == 1
    assert device.replayed == 4
    assert all(torch.equal(found, expected) for found, expected in outputs)  # no later replay overwrote one
    weight.fill_(3.0)  # in place: the recording reads it where it is
    assert torch.equal(recorder(latents, 1.5, weight, mine)[0], form(latents, 1.5, weight, other)[0])
    assert device.recorded == 1


@pytest.mark.parametrize("change", ["weight", "cache", "number", "stream"])
def test_what_is_not_copied_has_recordings_of_its_own(device: Device, change: str) -> None:
    recorder, latents = Recorder(form, STAYS, "form"), torch.ones(3)
    given: dict[str, Any] = {"number": 1.5, "weight": torch.full((3,), 2.0), "cache": torch.zeros(3)}
    changed = {"number": 2.5, "weight": torch.full((3,), 4.0), "cache": torch.ones(3)}
    others = {**given, change: changed.get(change)} if change in changed else given
    CACHES.extend([given["cache"], changed["cache"]])
    for _ in range(3):
        for stream, values in ((0, given), (int(change == "stream"), others)):
            device.stream = stream
            expected = form(latents, values["number"], values["weight"], values["cache"].clone())[0]
            assert torch.equal(recorder(latents, *values.values())[0], expected)
    assert device.recorded == 2


def test_an_expanded_input(device: Device) -> None:
    """Pipelines expand the time to a batch: its numbers are one in memory. It is another input where they are not."""
    recorder = Recorder(lambda time: (time * 2,), (False,), "form")
    for value in range(4):
        (found,) = recorder(torch.tensor([float(value)]).expand(3))
        assert found.tolist() == [2.0 * value] * 3
    assert device.recorded == 1
    for value in range(3):
        (found,) = recorder(torch.tensor([float(value), 5.0, 7.0]))
        assert found.tolist() == [2.0 * value, 10.0, 14.0]
    assert device.recorded == 2


def test_old_recordings_are_dropped(device: Device) -> None:
    recorder, weight = Recorder(form, STAYS, "form"), torch.ones(1)
    caches = [torch.zeros(1) for _ in range(MOST_RECORDINGS + 1)]
    CACHES.extend(caches)
    for cache in (*caches, *caches):
        recorder(torch.ones(1), 1.0, weight, cache)
    assert len(recorder._recordings) == MOST_RECORDINGS


def test_what_cannot_be_recorded_runs_as_it_is(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Any, device: Any, stream: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_graphs, "record", refuse)
    recorder, weight, cache = Recorder(form, STAYS, "partial form"), torch.ones(2), torch.zeros(2)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            (found,) = recorder(torch.ones(2), 1.0, weight, cache.zero_())
            assert torch.equal(found, torch.ones(2))
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph is recorded of the partial form: operation not permitted when stream is capturing"
    ]


def test_inputs_that_the_processor_reads_are_not_recorded(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """Their value would be in the recording."""
    recorder = Recorder(lambda x, time: (x.clone(),), (False, False), "form")
    for _ in range(3):
        recorder(torch.ones(2, device="meta"), torch.ones(()))
    assert not device.recorded
    assert "its inputs are on cpu, meta" in caplog.text


def test_modes_that_record() -> None:
    """Forms are still compiled block by block, and the inner compiler records nothing itself."""
    assert BackendOptions(mode="reduce-overhead").records
    assert BackendOptions(inner_options={"triton.cudagraphs": True}).records
    assert not BackendOptions().records
    assert not BackendOptions(mode="max-autotune-no-cudagraphs").records
