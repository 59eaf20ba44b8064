"""The drift study's functions, against brute force and hand-made cases."""

from __future__ import annotations

import json

import drift
import drift_measures as measures
import drift_page
import models
import numpy as np
import pytest
import torch

KIND = np.array([0, 2, 1, 2, 2, 0, 2, 2, 1, 2, 2], dtype=np.uint8)
CONTEXT = np.flatnonzero(KIND == 2)
DISTANCE = np.array([0, 5, 1, 3, 4, 0, 9, 8, 2, 7, 6], dtype=np.float64)


def test_change_is_averaged_over_the_tokens_of_a_kind():
    before = torch.tensor([[3.0, 4.0], [0.0, 2.0], [6.0, 8.0]])
    now = torch.tensor([[3.0, 4.0], [0.0, 1.0], [3.0, 4.0]])
    change = measures.relative_error(before, now)
    assert change.tolist() == [0, 1, 1]
    kinds = np.array([0, 0, 2], dtype=np.uint8)
    np.testing.assert_array_equal(measures.mean_by_kind(change, kinds), [0.5, np.nan, 1])


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_key_mass_against_the_whole_attention_matrix(chunk):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 11, 5, generator=generator) * 2
    rows = torch.tensor([0, 2, 3, 7, 8, 9, 10])
    whole = torch.softmax(query @ key.transpose(1, 2) / 5**0.5, dim=-1)
    mass = measures.key_mass(query, key, rows, chunk)
    np.testing.assert_allclose(mass, whole[:, rows].mean(dim=(0, 1)), atol=1e-6)
    assert mass.sum() == pytest.approx(1)


def test_mass_held_against_brute_force():
    mass = np.random.default_rng(0).random(KIND.size)
    ranking = measures.rank(mass, CONTEXT)
    held = measures.mass_held(mass, ranking, [0.01, 0.3, 1])
    largest = np.sort(mass[CONTEXT])[::-1] / mass[CONTEXT].sum()
    np.testing.assert_allclose(held, [largest[:1].sum(), largest[:2].sum(), 1])


def attention(mass: np.ndarray) -> dict[str, np.ndarray]:
    return measures.attention_measures(mass, KIND, DISTANCE, [0.3, 1.0], 0.3, [1, 2])


def test_attention_that_does_not_move():
    mass = np.random.default_rng(1).random((1, 1, KIND.size)).repeat(3, axis=0).astype(np.float32)
    mass /= mass.sum(axis=-1, keepdims=True)
    result = attention(mass)
    np.testing.assert_allclose(result["mass"][0, 0], [mass[0, 0, k == KIND].sum() for k in range(3)], rtol=1e-6)
    np.testing.assert_array_equal(result["overlap"][:, 0], [[np.nan, 1, 1]] * 2)
    np.testing.assert_array_equal(result["overlap"][:, 1], [[np.nan, np.nan, 1]] * 2)
    np.testing.assert_allclose(result["stale"][0, 1:], result["shared_curve"][1:, 0])
    np.testing.assert_allclose(result["shared_curve"][0], result["curve"][0])
    two_nearest = mass[0, 0, [3, 4]].sum() / mass[0, 0, CONTEXT].sum()
    np.testing.assert_allclose(result["nearest_curve"][0], [two_nearest, 1], rtol=1e-6)


def test_attention_that_moves_to_other_tokens():
    mass = np.full((2, 1, KIND.size), 0.01, dtype=np.float32)
    mass[0, 0, [1, 3]] = 1
    mass[1, 0, [3, 4]] = 1
    result = attention(mass)
    np.testing.assert_array_equal(result["overlap"][:, 0, 1], [0.5, 0.5])
    assert result["stale"][0, 1] == pytest.approx(1.01 / 2.05, rel=1e-5)


def test_one_ranking_for_all_blocks_follows_their_mean():
    mass = np.full((1, 2, KIND.size), 0.01, dtype=np.float32)
    mass[0, 0, [1, 3, 4]] = [0.9, 0.5, 0.1]
    mass[0, 1, [1, 3, 4]] = [0.1, 0.5, 0.9]
    result = attention(mass)
    best_two, rest = np.array([0.9 + 0.1, 0.1 + 0.9]), 1.5 + 0.04
    np.testing.assert_allclose(result["shared_curve"][0, 0], (best_two / rest).mean(), rtol=1e-6)
    np.testing.assert_allclose(result["curve"][:, 0], 1.4 / rest, rtol=1e-6)


