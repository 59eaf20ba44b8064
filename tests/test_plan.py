"""Masks to token grids, partitions, budgets, schedules, and the plan file: against brute force and bad input."""

from __future__ import annotations

import json
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from models import wan
from safetensors.torch import load_file, save_file

from hetcache_compile import PRESETS, MaskError, Plan, PlanError, PlanFileError, StepKind, TokenKind
from hetcache_compile.plan.partition import choose_active, choose_context, classify, to_token_grid
from hetcache_compile.plan.schedule import make_schedule, threshold_schedule, time_distances

GRID = (3, 5, 7)
RANDOM = np.random.default_rng(0)


def pixel_mask(frames, block, share=0.01):
    return RANDOM.random((frames, GRID[1] * block, GRID[2] * block)) < share


@pytest.mark.parametrize(("patch", "references"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)])
def test_a_token_is_masked_when_any_pixel_it_covers_is(patch, references):
    """Read the layout pixel by pixel: frame 0 is latent 0, frame f is latent 1 + (f - 1) // 4."""
    latents = GRID[0] * patch - references
    mask = pixel_mask(1 + 4 * (latents - 1), block=6)
    expected = np.zeros(GRID, dtype=bool)
    for frame, y, x in zip(*np.nonzero(mask), strict=True):
        latent = references + (0 if frame == 0 else 1 + (frame - 1) // 4)
        expected[latent // patch, y // 6, x // 6] = True
    assert 0 < expected.sum() < expected.size
    actual = to_token_grid(mask, GRID, temporal_patch=patch, reference_frames=references)
    assert np.array_equal(actual, expected)


def test_every_kind_of_mask_is_read_alike():
    mask = RANDOM.random(GRID) < 0.5
    for same in (mask, mask.astype(np.float32), mask.astype(np.uint8), torch.from_numpy(mask), mask.tolist()):
        assert np.array_equal(to_token_grid(same, GRID), mask)
    assert not to_token_grid(np.full(GRID, 0.5), GRID).any(), "0.5 itself is not masked, as in diffusers"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros(7), "must be \\[frames, height, width\\]"),
        (np.zeros((3, 5, 8)), "does not fit the token grid"),
        (np.zeros((8, 10, 14)), "9 frames"),
        (np.full(GRID, np.nan), "finite"),
        (np.full(GRID, 3), "the value 3, which may be labels or shades"),
        (np.full(GRID, -0.1), "between 0 and 1"),
        (np.full(GRID, "a"), "finite numbers"),
        (np.zeros(GRID, dtype=bool), "empty"),
    ],
)
def test_masks_that_are_no_masks(mask, message):
    with pytest.raises(MaskError, match=message):
        Plan.from_mask(mask, GRID)


def test_distances_and_margin_by_brute_force():
    generative = RANDOM.random(GRID) < 0.05
    kind, distance = classify(generative, margin=1.5)
    masked = np.argwhere(generative)
    for number, token in enumerate(product(*map(range, GRID))):
        expected = np.sqrt(((masked - token) ** 2).sum(axis=1)).min()
        assert distance[number] == pytest.approx(expected)
        of_kind = TokenKind.GENERATIVE if expected == 0 else TokenKind.MARGIN if expected <= 1.5 else TokenKind.CONTEXT
        assert kind[number] == of_kind


