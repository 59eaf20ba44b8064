"""How large a cache is, known before anything is compiled; and plans whose cache fits what there is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Captured
from models import GRID, Case
from pipelines import ROWS
from pipelines.row import Row
from pipelines_check import compile_models, mixed
from pipelines_table import JSON
from test_optimal import STEPS, VARIANTS, with_variants

import hetcache_compile as hetcache
from hetcache_compile import Plan
from hetcache_compile.errors import PlanError
from hetcache_compile.passes.forms.pipeline import cache_of, in_process, write_form
from hetcache_compile.pipelines.call import planned_call
from hetcache_compile.pipelines.memory import SMALLER, Footprint
from hetcache_compile.pipelines.observe import count_calls
from hetcache_compile.pipelines.planning import _plan_for, smaller_choices
from hetcache_compile.plan.cache_size import CacheSize, format_bytes, parse_bytes

BY_NAME = {row.name: row for row in ROWS}
EXPECTED = {row["name"]: row for row in json.loads(JSON.read_text())}
UNCOUNTED = ("Flux2KleinKVPipeline",)
"""Cached, but the model's calls return an object that torch.export does not know."""
VACE, WAN = Case("vace"), Case("wan", batch=2, time_per_token=True)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"cached_ratio": 0.5, "extrapolation": 2},
    {"cache_dtype": "int8", "context_extrapolation": 1, "extrapolation": 1},
    {"cache_dtype": "bf16", "cached_ratio": 0.7, "context_extrapolation": 1},
    {"merged_ratio": 0.4, "cache_dtype": "fp8"},
    {"merged_ratio": 0.4, "merging": "kmeans", "extrapolation": 1},
    {"selection": "attention", "extrapolation": 1},
]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def some_mask() -> np.ndarray:
    mask = np.zeros(GRID, dtype=bool)
    mask[:, 1:3, 2:4] = True
    return mask


def plan_of(row: Row, pipe: Any = None, guided: bool = False, **changes: Any) -> Plan:
    arguments = {**row.call(), **(row.guided if guided else {}), "output_type": "latent", "margin": 1, "multiple": 1}
    return hetcache.plan_for(pipe or row.build(), **{"mask": row.mask, **arguments, "schedule": "full", **changes})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", [VACE, WAN], ids=["vace", "wan"])
def test_what_a_session_keeps_is_known_without_a_form(
    captured: Callable[[Case], Captured], case: Case, options: dict[str, Any]
) -> None:
    found = captured(case)
    plan = Plan.from_mask(some_mask(), GRID, multiple=1, margin=1, **options)
    kept = in_process(write_form("full", found.program.module, found.analysis, plan.form_options), plan.form_options)
    expected = cache_of(found.analysis, plan.form_options)
    assert len(set(expected)) == len(expected)
    assert set(expected) == set(kept.reads)


@pytest.mark.parametrize(
    ("name", "guided"),
    [pytest.param("FluxInpaintPipeline", True, marks=pytest.mark.wide), ("WanVideoToVideoPipeline", False)],
)
def test_the_size_is_that_of_the_session(name: str, guided: bool) -> None:
    row = BY_NAME[name]
    plan = mixed(plan_of(row, guided=guided, memory="any", cache_dtype="int8"))
    pipe = row.build()
    compile_models(pipe)
    with hetcache.session(plan) as session:
        row.run(pipe, 0, guided)
        held = session.stats.cache_bytes
    size = plan.cache_size
    assert size is not None
    assert size.edit == held > 0
    assert size.branch == session.stats.branch_bytes
    assert size.branches == (2 if guided else 1)
    assert f"the cache takes {format_bytes(held)}" in plan.describe()


@pytest.mark.parametrize("options", [{}, {"context_extrapolation": 1, "cache_dtype": "int8"}], ids=str)
def test_branches_that_share_keys_and_values(options: dict[str, Any]) -> None:
    row = BY_NAME["FluxInpaintPipeline"]
    plan = mixed(plan_of(row, guided=True, memory="any", **options))
    plan = replace(plan, shared_context=1)
    pipe = row.build()
    compile_models(pipe)
    with hetcache.session(plan, strict=True) as session:
        row.run(pipe, 0, True)
    size = plan.cache_size
    assert size is not None
    assert session.stats.shared == plan.steps.count(hetcache.StepKind.FULL)
    assert size.edit == session.stats.cache_bytes < replace(size, shared=False).edit
    assert "2 branches that share keys and values" in plan.describe()


