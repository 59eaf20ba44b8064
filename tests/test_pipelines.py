"""`plan_for` and sessions on diffusers' own pipelines: every row of `docs/pipelines.md`, and what `plan_for` refuses.

The rows of `QUICK` are run with all other tests, the others with `make test-wide`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import ROWS
from pipelines.row import Row
from pipelines_check import check, compile_models, plan_of, wrong_plan
from pipelines_table import JSON, TABLE, render
from verdicts import of_the_tables_diffusers

import hetcache_compile as hetcache

EXPECTED = {row["name"]: row for row in json.loads(JSON.read_text())} if JSON.exists() else {}
RUNNING = [row for row in ROWS if not row.reason]
BY_NAME = {row.name: row for row in ROWS}
QUICK = ("FluxInpaintPipeline",)
"""Those run with all other tests: with packed tokens. WanVACE has tests of its own."""


def name_of(row: Row) -> str:
    return row.name


def found(row: Row) -> dict[str, Any]:
    return without_lines(check(row).as_json())


def expected(name: str) -> dict[str, Any]:
    return without_lines(EXPECTED[name])


def without_lines(verdict: dict[str, Any]) -> dict[str, Any]:
    """Where a reason names a place in diffusers, its line is another in each version."""
    return {key: re.sub(r"\.py:\d+", ".py", value) if key == "reason" else value for key, value in verdict.items()}


@pytest.mark.wide
@pytest.mark.parametrize("row", RUNNING, ids=name_of)
def test_a_plan_has_the_tokens_of_the_call(row: Row) -> None:
    """Read from the pipeline's first model call; or refused, as the table says."""
    if EXPECTED[row.name]["result"] == "no plan":
        with pytest.raises(hetcache.HetCacheError, match=re.escape(EXPECTED[row.name]["reason"])):
            plan_of(row)
    else:
        assert not wrong_plan(row, plan_of(row))


@pytest.mark.parametrize("name", QUICK)
def test_a_pipeline(name: str) -> None:
    assert found(BY_NAME[name]) == expected(name)


@pytest.mark.wide
@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in QUICK], ids=name_of)
def test_every_pipeline(row: Row) -> None:
    assert found(row) == expected(row.name)


def test_no_pipeline_is_wrong() -> None:
    results = [row["result"] for row in EXPECTED.values()]
    assert set(results) <= {"cached", "fewer", "plain", "no plan", "broken"}
    assert results.count("cached") >= 45


@of_the_tables_diffusers
def test_the_table_is_up_to_date() -> None:
    """`python tests/pipelines_table.py` writes both; every row of `pipelines` has its row."""
    assert list(EXPECTED) == [row.name for row in ROWS]
    assert TABLE.read_text() == render(list(EXPECTED.values()))


# plan_for


def plan_for(row: Row, pipe: Any = None, **changes: Any) -> hetcache.Plan:
    arguments = {**row.call(), "output_type": "latent", "mask": row.mask, **changes}
    return hetcache.plan_for(pipe or row.build(), **arguments)


def test_planning_leaves_the_pipeline_and_generators_as_they_were() -> None:
    row = BY_NAME["FluxInpaintPipeline"]
    pipe, generator = row.build(), torch.Generator().manual_seed(3)
    compile_models(pipe)
    before, attributes, state = torch.get_rng_state(), dict(vars(pipe)), generator.get_state()
    timesteps = pipe.scheduler.timesteps.clone()
    plan_for(row, pipe, generator=generator)
    assert vars(pipe) == attributes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    assert not pipe.transformer._forward_pre_hooks


def test_a_strength_leaves_out_the_first_steps() -> None:
    row = BY_NAME["FluxInpaintPipeline"]
    whole = plan_for(row, num_inference_steps=10, strength=1.0)
    part = plan_for(row, num_inference_steps=10, strength=0.6)
    assert len(whole.steps) == 10
    assert part.timesteps.tolist() == whole.timesteps[4:].tolist()
    assert part.sigmas.tolist() == whole.sigmas[4:].tolist()


def test_context_moves_by_default_where_it_can() -> None:
    row = BY_NAME["FluxInpaintPipeline"]
    pipe = row.build()
    assert plan_for(row, pipe, margin=1, multiple=1).context_motion == 1
    for others in ({"context_motion": 0}, {"cached_ratio": 0.5}, {"merged_ratio": 0.5}, {"schedule": "paper-fast"}):
        assert plan_for(row, pipe, margin=1, multiple=1, **others).context_motion == 0


def test_packed_tokens_begin_behind_references_in_front() -> None:
    behind, front = (plan_for(BY_NAME[name]) for name in ("FluxKontextPipeline", "Flux2KleinKVPipeline"))
    assert behind.token_inputs == {"hidden_states": (1, 0)}
    assert front.token_inputs == {"hidden_states": (1, BY_NAME["Flux2KleinKVPipeline"].reference_tokens)}


def test_token_inputs_are_in_the_file(tmp_path: Any) -> None:
    plan = plan_for(BY_NAME["FluxKontextPipeline"])
    plan.save(tmp_path / "a.hetplan")
    assert hetcache.Plan.load(tmp_path / "a.hetplan").token_inputs == plan.token_inputs


@pytest.mark.parametrize("name", ["FluxFillPipeline", "StableDiffusion3InpaintPipeline"])
def test_a_mask_of_another_shape_is_noticed(name: str) -> None:
    """Portrait for landscape: of as many tokens, but others. A mask of another size and the same shape is scaled."""
    row = BY_NAME[name]
    arguments = row.call()
    arguments.pop("mask_image", None)
    given = {"mask_image": row.call()["mask_image"]}
    pipe = row.build()
    with pytest.raises(hetcache.HetCacheError, match="give the mask of the pictures that are edited"):
        hetcache.plan_for(pipe, **{**arguments, **given}, mask=row.mask.transpose(0, 2, 1), output_type="latent")
    larger = row.mask.repeat(2, axis=1).repeat(2, axis=2)
    plan = hetcache.plan_for(pipe, **{**arguments, **given}, mask=larger, output_type="latent", margin=1, multiple=1)
    assert not wrong_plan(row, plan)


def test_what_is_no_argument_is_said() -> None:
    row = BY_NAME["FluxFillPipeline"]
    with pytest.raises(hetcache.PlanError, match="'marginn' is neither an argument of FluxFillPipeline nor an option"):
        plan_for(row, marginn=1)
    with pytest.raises(hetcache.PlanError, match="does not run with these arguments"):
        plan_for(row, prompt_embeds=None)


def test_times_that_depend_on_the_call_need_its_arguments() -> None:
    """Without a prompt a plan is computed from sizes; dynamic shifting takes more."""
    pipe = BY_NAME["QwenImagePipeline"].build()
    with pytest.raises(hetcache.PlanError, match=r"depend on the call.*give its prompt"):
        hetcache.plan_for(pipe, mask=np.ones((1, 64, 64), dtype=bool), height=64, width=64)
