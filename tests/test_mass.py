"""Where generative tokens look: against softmax(QK^T) of the model's own calls, and through a calibration's file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_matrices import attention_matrices
from conftest import Captured
from models import Case
from safetensors.torch import load_file, safe_open, save_file

import hetcache_compile as hetcache
from hetcache_compile import Calibration, CalibrationError, TokenKind
from hetcache_compile.bench.calibrate import RecordedCall, attention_mass
from hetcache_compile.calibration.record import SLICES, Measured
from hetcache_compile.passes.kernels import token_choice as choose


def shares(model: torch.nn.Module, kwargs: dict[str, Any], plan: hetcache.Plan, text: int = 0) -> np.ndarray:
    """`[L, 3]` by the whole matrix of every attention, whose first `text` rows are no tokens."""
    kind, found = torch.from_numpy(plan.token_kind), []
    for matrix in attention_matrices(model, kwargs, text + plan.num_tokens):
        rows = matrix[..., text:, text:][..., kind == TokenKind.GENERATIVE, :]
        by_kind = np.array([float(rows[..., kind == k].sum()) for k in TokenKind])
        found.append(by_kind / by_kind.sum())
    return np.stack(found)


def plan_with(num_generative: int, grid: tuple[int, int, int], **options: Any) -> hetcache.Plan:
    """Generative tokens of a number that divides `NUM_QUERIES`, so that every one is asked equally often."""
    mask = np.zeros(np.prod(grid), dtype=bool)
    mask[np.random.default_rng(0).permutation(mask.size)[:num_generative]] = True
    return hetcache.Plan.from_mask(mask.reshape(grid), grid, margin=1, multiple=1, **options)


@pytest.mark.parametrize(
    "options", [{}, {"selection": "hetcache"}, {"merged_ratio": 0.5}, {"cached_ratio": 0.5}], ids=str
)
@pytest.mark.parametrize(
    "case",
    [Case("vace"), Case("vace", batch=2, config=(("vace_layers", (0,)),))],
    ids=lambda case: f"batch {case.batch}",
)
def test_it_is_that_of_the_attention_matrices(
    captured: Callable[[Case], Captured], case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else the plan asks for; in blocks of 5 queries."""
    monkeypatch.setattr(choose, "BLOCK", 5 * 2 * case.batch * case.num_tokens)
    model, plan = captured(case), plan_with(8, case.grid, **options)
    calls = [model.call(seed) for seed in range(2)]
    with torch.no_grad():
        attentions, measured, relevance = attention_mass(
            model.forms(plan), [RecordedCall((), kwargs, torch.empty(0)) for kwargs in calls]
        )
    assert sorted(attentions) == sorted(name for name, _ in model.model.named_modules() if name.endswith(".attn1"))
    assert (measured > 0).all()
    assert measured.sum(axis=1) == pytest.approx(1)
    truths = [shares(model.model, kwargs, plan) for kwargs in calls]
    assert np.abs(truths[0] - truths[1]).max() > 1e-3
    assert measured == pytest.approx(np.mean(truths, axis=0), abs=1e-6)
    assert relevance.shape == (len(attentions), SLICES)
    assert (np.diff(relevance, axis=1) <= 1e-9).all()
    inactive = measured[:, [TokenKind.MARGIN, TokenKind.CONTEXT]].sum(axis=1)
    assert (relevance.sum(axis=1) <= inactive + 1e-6).all()  # some of these are active


class Joint(torch.nn.Module):
    """Text and tokens in one attention."""

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None = None):
        x = torch.cat([text, hidden_states], 1)
        x = x + F.scaled_dot_product_attention(2 * x, x.sin(), x.cos(), attn_mask=mask)
        return x[:, text.shape[1] :]