@pytest.mark.parametrize("multiple", [1, 8, 32, 1000])
def test_budgets_are_filled_with_the_nearest_tokens_never_with_padding(multiple):
    kind, distance = classify(RANDOM.random(GRID) < 0.05, margin=1.0)
    arguments = {"margin_ratio": 0.5, "context_ratio": 0.1}
    wanted = choose_active(kind, distance, multiple=1, **arguments)
    active = choose_active(kind, distance, multiple=multiple, **arguments)
    assert active.size == min(-(-wanted.size // multiple) * multiple, kind.size)
    assert set(wanted) <= set(active)
    assert set(np.flatnonzero(kind == TokenKind.GENERATIVE)) <= set(active)
    assert (np.diff(active) > 0).all()
    promoted, left = sorted(set(active) - set(wanted)), sorted(set(range(kind.size)) - set(active))
    if promoted and left:
        assert distance[promoted].max() <= distance[left].min()


def test_shares_of_margin_and_context():
    kind, distance = classify(RANDOM.random(GRID) < 0.05, margin=1.0)
    count = {k: (kind == k).sum() for k in TokenKind}
    active = choose_active(kind, distance, margin_ratio=0.5, context_ratio=0.25, multiple=1)
    chosen = {k: (kind[active] == k).sum() for k in TokenKind}
    assert chosen[TokenKind.GENERATIVE] == count[TokenKind.GENERATIVE]
    assert chosen[TokenKind.MARGIN] == round(0.5 * count[TokenKind.MARGIN])
    assert chosen[TokenKind.CONTEXT] == round(0.25 * count[TokenKind.CONTEXT])
    of_context = distance[active][kind[active] == TokenKind.CONTEXT]
    assert of_context.max() > np.median(distance[kind == TokenKind.CONTEXT]), "spread, not only the nearest"


def test_context_is_what_is_not_active_nearest_first():
    kind, distance = classify(RANDOM.random(GRID) < 0.05, margin=1.0)
    active = choose_active(kind, distance, margin_ratio=1, context_ratio=0, multiple=1)
    everything = choose_context(active, distance, cached_ratio=1)
    assert sorted([*active, *everything]) == list(range(kind.size))
    some = choose_context(active, distance, cached_ratio=0.3)
    assert some.size == round(0.3 * everything.size)
    assert distance[some].max() <= distance[np.setdiff1d(everything, some)].min()


def test_a_full_mask_makes_every_token_active():
    plan = Plan.from_mask(np.ones(GRID, dtype=bool), GRID)
    assert (plan.num_active, plan.num_context) == (plan.num_tokens, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"margin_ratio": 1.1}, {"context_ratio": -0.1}, {"cached_ratio": 2}, {"multiple": -1},
        {"num_inference_steps": 0}, {"schedule": "warp"}, {"schedule": "PF"}, {"schedule": ["F", "P"]},
        {"schedule": "teacache:0.1"}, {"schedule": ["F", "X"], "num_inference_steps": 2},
    ],
)  # fmt: skip
def test_arguments_out_of_range(arguments):
    mask = np.zeros(GRID, dtype=bool)
    mask[0, 0, 0] = True
    with pytest.raises(PlanError):
        Plan.from_mask(mask, GRID, **arguments)


def test_plans_that_contradict_themselves():
    kinds = np.zeros(6, dtype=np.uint8)
    full = (StepKind.FULL,)
    good = {"grid": (1, 2, 3), "active_index": np.array([1, 2]), "context_index": np.array([0]), "token_kind": kinds}
    assert Plan(**good, steps=full).num_active == 2
    for change in (
        {"grid": (2, 3)}, {"grid": (1, 1, 1)}, {"active_index": np.array([], dtype=np.int64)},
        {"active_index": np.array([2, 1])}, {"active_index": np.array([0, 1])}, {"active_index": np.array([1, 6])},
        {"active_index": np.array([-1, 1])}, {"token_kind": kinds[:5]}, {"token_kind": kinds + 3}, {"steps": ()},
        {"steps": (StepKind.REUSE,)},
    ):  # fmt: skip
        with pytest.raises(PlanError):
            Plan(**{**good, "steps": full, **change})


def test_presets_cycle_and_end_full():
    for name in ("full", "quality", "balanced", "fast"):
        kinds = "".join(kind.letter for kind in make_schedule(name, 20))
        assert kinds == ((PRESETS[name].schedule * 20)[:19] + "F")
    assert [k.letter for k in make_schedule("FRP", 6)] == list("FRPFRF")
    assert make_schedule(["FULL", "r", StepKind.PARTIAL], 3) == (StepKind.FULL, StepKind.REUSE, StepKind.PARTIAL)


def test_the_threshold_rule_by_hand():
    """d = 1: below 1 is REUSE, from 1 to 1.5 PARTIAL, above FULL; a computed step resets the sum."""
    distances = np.array([0.0, 0.6, 0.5, 0.9, 0.7, 0.4, 0.5, 2.0, 0.1, 0.1])
    assert "".join(k.letter for k in threshold_schedule(distances, 1.0)) == "FRPRFRRFRF"
    with pytest.raises(PlanError, match="positive"):
        threshold_schedule(distances, 0)
    assert {k.letter for k in make_schedule("teacache:100", 10, distances)[1:-1]} == {"R"}