@pytest.mark.parametrize(("case", "alike"), [(VACE, 2), (Case("wan"), 1)], ids=["vace", "wan"])
def test_what_guidance_branches_have_in_common(captured: Callable[[Case], Captured], case: Case, alike: int) -> None:
    """Keys and values up to the first block that reads the text, of the control blocks and of the others: so a
    cache for each branch is hardly more than what they could share."""
    found = captured(case)
    forms = found.forms(Plan.from_mask(some_mask(), GRID, multiple=1, margin=1))
    first = found.call(0)
    text = {"encoder_hidden_states": found.call(50)["encoder_hidden_states"]}
    (_, one), (_, other) = forms.full(**first), forms.full(**first | text)
    same = {name for name, value in one.items() if torch.equal(value, other[name])}
    modules = {entry.module.rpartition(".")[0] for entry in forms.cache_entries if entry.output_name in same}
    assert modules <= {"vace_blocks.0", "blocks.0"}
    assert len(same) == 2 * alike


CACHED = [row for row in ROWS if EXPECTED[row.name]["result"] == "cached" and row.name not in UNCOUNTED]


@pytest.mark.wide
@pytest.mark.parametrize("row", CACHED[::5], ids=lambda row: row.name)
def test_the_size_is_that_of_the_session_in_more_pipelines(row: Row) -> None:
    """Every fifth: all of them take minutes."""
    guided = bool(row.guided)
    torch._dynamo.reset()
    plan = mixed(plan_of(row, guided=guided, memory="any"))
    pipe = row.build()
    compile_models(pipe)
    with hetcache.session(plan) as session:
        row.run(pipe, 0, guided)
        held = session.stats.cache_bytes
    assert plan.cache_size is not None
    assert held == plan.cache_size.edit


def test_counting_leaves_the_pipeline_as_it_was() -> None:
    row = BY_NAME["FluxInpaintPipeline"]
    pipe = row.build()
    compile_models(pipe)
    pipe.transformer._orig_mod.forward = forward = pipe.transformer._orig_mod.forward  # as hooks of accelerate do
    attributes, of_model = dict(vars(pipe)), dict(vars(pipe.transformer._orig_mod))
    state = torch.get_rng_state()
    assert plan_of(row, pipe, memory="any").cache_size is not None
    assert vars(pipe) == attributes
    assert vars(pipe.transformer._orig_mod) == of_model
    assert pipe.transformer._orig_mod.forward is forward
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(PlanError, match="does not run for a step"):
        count_calls(pipe, {"prompt": None}, None)


def test_a_plan_that_fits() -> None:
    """Smaller types first, then fewer keys and values; what is given stays; the least is named."""
    row = BY_NAME["FluxInpaintPipeline"]
    pipe, arguments = row.build(), {**row.call(), "output_type": "latent"}
    call = planned_call(pipe, row.mask, arguments)
    footprint = replace(Footprint.of(pipe, call), has_gpu=False)
    make = partial(_plan_for, pipe, call, "full", None, margin=1, multiple=1)

    def plan_within(limit: int | None, **options: Any) -> Plan:
        return smaller_choices(make, "full", None, options, footprint, limit)[0].plan

    def size(**options: Any) -> int:
        found = plan_within(None, **options).cache_size
        assert found is not None
        return found.edit

    sizes = {"same": size(), "bf16": size(cache_dtype="bf16"), "int8": size(cache_dtype="int8")}
    assert sizes["int8"] < sizes["bf16"] < sizes["same"]
    for name, limit in sizes.items():
        plan = plan_within(limit)
        assert (plan.cache_dtype, plan.num_context) == (name, plan.num_tokens - plan.num_active)
    fewer = plan_within(sizes["int8"] - 1)
    assert fewer.cache_dtype == "int8"
    assert fewer.num_context < fewer.num_tokens - fewer.num_active
    given = plan_within(sizes["same"] - 1, cache_dtype="same")
    assert given.cache_dtype == "same"
    assert given.num_context < given.num_tokens - given.num_active
    with pytest.raises(
        PlanError, match=r"within 10 bytes: the least is .* KiB, with cache_dtype int8, cached_ratio 0.1"
    ):
        plan_within(10)
    with pytest.raises(PlanError, match=r"the least is .* as asked for"):
        plan_within(10, cache_dtype="same", cached_ratio=1.0)


def test_memory_needs_a_call() -> None:
    row = BY_NAME["WanVideoToVideoPipeline"]
    with pytest.raises(PlanError, match="give the prompt"):
        hetcache.plan_for(row.build(), mask=row.mask, memory="1GiB")
    with pytest.raises(PlanError, match="an amount such as 8GiB"):
        plan_of(row, memory="much")


