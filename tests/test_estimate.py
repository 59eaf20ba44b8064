"""`hetcache estimate`: a few blocks tell of all; sizes of caches; refusals; the committed figures."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import CONFIG, GRID, NUM_TOKENS, TEXT_TOKENS, call, wan
from torch.fx import symbolic_trace
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import hetcache_compile as hetcache
from hetcache_compile.capture.explain import explain
from hetcache_compile.errors import EstimateError
from hetcache_compile.estimate.estimate import estimate
from hetcache_compile.estimate.gpus import find_gpu
from hetcache_compile.estimate.inventory import PLAIN, missing_blocks, shortened, take_inventory
from hetcache_compile.estimate.models import KnownModel, find_model, known_models
from hetcache_compile.estimate.work import Operation, Work, work_of
from hetcache_compile.passes.forms.pipeline import in_process

aten = torch.ops.aten
RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "estimate.json"


def tiny(name: str, **config: Any) -> KnownModel:
    """A tiny Wan of the class of a known one."""
    return replace(known_models()[name], name="tiny", config={**CONFIG, **config}, text_tokens=TEXT_TOKENS)


def plan(share: float = 0.25, **options: Any) -> hetcache.Plan:
    active = np.arange(NUM_TOKENS) < share * NUM_TOKENS
    return hetcache.Plan.from_token_mask(active, GRID, num_inference_steps=7, extrapolation=1, **options)


@pytest.mark.wide
def test_a_few_blocks_tell_what_a_whole_capture_tells() -> None:
    """Against the forms that `rewrite` makes of all blocks of a model with weights."""
    model = tiny("wan2.1-t2v-14b", num_layers=4)
    assert missing_blocks(model) == {"num_layers": 2}
    found = take_inventory(model, plan(), torch.float32)
    whole = wan(num_layers=4)
    forms = hetcache.rewrite(whole, plan(), kwargs=call(whole))
    running = {kind: in_process(form, forms.plan.form_options).module for kind, form in forms.by_kind.items()}
    assert found.work == {PLAIN: work_of(forms.program.module), **{kind: work_of(m) for kind, m in running.items()}}
    assert {kind: found.work[kind].flops for kind in running} == explain(forms).form_flops
    cached = sum(count * entry.num_bytes for entry, count in found.entries.items())
    assert cached == forms.buffer_bytes - forms.unchanging_bytes
    assert found.parameters.total() == sum(parameter.numel() for parameter in whole.parameters())


def test_blocks_of_each_kind_are_left_out() -> None:
    model = tiny("wan2.1-vace-1.3b", num_layers=6, vace_layers=[0, 2, 4, 5])
    missing = missing_blocks(model)
    assert missing == {"num_layers": 4, "vace_layers": 3}
    assert {"num_layers": 2, "vace_layers": [0]}.items() <= shortened(model, missing).items()
    few = tiny("wan2.1-vace-1.3b", num_layers=6, vace_layers=[0, 5])  # too few to leave one out, but they move
    assert {"num_layers": 2, "vace_layers": [0, 1]}.items() <= shortened(few, missing_blocks(few)).items()
    assert missing_blocks(tiny("wan2.1-vace-1.3b", num_layers=3, vace_layers=[0, 2])) == {}


def test_blocks_that_are_not_alike_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deeper model with less of something: an operator of the base that is gone."""
    from hetcache_compile.estimate import inventory

    sizes = iter((3, 1))

    def take(*_: Any) -> inventory.Inventory:
        work = Work(Counter({Operation(False, 8, 8): next(sizes)}))
        return inventory.Inventory({PLAIN: work}, Counter(), Counter())

    monkeypatch.setattr(inventory, "_take", take)
    with pytest.raises(EstimateError, match="the blocks of tiny are not alike"):
        take_inventory(tiny("wan2.1-t2v-14b", num_layers=5), plan(), torch.float32)


