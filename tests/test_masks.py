"""Masks of every shape, really run FULL to PARTIAL: by `rewrite`, by the backend, and several of them in one batch.

Also: whatever is decided about an edit is the same each time, whatever random numbers were drawn before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backend_checks import TOLERANCE, Kwargs, N, check, compiled, max_error, run
from freezing import frozen_outputs
from models import GRID, TinyDiT, tiny_call
from safetensors.torch import load_file
from scipy.ndimage import label

import hetcache_compile as hetcache
from hetcache_compile import Forms, Plan, TokenKind
from hetcache_compile.passes.ir.contract import STRATEGIES
from hetcache_compile.plan.options import SELECTIONS
from hetcache_compile.plan.plan import ARRAYS, HEADER

pytestmark = pytest.mark.usefixtures("strict", "fresh")


def mask_of(*places: Any) -> np.ndarray:
    mask = np.zeros(GRID, dtype=bool)
    for place in places:
        mask[place] = True
    return mask


MASKS = {
    "one token": mask_of((1, 2, 3)),
    "a corner token": mask_of((2, 4, 6)),
    "several disconnected": mask_of((0, 0, 0), (1, slice(1, 3), 3), (2, 4, slice(4, 7)), (0, 4, 0)),
    "in one frame only": mask_of((1, slice(1, 4), slice(2, 5))),
    "in the first and last frame": mask_of((0, slice(2), slice(2)), (2, slice(3, 5), slice(3))),
    "all tokens": mask_of(slice(None)),
}


def plan_with(mask: str, selection: str = "uniform", **options: Any) -> Plan:
    settings = {"margin": 1, "context_ratio": 0.2, "multiple": 1, "selection": selection, **options}
    return Plan.from_mask(MASKS[mask], GRID, num_inference_steps=4, schedule=list("FPPR"), **settings)


def as_chosen(plan: Plan, cache: dict[str, torch.Tensor]) -> Plan:
    """The plan with the tokens that its full step chose, if it did."""
    active = cache.get("past_selection.active_index", torch.from_numpy(plan.active_index)).numpy()
    return replace(plan, selection="uniform", active_index=active, context_index=np.setdiff1d(np.arange(N), active))


def partial_truth(forms: Forms, cache: dict[str, torch.Tensor], old: Kwargs, new: Kwargs) -> torch.Tensor:
    """The slow way: the whole model on `new`, its inactive tokens frozen as they were on `old`."""
    (output,) = frozen_outputs(forms.program, forms.analysis, as_chosen(forms.plan, cache), old, new)
    return output


def test_the_masks_are_what_their_names_say() -> None:
    parts = {name: label(mask)[1] for name, mask in MASKS.items()}
    assert parts == dict.fromkeys(MASKS, 1) | {"several disconnected": 4, "in the first and last frame": 2}
    frames = {name: mask.any(axis=(1, 2)).tolist() for name, mask in MASKS.items()}
    assert frames["in one frame only"] == [False, True, False]
    assert frames["in the first and last frame"] == [True, False, True]
    kinds = plan_with("one token").token_kind, plan_with("all tokens").token_kind
    assert [int((kind == TokenKind.GENERATIVE).sum()) for kind in kinds] == [1, N]


@pytest.mark.parametrize("selection", [pytest.param("uniform", marks=pytest.mark.wide), "hetcache"])
@pytest.mark.parametrize("mask", MASKS)
def test_steps_after_a_full_step(mask: str, selection: str) -> None:
    """On the same inputs they are the full step; on others they are the model with its inactive tokens frozen."""
    model, plan = TinyDiT(), plan_with(mask, selection)
    old, new = tiny_call(0), tiny_call(1)
    forms = hetcache.rewrite(model, plan, (), old)
    full, cache = forms.full(**old)
    moved, after = forms.partial(cache, **new)
    check(
        [full, forms.partial(cache, **old)[0], forms.reuse(cache, **old)[0], moved, forms.reuse(after, **new)[0]],
        [model(**old)] * 3 + [partial_truth(forms, cache, old, new)] * 2,
    )
    assert max_error(moved, full) > 1000 * TOLERANCE
    with hetcache.session(plan) as session:
        check(run(compiled(model), [old, old, new, new]), [full, full, moved, moved])
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 2, "REUSE": 1}


@pytest.mark.parametrize("selection", ["uniform", "hetcache"])
def test_a_batch_of_them(selection: str) -> None:
    """One mask for each sample, with equal budgets: each is right by itself."""
    names = [name for name in MASKS if name != "all tokens"]
    model, plans = TinyDiT(), [plan_with(name, selection, margin=0, multiple=32) for name in names]
    assert {plan.num_active for plan in plans} == {32}
    old, new = tiny_call(0, batch=len(plans)), tiny_call(1, batch=len(plans))
    with hetcache.session(plans) as session:
        outputs = run(compiled(model), [old, old, new, new])
    full = model(**old)
    check(outputs[:2], [full, full])
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 2, "REUSE": 1}
    moved = []
    for sample, plan in enumerate(plans):
        before, now = ({name: value[[sample]] for name, value in call.items()} for call in (old, new))
        forms = hetcache.rewrite(model, plan, (), before)
        moved.append(partial_truth(forms, forms.full(**before)[1], before, now))
    check(outputs[2:], [torch.cat(moved)] * 2)
    assert max_error(outputs[2], full) > 1000 * TOLERANCE


def draw(seed: int) -> None:
    """Other random numbers from here on."""
    torch.manual_seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_same_inputs_give_the_same_plan(selection: str, tmp_path) -> None:
    """All that its file holds."""
    options = {} if selection in STRATEGIES else {"merged_ratio": 0.3}
    plans = []
    for seed in range(2):
        draw(seed)
        plans.append(plan_with("several disconnected", selection, **options))
        plans[-1].save(tmp_path / f"{seed}.hetplan")
    arrays = [load_file(tmp_path / f"{seed}.hetplan") for seed in range(2)]
    assert arrays[0].keys() == arrays[1].keys() == {"steps", *ARRAYS}
    assert all(torch.equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
    assert all(getattr(plans[0], name) == getattr(plans[1], name) for name in ("grid", *HEADER))
    assert bool(options) == (arrays[0]["context_cluster"].numel() > 0)


@pytest.mark.parametrize(
    "options",
    [{"selection": "attention"}, {"selection": "kmeans"}, {"selection": "hetcache"}, {"merged_ratio": 0.3}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_same_inputs_give_the_same_choice_and_the_same_centroids(options: dict[str, Any]) -> None:
    """To the bit, from two rewrites: the tokens that full steps choose, and the context they merge."""
    model, call, caches = TinyDiT(), tiny_call(0), []
    for seed in range(2):
        draw(seed)
        _, cache = hetcache.rewrite(model, plan_with("several disconnected", **options), (), call).full(**call)
        caches.append(cache)
    assert caches[0].keys() == caches[1].keys()
    assert all(torch.equal(caches[0][name], caches[1][name]) for name in caches[0])
    if "selection" in options:
        _, other = hetcache.rewrite(model, plan_with("several disconnected", **options), (), call).full(**tiny_call(1))
        name = "past_selection.active_index"
        assert not torch.equal(caches[0][name], other[name])