class Linear(torch.nn.Module):
    """Attention without scores."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ (hidden_states.relu().transpose(1, 2) @ hidden_states)


def measure(model: torch.nn.Module, plan: hetcache.Plan, **kwargs: Any) -> tuple[tuple[str, ...], np.ndarray]:
    forms = hetcache.rewrite(model, plan, (), kwargs, token_inputs={"hidden_states": 1})
    return attention_mass(forms, [RecordedCall((), kwargs, torch.empty(0))])[:2]


def test_what_text_gets_is_left_out() -> None:
    plan = plan_with(4, (2, 3, 5))
    inputs = {"hidden_states": torch.randn(1, 30, 14), "text": torch.randn(1, 11, 14)}
    attentions, measured = measure(Joint(), plan, **inputs)
    assert attentions == ("",)
    assert measured == pytest.approx(shares(Joint(), inputs, plan, text=11), abs=1e-6)
    assert measured.sum(axis=1) == pytest.approx(1)


def test_attention_that_cannot_be_read() -> None:
    plan, tokens = plan_with(4, (2, 3, 5)), torch.randn(1, 30, 14)
    masked = measure(Joint(), plan, hidden_states=tokens, text=torch.randn(1, 11, 14), mask=torch.randn(1, 41, 41))
    for attentions, measured in (masked, measure(Linear(), plan, hidden_states=tokens)):
        assert attentions == ()
        assert measured.shape == (0, 3)


MASS = np.array([[[0.6, 0.2, 0.2], [0.3, 0.3, 0.4]], [[0.8, 0.2, 0.0], [0.5, 0.3, 0.2]]])
NAMES = ("blocks.0", "vace_blocks.0")


def calibration(*clips: tuple[tuple[str, ...], np.ndarray | None]) -> Calibration:
    empty = Calibration(np.array([2.0, 1.0]), np.zeros((3, 2, 2)), np.array([0]), np.array([1]), np.zeros((1, 3, 1, 1)))
    for number, (names, mass) in enumerate(clips):
        shown = np.ones((3, 2, 2)), np.ones((1, 3, 1, 1)), np.ones(3, dtype=bool)
        relevance = None if mass is None else np.outer(mass[:, 2], np.linspace(1, 0, SLICES))
        clip = Measured(*shown, attentions=names, attention_mass=mass, relevance=relevance)
        empty = empty.add(str(number), clip)
    return empty


def test_a_calibration_holds_the_mean_over_its_clips(tmp_path) -> None:
    known = calibration((NAMES, MASS[0]), (NAMES, MASS[1]), (NAMES, MASS[1]))
    assert known.attention_mass == pytest.approx((MASS[0] + 2 * MASS[1]) / 3)
    known.save(tmp_path / "a.hetcal")
    loaded = Calibration.load(tmp_path / "a.hetcal")
    assert loaded.attentions == NAMES
    assert np.array_equal(loaded.attention_mass, known.attention_mass)
    assert known.relevance == pytest.approx(np.outer(known.attention_mass[:, 2], np.linspace(1, 0, SLICES)))
    assert np.array_equal(loaded.relevance, known.relevance)
    line = "at the context for 17% of their attention: least in blocks.0 (7%), most in vace_blocks.0 (27%)"
    assert line in loaded.describe()


def test_clips_of_which_some_were_not_measured() -> None:
    """No mean over some clips that looks like one over all."""
    for clips in (
        (((), None), (NAMES, MASS[0])),
        ((NAMES, MASS[0]), ((), None)),
        ((NAMES, MASS[0]), (("x",), MASS[0][:1])),
    ):
        known = calibration(*clips)
        assert (known.attentions, known.attention_mass.shape) == ((), (0, 3))
        assert known.relevance.shape == (0, SLICES)
        assert "attention" not in known.describe()


def test_files_that_do_not_fit_together(tmp_path) -> None:
    path = tmp_path / "a.hetcal"
    calibration((NAMES, MASS[0])).save(path)
    arrays = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**arrays, "attention_mass": arrays["attention_mass"][:1].clone()}, path, metadata)
    with pytest.raises(CalibrationError, match=r"attention_mass must hold finite numbers of shape \(2, 3\)"):
        Calibration.load(path)
    save_file({**arrays, "relevance": arrays["relevance"][:1].clone()}, path, metadata)
    with pytest.raises(CalibrationError, match=rf"relevance must hold finite numbers of shape \(2, {SLICES}\)"):
        Calibration.load(path)


def test_a_file_from_before_attentions_were_cut_into_parts(tmp_path) -> None:
    path = tmp_path / "a.hetcal"
    calibration((NAMES, MASS[0])).save(path)
    arrays = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del arrays["relevance"]
    save_file(arrays, path, metadata)
    old = Calibration.load(path)
    assert (old.attentions, old.relevance.shape) == (NAMES, (0, SLICES))