def test_bytes_of_a_small_graph() -> None:
    """Two products, and between them light operators in one kernel, which reads a table too."""

    def graph(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        hidden = aten.linear.default(x, weight)
        scaled = aten.mul.Tensor(aten.relu.default(hidden), table)
        return aten.linear.default(aten.t.default(scaled), aten.neg.default(weight))

    module, width = symbolic_trace(graph), 5
    FakeTensorProp(module).propagate(*(torch.empty(width, width) for _ in range(3)))
    for node in module.graph.nodes:
        node.meta["val"] = node.meta.get("val", node.meta.get("fake_result"))
    work, one = work_of(module), 4 * width * width
    assert work.operations == {Operation(False, 2 * width**3, 3 * one): 2}
    assert work.fused_bytes == (2 + 1) * one + 2 * one  # in: hidden, table; out: scaled. In: weight, out: its negative
    assert work.eager_bytes == (2 + 3 + 2) * one


def test_seconds_are_a_roofline() -> None:
    card = find_gpu("h200")
    by_flops, by_bytes = Operation(True, int(1e15), 8), Operation(False, 8, int(1e12))
    found = card.seconds(Work(Counter({by_flops: 2, by_bytes: 3}), fused_bytes=int(1e12), eager_bytes=int(5e12)), "fa2")
    expected = card.call_seconds + 2e15 / card.attention_flops["fa2"] + 4e12 / card.memory_bytes_per_second
    assert found == pytest.approx(expected)
    with pytest.raises(EstimateError, match="RTX 4090 has rates of sdpa, fa2, not of fa3"):
        find_gpu("rtx4090").seconds(Work(), "fa3")


def test_an_estimate_of_an_edit() -> None:
    """The plan's calls, for both branches; predicted keys and values take two of each."""
    small = tiny("wan2.1-t2v-14b", num_layers=1)
    found = estimate(small, plan(schedule="FPR"), find_gpu("RTX 4090"), dtype=torch.float32)
    assert found.steps == {"FULL": 3, "PARTIAL": 2, "REUSE": 2}
    calls = 3 * found.forms["full"].seconds + 2 * found.forms["partial"].seconds + 2 * found.forms["reuse"].seconds
    assert found.plan_seconds == pytest.approx(2 * calls)
    assert found.uncached_flops == 2 * 7 * found.forms["plain"].flops
    same = found.caches["same"]
    assert same.edit == 2 * same.branch
    assert same.predicted_edit == 2 * (same.branch + 2 * NUM_TOKENS * 24 * 4)  # keys and values of one block
    assert json.loads(json.dumps(found.to_dict()))["speedup"] == found.speedup
    assert "PARTIAL" in str(found)
    shared = estimate(small, replace(plan(schedule="FPR"), shared_context=1), find_gpu("RTX 4090"), dtype=torch.float32)
    saved = 3 * (found.forms["full"].seconds - found.forms["partial"].seconds)
    assert shared.plan_seconds == pytest.approx(found.plan_seconds - saved)
    assert shared.caches["same"].edit == same.edit - 2 * NUM_TOKENS * 24 * 4


def test_a_plan_of_another_size_is_refused(tmp_path: Path, hetcache_command: Any) -> None:
    plan().save(tmp_path / "edit.hetplan")
    size = ("--height", 80, "--width", 112, "--num-frames", 13)
    status, out, err = hetcache_command("estimate", "wan2.1-t2v-14b", "--plan", tmp_path / "edit.hetplan", *size)
    assert (status, out) == (2, "")
    assert "for a token grid of (3, 5, 7), but this size makes (4, 5, 7) of wan2.1-t2v-14b" in err


def test_a_local_folder_without_weights(tmp_path: Path, hetcache_command: Any) -> None:
    config = {"_class_name": "WanTransformer3DModel", **CONFIG, "num_layers": 1}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    size = ("--height", 80, "--width", 112, "--num-frames", 9, "--schedule", "FRP", "--steps", 6)
    status, out, err = hetcache_command("estimate", tmp_path, *size, "--set", "context_extrapolation=1", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["num_tokens"] == NUM_TOKENS
    assert found["steps"] == {"FULL": 3, "REUSE": 2, "PARTIAL": 1}
    caches = found["caches"]["fp8"]
    assert caches["predicted_edit"] == caches["edit"] > 2 * 2 * 2 * NUM_TOKENS * 24  # two of each are there already
    assert "called like wan2." in found["called_like"]


def test_a_mask_is_read_as_its_options_say(tmp_path: Path, hetcache_command: Any) -> None:
    mask = np.zeros((9, 80, 112), dtype=np.float32)
    mask[:, :16, :16] = 0.4
    np.save(tmp_path / "mask.npy", mask)
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "WanTransformer3DModel", **CONFIG, "num_layers": 1})
    )
    command = ("estimate", tmp_path, "--height", 80, "--width", 112, "--num-frames", 9, "--margin", 0, "--json")

    def active(*more: Any) -> int:
        status, out, err = hetcache_command(*command, "--mask", tmp_path / "mask.npy", "--threshold", 0.3, *more)
        assert status == 0, err
        found: int = json.loads(out)["num_active"]
        return found

    assert 0 < active() < active("--invert") <= NUM_TOKENS


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["wan-9"], ["wan-9 is neither a folder nor a known model", "wan2.1-vace-14b", "sd3.5-medium"]),
        (["flux.1-dev", "--gpu", "abacus"], ["the rates of abacus are not known", "h100", "rtx5090"]),
        (["wan2.1-t2v-14b", "--height", "100"], ["height must be a multiple of 16"]),
        (["wan2.1-t2v-14b", "--num-frames", "80"], ["one more than a multiple of 4"]),
        (["flux.1-dev", "--num-frames", "5"], ["makes pictures"]),
        (["flux.1-dev", "--margin", "1", "--set", "merged_ratio=0.5"], ["margin, merged_ratio of a plan needs a mask"]),
        (["flux.1-dev", "--plan", "a.hetplan", "--steps", "9"], ["--plan has a mask and steps already"]),
        (["flux.1-dev", "--invert"], ["--invert", "say how a mask is read: give --mask"]),
    ],
)
def test_what_is_refused(arguments: list[str], parts: list[str], hetcache_command: Any) -> None:
    status, out, err = hetcache_command("estimate", *arguments)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert all(part in err for part in parts)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(EstimateError, match=r"config.json cannot be read as a config"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(EstimateError, match="holds a UNet2DModel; estimates are made of WanTransformer3DModel"):
        find_model(str(tmp_path))


def test_published_times_are_met_within_a_quarter() -> None:
    """And the cache of our own run to the byte."""
    result = json.loads(RESULT.read_text())
    assert len(result["published"]) == 7
    for row in result["published"]:
        assert abs(row["predicted_seconds"] / row["seconds"] - 1) <= 0.25, row
    assert all(row["bytes"] == row["predicted_bytes"] for row in result["caches"])
    assert set(result["models"]) == set(known_models())


def test_what_a_few_blocks_tell_was_compared_for_every_class() -> None:
    exact = json.loads(RESULT.read_text())["extension_is_exact"]
    assert exact == {model.class_name: True for model in known_models().values()}