def test_time_distances_are_those_of_the_models_own_embedding():
    model = wan()
    timesteps = torch.tensor([999.0, 700.0, 300.0, 10.0])
    embedder = model.condition_embedder
    with torch.no_grad():
        states = embedder.time_embedder(embedder.timesteps_proj(timesteps))
    expected = [0.0] + [
        float((after - before).abs().mean() / before.abs().mean()) for before, after in pairwise(states)
    ]
    assert time_distances(model, timesteps) == pytest.approx(expected, rel=1e-5)
    doubled = time_distances(model, timesteps, coefficients=(2.0, 1.0))
    assert doubled[1:] == pytest.approx(2 * np.array(expected[1:]) + 1, rel=1e-5)
    with pytest.raises(PlanError, match="Linear has no Timesteps"):
        time_distances(torch.nn.Linear(1, 1), timesteps)
    with pytest.raises(PlanError, match="nowhere while it is offloaded"):
        time_distances(model.to("meta"), timesteps)


@pytest.fixture
def plan():
    return Plan.from_mask(RANDOM.random(GRID) < 0.2, GRID, num_inference_steps=9, cached_ratio=0.5, multiple=4)


def test_a_plan_survives_saving_and_loading(plan, tmp_path):
    plan.save(tmp_path / "folder" / "a.hetplan")
    loaded = Plan.load(tmp_path / "folder" / "a.hetplan")
    for name in ("active_index", "context_index", "token_kind", "timesteps", "distances"):
        assert np.array_equal(getattr(loaded, name), getattr(plan, name))
        assert getattr(loaded, name).dtype == getattr(plan, name).dtype
    assert (loaded.grid, loaded.steps, loaded.schedule) == (plan.grid, plan.steps, plan.schedule)
    assert loaded.describe() == plan.describe()


def test_files_that_are_no_plans(plan, tmp_path):
    path = tmp_path / "a.hetplan"
    plan.save(path)
    whole = path.read_bytes()

    def damaged(change):
        arrays = load_file(path)
        metadata = {"format": "hetplan", "schema_version": "1", "plan": json.dumps({"grid": GRID, "schedule": "x"})}
        change(arrays, metadata)
        save_file(arrays, tmp_path / "b.hetplan", metadata=metadata)
        return (tmp_path / "b.hetplan").read_bytes()

    cases = {
        "cut short": whole[: len(whole) // 2],
        "header cut": whole[:5],
        "empty": b"",
        "header overwritten": b"\xff" * 16 + whole[16:],
        "other format": damaged(lambda a, m: m.update(format="model")),
        "other schema": damaged(lambda a, m: m.update(schema_version="2")),
        "no header": damaged(lambda a, m: m.pop("plan")),
        "no array": damaged(lambda a, m: a.pop("active_index")),
        "unsorted": damaged(lambda a, m: a.update(active_index=a["active_index"].flip(0))),
        "unknown step": damaged(lambda a, m: a.update(steps=a["steps"] + 7)),
        "other grid": damaged(lambda a, m: m.update(plan=json.dumps({"grid": [2, 5, 7], "schedule": "x"}))),
    }
    bad = tmp_path / "bad.hetplan"
    for name, content in cases.items():
        bad.write_bytes(content)
        with pytest.raises(PlanFileError, match=r"bad\.hetplan"):
            raise AssertionError(f"{name} was read: {Plan.load(bad)}")
    with pytest.raises(PlanFileError, match="no plan at"):
        Plan.load(tmp_path / "missing.hetplan")


def test_one_plan_is_the_same_bytes(plan, tmp_path):
    """safetensors itself writes metadata in any order."""
    contents = set()
    for number in range(8):
        plan.save(tmp_path / f"{number}.hetplan")
        contents.add((tmp_path / f"{number}.hetplan").read_bytes())
    assert len(contents) == 1


def test_a_save_that_fails_leaves_what_was_there(plan, tmp_path, monkeypatch):
    path = tmp_path / "a.hetplan"
    plan.save(path)
    before = path.read_bytes()

    def fail(arrays, file, metadata):
        save_file(arrays, file, metadata=metadata)
        raise OSError("disk full")

    monkeypatch.setattr("hetcache_compile.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        plan.with_schedule("full").save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.hetplan"]
