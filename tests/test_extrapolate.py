"""Prediction of what a step does not compute: exact on polynomials, harmless where there is nothing to predict from."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.errors import PlanError

GRID = (3, 2, 5)
N = 30
TIMES = (900.0, 750.0, 640.0, 410.0, 130.0)


class PolynomialDiT(nn.Module):
    """Its output is a polynomial of degree `degree` in the time; keys and values do not depend on the time."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv3d(4, 14, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(14, 42)
        self.out = nn.ModuleList(nn.Linear(14, 16) for _ in range(degree + 1))

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 7)).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        t = timestep / 1000
        x = sum(out(x) * t**power for power, out in enumerate(self.out))
        x = x.view(1, *GRID, 4, 1, 2, 2).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.reshape(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2], generator=torch.Generator().manual_seed(seed))


def plan(order: int, steps: str = "FFFRP") -> hetcache.Plan:
    active = np.random.default_rng(0).permutation(N) < 7
    return hetcache.Plan.from_token_mask(
        active, GRID, num_inference_steps=len(steps), schedule=list(steps), extrapolation=order
    )


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@functools.cache
def forms_of(order: int, degree: int) -> hetcache.Forms:
    """Forms know nothing of a schedule, so tests share them."""
    return hetcache.rewrite(PolynomialDiT(degree), plan(order), (latents(), torch.tensor([900.0])))


@torch.no_grad()
def run_forms(order: int, degree: int, times: tuple[float, ...], steps: str) -> list[float]:
    """The error of each step of a schedule, by the functional forms."""
    model, x = PolynomialDiT(degree), latents()
    forms = forms_of(order, degree)
    cache, errors = {}, []
    for time, letter in zip(times, steps, strict=True):
        kind = {"F": "full", "P": "partial", "R": "reuse"}[letter]
        arguments = (x, torch.tensor([time]))
        output, cache = forms.run(kind, cache, arguments, {})
        errors.append(error(output, model(*arguments)))
    return errors


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("steps", ["FFFRR", "FFFPR", "FFFPP"])
def test_exact_on_polynomials_of_its_degree(order: int, steps: str) -> None:
    assert max(run_forms(order, order, TIMES, steps)) < 2e-5


@pytest.mark.parametrize("order", [0, 1])
def test_not_exact_on_polynomials_of_a_higher_degree(order: int) -> None:
    assert run_forms(order, order + 1, TIMES, "FFFRR")[-1] > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("order", [1, 2])
def test_a_double_precision_model_is_predicted_in_double_precision(order: int) -> None:
    model, x = PolynomialDiT(order).double(), latents().double()
    forms = hetcache.rewrite(model, plan(order), (x, torch.tensor([900.0], dtype=torch.float64)))
    cache: dict[str, torch.Tensor] = {}
    for time, kind in zip(TIMES, ("full", "full", "full", "partial", "reuse"), strict=True):
        arguments = (x, torch.tensor([time + 1 / 3], dtype=torch.float64))  # no float32 number
        output, cache = forms.run(kind, cache, arguments, {})
        assert output.dtype == torch.float64
        assert error(output, model(*arguments)) < 1e-13
    assert cache["past_output.0.times"].dtype == torch.float64


def test_with_one_computed_step_it_repeats() -> None:
    forms, x = forms_of(2, 1), latents()
    first, cache = forms.full(x, torch.tensor([900.0]))
    again, _ = forms.reuse(cache, x, torch.tensor([100.0]))
    torch.testing.assert_close(again, first)


def test_with_two_computed_steps_order_two_is_a_straight_line() -> None:
    assert max(run_forms(2, 1, TIMES[:3], "FFR")) < 2e-5


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_at_the_same_time_replaces_the_last_one(order: int) -> None:
    times = (900.0, 750.0, 750.0, 750.0, 410.0)
    assert max(run_forms(order, 1, times, "FFFPR")) < 2e-5


def test_order_one_goes_on_along_its_own_line() -> None:
    assert max(run_forms(1, 1, (*TIMES, 60.0, 10.0), "FFPRPPR")) < 5e-5


@torch.no_grad()
def test_inactive_rows_are_predicted_from_computed_values_only() -> None:
    """A partial step that went wrong for inactive rows must not bend what later full steps predict."""
    forms, x = forms_of(1, 2), latents()
    inactive = torch.from_numpy(plan(1).context_index)

    def kept(steps: str) -> torch.Tensor:
        cache: dict[str, torch.Tensor] = {}
        for time, letter in zip((900.0, 800.0, 700.0, 600.0), steps, strict=True):
            if letter != "-":
                kind = {"F": "full", "P": "partial"}[letter]
                _, cache = forms.run(kind, cache, (x, torch.tensor([time])), {})
        return torch.cat([cache["past_output.0"], cache["past_output.0.1"]])[:, inactive]

    torch.testing.assert_close(kept("FFPF"), kept("FF-F"))


def test_the_cache_grows_by_the_order_and_its_entries_are_named() -> None:
    names = {order: [e.input_name for e in forms_of(order, 1).cache_entries] for order in (0, 2)}
    added = [name for name in names[2] if name not in names[0]]
    assert added == ["past_output.0.1", "past_output.0.2", "past_output.0.times"]


@torch.no_grad()
def test_a_session_predicts_like_the_forms_and_forgets_between_edits() -> None:
    model = PolynomialDiT(1)
    compiled = torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": "eager"})
    steps = "FRFRP"
    with hetcache.session(plan(1, steps)) as session:
        for edit in range(2):
            x = latents(edit)
            errors = [error(compiled(x, torch.tensor([time])), model(x, torch.tensor([time]))) for time in TIMES]
            assert errors[1] > 1e-3  # one computed step: nothing to predict from, above all not the last edit
            assert max(errors[0], *errors[2:]) < 2e-5
    assert session.stats.steps == {"FULL": 4, "PARTIAL": 2, "REUSE": 4}


def test_plans_remember_the_order(tmp_path) -> None:
    made = plan(2)
    made.save(tmp_path / "a.hetplan")
    assert hetcache.Plan.load(tmp_path / "a.hetplan").extrapolation == 2
    with pytest.raises(PlanError, match="extrapolation must be 0 to 2, got 3"):
        replace(made, extrapolation=3)


def test_a_model_without_a_time_is_refused() -> None:
    class Timeless(PolynomialDiT):
        def forward(self, latents: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            return super().forward(latents, level)

    with pytest.raises(hetcache.UnsupportedGraphError, match="no input is called timestep"):
        hetcache.rewrite(Timeless(1), plan(1), (latents(), torch.tensor([1.0])))