@pytest.mark.parametrize("order", measures.ORDERS)
def test_extrapolation_is_exact_up_to_its_degree(order):
    times, at = [0.9, 0.7, 0.65][: order + 1], 0.31

    def polynomial(degree: int, time: float) -> torch.Tensor:
        return torch.tensor([1.0, -3.0]) + 2 * time**degree

    for degree in (order, order + 1):
        guess = measures.extrapolate([polynomial(degree, time) for time in times], times, at)
        assert torch.allclose(guess, polynomial(degree, at), atol=1e-5) == (degree == order)


def test_prediction_runs_along_sigma_with_its_gap():
    sigmas = np.array([1.0, 0.95, 0.85, 0.7, 0.5, 0.2, 0.05])
    outputs = np.tile((3 + sigmas**2).astype(np.float32)[:, None, None], (1, KIND.size, 2))
    result = measures.prediction_errors(outputs, sigmas, KIND, [1, 2])
    errors = result["prediction"]
    assert np.isnan(errors[:, 1, 2, :6]).all()
    assert errors[0, 0, 2, 3:].max() < 1e-5
    assert errors[0, 1, 2, 6].max() < 1e-5
    assert errors[1, 0, 2, 5].min() > 1e-3
    repeated = abs(outputs[4, 0, 0] - outputs[6, 0, 0]) / outputs[6, 0, 0]
    np.testing.assert_allclose(errors[0, 1, 0, 6], repeated, rtol=1e-5)
    moved = 0.05 * abs(outputs[4, 0, 0] - outputs[6, 0, 0])
    np.testing.assert_allclose(result["latent_error"][1, 0, 6], moved, rtol=1e-5)


def test_tokens_of_an_output():
    video = torch.randn(1, 5, 3, 10, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drift.to_tokens(video, models.PATCH), models.to_tokens(video)[0])


@torch.no_grad()
def test_recorder_sees_every_block_and_moves_with_the_inputs():
    model = models.vace()
    kind = np.array([token % 3 for token in range(models.NUM_TOKENS)], dtype=np.uint8)
    recorder = drift.Recorder(kind, list(drift.named_blocks(model)), np.array([1.0, 0.7, 0.4]))
    expected = []
    with drift.recording(model, recorder):
        for seed in (0, 0, 1):
            expected.append(model(**models.call(model, seed=seed))[0])
    lag = dict(zip(drift.LAGS, np.moveaxis(recorder.change, 2, 0), strict=True))
    assert np.isnan(lag[1][:, :, 0]).all()
    assert (lag[1][:, :, 1] == 0).all()
    assert (lag[1][:, :, 2] > 0.01).all()
    np.testing.assert_array_equal(lag[2][:, :, 2], lag[1][:, :, 2])
    np.testing.assert_allclose(recorder.line[:, :, 0, 2], lag[1][1:3, :, 2], rtol=1e-5)
    np.testing.assert_allclose(recorder.mass.sum(axis=-1), 1, rtol=1e-5)
    assert torch.equal(recorder.outputs[2], models.to_tokens(expected[2])[0])
    assert torch.equal(model(**models.call(model, seed=1))[0], expected[2])
    assert len(recorder.outputs) == 3


def test_means_leave_out_what_is_not_known():
    array = np.array([[1, np.nan, np.nan], [3, 5, np.nan]])
    np.testing.assert_array_equal(drift.known_mean(array, 0), [2, 5, np.nan])
    assert drift.rounded(np.array([[0.012345, np.nan]])) == [[0.0123, None]]


def test_figures_of_the_page_are_those_of_the_result():
    page = (drift_page.DOCS / "drift.md").read_text()
    assert drift_page.fill(page, drift_page.figures(drift_page.Study(json.loads(drift.RESULT.read_text())))) == page


def test_page_refuses_a_marker_without_a_figure():
    page = "a <!-- v:known -->old<!-- / --> and"
    assert drift_page.fill(page, {"known": "new"}) == "a <!-- v:known -->new<!-- / --> and"
    with pytest.raises(AssertionError, match="known"):
        drift_page.fill(page, {"other": "new"})