def fake_footprint(branch: Callable[[Plan], int], ways: list[dict[str, Any]]) -> Any:
    """Stands for a `Footprint`: sizes are what `branch` says."""

    class Fake:
        def ways(self, options: Any) -> list[dict[str, Any]]:
            return [way for way in ways if not way.keys() & options.keys()]

        def sized(self, plan: Plan) -> Plan:
            return replace(plan, counted=CacheSize(plan.form_options, branch(plan), branch(plan) // 2, 1, 2, 0))

    return Fake()


def test_what_a_calibration_measured_is_compared_by_its_errors() -> None:
    """Prediction takes twice the memory. Where it is the best it is chosen, in int8 if need be, or not at all."""
    known = with_variants((0.9, 0.02, 0.9, 0.9))
    assert VARIANTS[1]["context_extrapolation"]
    mask = np.zeros((4, 8, 8), dtype=bool)
    mask[1, 2:4, 2:4] = True
    make = partial(
        Plan.from_mask, mask, (4, 8, 8), num_inference_steps=STEPS, schedule="optimal:3x", calibration=known,
        multiple=1, context_ratio=0.0,
    )  # fmt: skip

    def bytes_of(plan: Plan) -> int:
        return (100 if plan.cache_dtype == "same" else 30) * (1 + plan.context_extrapolation)

    footprint = fake_footprint(bytes_of, [{}, {"cache_dtype": "int8"}, {"cached_ratio": 0.5}])

    def best(limit: int) -> tuple[int, str]:
        plan = smaller_choices(make, "optimal:3x", known, {}, footprint, limit)[0].plan
        return plan.context_extrapolation, plan.cache_dtype

    assert best(400) == (1, "same")
    assert best(399) == (1, "int8")
    assert best(119) == (0, "int8")
    with pytest.raises(PlanError, match="the least is 60 bytes"):
        best(59)


def test_the_host_comes_before_fewer_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, and where the host has the memory."""
    mask = some_mask()
    make = partial(Plan.from_mask, mask, GRID, multiple=1)
    footprint = fake_footprint(lambda plan: 100, [dict(way) for way in SMALLER])
    of_host = "hetcache_compile.pipelines.planning.host_bytes"
    monkeypatch.setattr(of_host, lambda: 1000)
    chosen = smaller_choices(make, "balanced", None, {}, footprint, 150)[0].plan
    assert (chosen.cache_device, chosen.cache_dtype, chosen.num_context) == ("cpu", "same", make().num_context)
    monkeypatch.setattr(of_host, lambda: 99)
    with pytest.raises(PlanError, match="no plan keeps its cache"):
        smaller_choices(make, "balanced", None, {}, footprint, 150)
    without = Footprint(None, 1, has_gpu=False)  # type: ignore[arg-type]
    assert not any("cache_device" in way for way in without.ways({}))
    assert without.ways({"cache_dtype": "int8", "cached_ratio": 1.0}) == [{}]


def test_amounts() -> None:
    assert [parse_bytes(text) for text in ("8GiB", "8 GB", "0.5g", "300", 12)] == [2**33, 2**33, 2**29, 300, 12]
    assert [format_bytes(size) for size in (900, 1536, 7 * 2**30)] == ["900 bytes", "1.5 KiB", "7 GiB"]
    for wrong in ("", "GiB", "-1GiB", 0, True, "8 GiBs"):
        with pytest.raises(PlanError, match="memory is an amount"):
            parse_bytes(wrong)


def test_a_size_is_that_of_its_plan_and_in_its_file(tmp_path: Path) -> None:
    plan = Plan.from_mask(some_mask(), GRID)
    counted = replace(plan, counted=CacheSize(plan.form_options, 2048, 1024, 64, 2, 1040))
    assert counted.describe().splitlines()[2] == "the cache takes 4 KiB (2 branches of 2 KiB)"
    hosted = replace(counted, cache_device="cpu")
    assert hosted.describe().splitlines()[2] == (
        "the cache takes 2 KiB of the host's memory (2 branches of 2 KiB) and 2.06 KiB on the device"
    )
    assert replace(counted, cache_dtype="int8").cache_size is None
    assert plan.cache_size is None
    counted.save(tmp_path / "a.hetplan")
    assert Plan.load(tmp_path / "a.hetplan").cache_size == counted.cache_size
    arrays, header = counted.packed()
    del header["cache_size"]["shareable"]  # as in files from before
    size = Plan.unpacked(arrays, header).cache_size
    assert size is not None
    assert size.shareable == 1024
    plan.save(tmp_path / "b.hetplan")
    assert Plan.load(tmp_path / "b.hetplan").counted is None
