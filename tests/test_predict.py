"""Cached keys and values predicted along a line in time: exact where they move on one, else the latest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from following import active_error
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.errors import PlanError, UnsupportedGraphError

GRID = (2, 2, 5)
N = 20


class Drifting(nn.Module):
    """Keys and values are polynomials of degree `degree` in the time."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv3d(3, 12, 1)
        self.query = nn.Linear(12, 12)
        self.pairs = nn.ModuleList(nn.Linear(12, 24) for _ in range(degree + 1))

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        t = timestep / 1000
        pairs = sum(pair(x) * t**power for power, pair in enumerate(self.pairs))
        k, v = pairs.unflatten(2, (2, 2, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.query(x).unflatten(2, (2, 6)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x.transpose(1, 2).unflatten(2, GRID)


def plan(order: int, steps: str = "FFP", **options) -> hetcache.Plan:
    active = np.random.default_rng(0).permutation(N) < 6
    return hetcache.Plan.from_token_mask(
        active, GRID, num_inference_steps=len(steps), schedule=list(steps), context_extrapolation=order, **options
    )


def error(
    model: nn.Module, order: int, times: list[float], steps: str, *, compiled: bool = False, inner: str = "eager"
) -> float:
    """How far the last step is off, on latents that stay."""
    latents = torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(0))
    calls = [(latents, torch.tensor([time])) for time in times]
    return active_error(model, plan(order, steps), calls, inner if compiled else None)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("times", "steps"), [([900, 800, 650], "FFP"), ([900, 800, 700, 500, 300], "FFPFP")])
def test_exact_where_keys_and_values_move_on_a_line(times: list[float], steps: str, compiled: bool) -> None:
    assert error(Drifting(1), 1, times, steps, compiled=compiled) < 1e-5
    assert error(Drifting(1), 0, times, steps, compiled=compiled) > 1e-3


def test_partial_steps_in_between_do_not_bend_the_line() -> None:
    assert error(Drifting(1), 1, [900, 800, 700, 650, 500], "FFPPP", compiled=True) < 1e-5


def test_a_second_full_step_at_the_same_time_replaces_the_first() -> None:
    for compiled in (False, True):
        assert error(Drifting(1), 1, [900, 800, 800, 650], "FFFP", compiled=compiled) < 1e-5


@pytest.mark.wide
def test_inductor_keeps_the_older_values_too() -> None:
    """It writes buffers in the order of arguments, not in that of the graph."""
    assert error(Drifting(1), 1, [900, 800, 700, 500, 300], "FFPFP", compiled=True, inner="inductor") < 1e-5


def test_not_exact_on_a_parabola() -> None:
    assert error(Drifting(2), 1, [900, 800, 500], "FFP") > 1e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("times", "steps"), [([900, 800], "FP"), ([900, 900, 800], "FFP")])
def test_without_two_full_steps_at_two_times_it_reads_the_latest(
    times: list[float], steps: str, compiled: bool
) -> None:
    predicted, latest = (error(Drifting(1), order, times, steps, compiled=compiled) for order in (1, 0))
    assert predicted == pytest.approx(latest, abs=1e-7)


def test_a_second_edit_starts_without_the_history_of_the_first() -> None:
    model, made = Drifting(1), plan(1, "FP")
    latents = torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    run = torch.compile(model, backend="hetcache", options={"inner": "eager"})
    with torch.no_grad(), hetcache.session(made):
        edits = [[run(latents, torch.tensor([time])) for time in (900.0, 600.0)] for _ in range(2)]
    torch.testing.assert_close(edits[0], edits[1], atol=0, rtol=0)


def test_it_takes_the_memory_of_keys_and_values_twice() -> None:
    latents, time = torch.randn(1, 3, *GRID), torch.tensor([900.0])
    sizes = []
    for order in (0, 1):
        forms = hetcache.rewrite(Drifting(1), plan(order), (latents, time))
        sizes.append(sum(e.num_bytes for e in forms.cache_entries if e.group == "key_values" and e.rows == "context"))
    assert sizes[1] == 2 * sizes[0]


def test_a_model_without_a_time_is_refused() -> None:
    class Timeless(Drifting):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return super().forward(latents, latents.new_ones(1))

    with pytest.raises(UnsupportedGraphError, match=r"(?s)no input is called timestep.*context_extrapolation=0"):
        hetcache.rewrite(Timeless(1), plan(1), (torch.randn(1, 3, *GRID),))


def test_a_weight_is_no_time() -> None:
    class Scaled(Drifting):
        def __init__(self) -> None:
            super().__init__(1)
            self.timestep_scale = nn.Parameter(torch.tensor([500.0]))

        def forward(self, latents: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            return super().forward(latents, level * self.timestep_scale)

    with pytest.raises(UnsupportedGraphError, match=r"(?s)no input is called timestep.*latents, level"):
        hetcache.rewrite(Scaled(), plan(1), (torch.randn(1, 3, *GRID), torch.ones(1)))


def test_wrong_orders() -> None:
    with pytest.raises(PlanError, match="context_extrapolation must be 0 or 1"):
        plan(2)
