"""The nodes for ComfyUI, against a stand-in of its interface (`comfy_standin`): ComfyUI is on no package index."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from comfy_standin import BaseModel, Guider, ModelPatcher, Refused, Transformer, comfy, euler, heun, midpoint
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.comfyui.nodes import HetCacheApply, HetCachePreview, HetCacheReport, attached
from hetcache_compile.comfyui.sampling import CachedSampling, Settings
from hetcache_compile.errors import HetCacheWarning

pytestmark = pytest.mark.usefixtures("comfy")
__all__ = ["comfy"]

SIZE = (22, 26)  # latents: 11 x 13 tokens
STEPS = 7
SIGMAS = torch.linspace(1, 0, STEPS + 1) ** 0.8


@pytest.fixture(autouse=True)
def _as_in_comfyui() -> Iterator[None]:
    """ComfyUI runs every node in inference mode."""
    torch._dynamo.reset()  # its recompile limit is one for all models of a class
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def patcher() -> ModelPatcher:
    return patcher_of(Transformer(2))


def patcher_of(model: nn.Module, **options: Any) -> ModelPatcher:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return ModelPatcher(BaseModel(model.eval(), **options))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def corner(height: int = 8 * SIZE[0], width: int = 8 * SIZE[1]) -> torch.Tensor:
    """A mask `[1, H, W]` in pixels: a box near the upper left corner."""
    mask = torch.zeros(1, height, width)
    mask[:, height // 8 : height // 3, width // 8 : width // 3] = 1
    return mask


def apply(patcher: ModelPatcher, schedule: str = "quality", mask: Any = None, **options: Any) -> ModelPatcher:
    settings = Settings(schedule, margin=1.0, compiler="eager", **options)
    (model,) = HetCacheApply().apply(patcher, mask, settings)
    return model  # type: ignore[no-any-return]


def sample(model: ModelPatcher, *, seed: int = 0, mask: Any = None, batched: bool = True, **options: Any) -> Any:
    shape = options.pop("shape", (1, 3, *SIZE))
    guidance = options.pop("guidance", 2)
    conditions = [draw(1, 6, Transformer.TEXT, seed=9 + number) for number in range(guidance)]
    guider = Guider(model, conditions, batched, options.pop("area", None))
    noise, latents = draw(*shape, seed=seed), draw(*shape, seed=seed + 1)
    return guider.sample(noise, latents, SIGMAS, corner() if mask is None else mask, **options)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings in the log."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def last(model: ModelPatcher) -> CachedSampling:
    return attached(model)


def kinds(model: ModelPatcher) -> str:
    session = last(model).session
    assert session is not None
    return "".join(kind.letter for kind in session.stats.kinds)


# Results


@pytest.mark.parametrize("batched", [True, False], ids=["one call", "two calls"])
def test_full_steps_give_what_the_model_gives(patcher: ModelPatcher, batched: bool) -> None:
    model = apply(patcher, "full")
    assert torch.equal(sample(model, batched=batched), sample(patcher, batched=batched))
    assert kinds(model) == "F" * STEPS * (1 if batched else 2)


def test_calls_are_of_the_planned_kinds(patcher: ModelPatcher) -> None:
    together, apart = apply(patcher), apply(patcher)
    first, second = sample(together), sample(apart, batched=False)
    assert kinds(together) == "FRPRFRF"
    assert kinds(apart) == "FFRRPPRRFFRRFF"
    torch.testing.assert_close(first, second)
    for model in (together, apart):
        session = last(model).session
        assert session is not None
        assert session.stats.unplanned == session.notices.refused_calls == 0
    plain = sample(patcher)
    error = (first - plain).norm() / plain.norm()
    assert 1e-4 < error < 0.2, "cached steps are near the uncached ones, and not the same"


def test_guidance_that_ends_midway(patcher: ModelPatcher) -> None:
    """Conditions that are put together in another way have caches of their own."""
    model = apply(patcher)
    guider = Guider(model, [draw(1, 6, Transformer.TEXT, seed=9 + number) for number in range(2)], batched=False)

    def end_guidance(step: int, *_: Any) -> None:
        if step == 2:
            guider.batched = True

    guider.sample(draw(1, 3, *SIZE), draw(1, 3, *SIZE, seed=1), SIGMAS, corner(), callback=end_guidance)
    assert kinds(model) == "FFRRPP" + "F" + "FRF", "the first call of both together has no cache to go on from"


def test_what_lies_outside_the_mask_is_kept(patcher: ModelPatcher) -> None:
    model = apply(patcher, "fast")
    known = draw(1, 3, *SIZE, seed=1)
    mask = corner(*SIZE)
    result = sample(model, mask=mask)
    kept = (mask == 0).expand_as(result[:, 0]).unsqueeze(1).expand_as(result)
    torch.testing.assert_close(result[kept], known[kept])
    assert ((result - known)[~kept].abs() > 1e-3).float().mean() > 0.99
    plan = last(model).session.plan  # type: ignore[union-attr]
    generative = plan.tokens_of(hetcache.TokenKind.GENERATIVE)[0]
    assert generative.tolist() == (mask[0].unfold(0, 2, 2).unfold(1, 2, 2).amax(dim=(2, 3)) > 0).tolist()


def test_previews_are_shown(patcher: ModelPatcher) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    sample(apply(patcher), callback=lambda step, denoised, x, total: seen.append((step, tuple(denoised.shape))))
    assert seen == [(step, (1, 3, *SIZE)) for step in range(STEPS)]


def test_a_batch_has_one_plan(patcher: ModelPatcher) -> None:
    """Of the union of its masks."""
    masks = torch.cat([corner(), corner().flip(1)])
    model = apply(patcher, "full")
    shape = (2, 3, *SIZE)
    assert torch.equal(sample(model, shape=shape, mask=masks), sample(patcher, shape=shape, mask=masks))
    generative = last(model).session.plan.tokens_of(hetcache.TokenKind.GENERATIVE)[0]  # type: ignore[union-attr]
    assert generative[1:3].any()
    assert generative[-3:-1].any()
    assert not generative[5].any()


@pytest.mark.parametrize("multiplier", [1.0, 1000.0])
def test_videos(multiplier: float) -> None:
    """Latents with frames, and times from 0 to 1 or to 1000."""
    patcher = patcher_of(Transformer((1, 2, 2)), multiplier=multiplier)
    mask, shape = corner().expand(9, -1, -1).clone(), (1, 3, 3, *SIZE)
    mask[:5] = 0
    full, cached = apply(patcher, "full", mask), apply(patcher, "quality", mask)
    plain = sample(patcher, shape=shape, mask=mask[::4])
    assert torch.equal(sample(full, shape=shape, mask=mask[::4]), plain)
    sample(cached, shape=shape, mask=mask[::4])
    assert kinds(cached) == "FRPRFRF"
    assert last(cached).session.plan.grid == (3, 11, 13)  # type: ignore[union-attr]


# Weights


def test_weights_that_are_patched_in_an_edit(patcher: ModelPatcher) -> None:
    model = apply(patcher)
    linear = patcher.model.diffusion_model.blocks[1].qkv
    before = linear.weight

    def patch(step: int, *_: Any) -> None:
        if step == 1:
            linear.weight = nn.Parameter(before * 1.5, requires_grad=False)

    try:
        sample(model, callback=patch)
    finally:
        linear.weight = before
    assert kinds(model) == "FRFRFRF", "the third step was to be PARTIAL, and its cache is of other weights"


def test_weights_that_hooks_patch_in_place(patcher: ModelPatcher) -> None:
    """Through `.data`, which torch does not count; ComfyUI says that it did so."""
    model = apply(patcher)
    weight = patcher.model.diffusion_model.blocks[1].qkv.weight
    before = weight.clone()

    def patch(step: int, *_: Any) -> None:
        if step == 1:
            weight.data.copy_(before * 1.5)
            model.apply_hooks("a group of hooks")

    try:
        sample(model, callback=patch)
    finally:
        weight.data.copy_(before)
    assert kinds(model) == "FRFRFRF"


def test_a_lora_between_edits(patcher: ModelPatcher) -> None:
    model = apply(patcher, "full")
    first = sample(model)
    linear = patcher.model.diffusion_model.blocks[0].mlp[0]
    before = linear.weight
    linear.weight = nn.Parameter(before + 0.1, requires_grad=False)
    try:
        patched = sample(model)
        assert torch.equal(patched, sample(patcher))
        assert not torch.equal(patched, first)
    finally:
        linear.weight = before
    assert torch.equal(sample(model), first)


def test_weights_are_not_streamed(patcher: ModelPatcher) -> None:
    dynamic = ModelPatcher(patcher.model, dynamic=True)
    assert not apply(dynamic).is_dynamic()
    assert dynamic.is_dynamic()


@pytest.mark.wide
def test_a_model_is_not_kept_alive() -> None:
    patcher = patcher_of(Transformer(2))
    model = apply(patcher)
    sample(model)
    sampling, alive = last(model), weakref.ref(patcher.model.diffusion_model)
    assert sampling.session is not None
    assert isinstance(patcher.model.diffusion_model, Transformer), "the compiled model is there in calls only"
    del patcher, model
    gc.collect()
    assert alive() is None
    assert "model calls: 3 FULL, 1 PARTIAL, 3 REUSE" in sampling.report()


def test_the_next_edit_compiles_nothing(patcher: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    from hetcache_compile.comfyui import sampling

    graphs: list[Any] = []
    real = sampling.hetcache_backend

    def counting(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return real(graph, inputs, **options)

    monkeypatch.setattr(sampling, "hetcache_backend", counting)
    model = apply(patcher)
    sample(model)
    assert len(graphs) == 1
    sample(model, seed=3)
    again = apply(patcher, mask=corner().flip(2))
    sample(again, seed=4)
    assert len(graphs) == 1
    assert kinds(again) == "FRPRFRF"


# Samplers and conditions that call otherwise


def test_calls_between_steps_are_full(patcher: ModelPatcher) -> None:
    model = apply(patcher)
    with pytest.warns(HetCacheWarning, match="the plan knows no time"):
        result = sample(model, function=midpoint)
    assert kinds(model) == "FF" + "RF" + "PF" + "RF" + "FF" + "RF" + "F"
    assert last(model).session.stats.unplanned == STEPS - 1  # type: ignore[union-attr]
    assert result.isfinite().all()


def test_two_calls_at_one_time(patcher: ModelPatcher) -> None:
    full, cached = apply(patcher, "full"), apply(patcher)
    assert torch.equal(sample(full, function=heun), sample(patcher, function=heun))
    sample(cached, function=heun)
    assert kinds(cached) == "F" + "RF" + "FF" + "RR" + "FF" + "RR" + "FF", (
        "two caches, and both are sure from step 2 on"
    )
    assert last(cached).session.stats.unplanned == 0  # type: ignore[union-attr]


def test_conditions_for_a_part_of_the_latents(patcher: ModelPatcher) -> None:
    model = apply(patcher)
    with pytest.warns(HetCacheWarning, match="no attention sees all 143 tokens"):
        result = sample(model, area=(10, 12))
    assert torch.equal(result, sample(patcher, area=(10, 12)))
    assert f"{STEPS} calls ran plainly" in last(model).report()


def test_conditions_for_a_part_of_a_video(caplog: pytest.LogCaptureFixture) -> None:
    """A model that makes patches by a convolution says at once that the grid is another one."""
    patcher, options = patcher_of(Transformer((1, 2, 2))), {"shape": (1, 3, 3, *SIZE), "area": (10, 12)}
    model = apply(patcher)
    result = sample(model, **options)
    (line,) = said(caplog)
    assert "sampled unmodified" in line
    assert "grid" in line
    assert torch.equal(result, sample(patcher, **options))
    assert isinstance(patcher.model.diffusion_model, Transformer)
    with pytest.raises(hetcache.SessionError, match="grid"):
        sample(apply(patcher, strict=True), **options)


# What cannot be cached

WRONG_MASKS = {
    "empty": (torch.zeros(1, 64, 64), "the mask is empty"),
    "of another shape": (torch.ones(1, 64, 200), "give the mask of the pictures"),
    "of a vector": (torch.ones(64), r"must be a tensor \[H, W\]"),
    "of 255": (corner() * 255, "must lie between 0 and 1"),
    "of nothing": (torch.zeros(1, 0, 64), "must be a tensor"),
}


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_a_wrong_mask_is_said_once(patcher: ModelPatcher, caplog: pytest.LogCaptureFixture, name: str) -> None:
    mask, words = WRONG_MASKS[name]
    model = apply(patcher, mask=mask)
    result = sample(model)
    (line,) = said(caplog)
    assert re.search(words, line)
    assert "\n" not in line
    assert torch.equal(result, sample(patcher))
    assert "not cached" in HetCacheReport().report(model, {})["result"][0]
    with pytest.raises(hetcache.MaskError, match=words):
        sample(apply(patcher, mask=mask, strict=True))


def test_no_mask(patcher: ModelPatcher, caplog: pytest.LogCaptureFixture) -> None:
    noise, latents = draw(1, 3, *SIZE), draw(1, 3, *SIZE, seed=1)
    text = [draw(1, 6, Transformer.TEXT)]
    model = apply(patcher)
    for run in (1, 2):
        result = Guider(model, text).sample(noise, latents, SIGMAS)
        assert len(said(caplog)) == run
    assert "there is no mask" in said(caplog)[0]
    assert torch.equal(result, Guider(patcher, text).sample(noise, latents, SIGMAS))


def test_a_model_without_patches(caplog: pytest.LogCaptureFixture) -> None:
    class Plain(Transformer):
        def __init__(self) -> None:
            super().__init__(2)
            del self.patch_size

    patcher = patcher_of(Plain())
    assert torch.equal(sample(apply(patcher)), sample(patcher))
    (line,) = said(caplog)
    assert "Plain has no patch size" in line


def test_a_model_that_is_refused() -> None:
    patcher = patcher_of(Refused(2))
    model = apply(patcher)
    with pytest.warns(HetCacheWarning, match="no rule for this operator") as caught:
        result = sample(model)
    assert len([one for one in caught if "no rule" in str(one.message)]) == 1
    assert torch.equal(result, sample(patcher))
    assert f"{STEPS} calls ran plainly" in last(model).report()
    with pytest.raises(hetcache.SessionError, match="no rule for this operator"):
        sample(apply(patcher, strict=True))


def test_copies_of_the_model_run_plainly(patcher: ModelPatcher) -> None:
    """ComfyUI has copies on other GPUs: the compiled model has the weights of one."""
    model, other = apply(patcher), patcher_of(Transformer(2)).model
    guider = Guider(model, [draw(1, 6, Transformer.TEXT)])

    def swap(step: int, *_: Any) -> None:
        guider.inner_model = other

    guider.sample(draw(1, 3, *SIZE), draw(1, 3, *SIZE, seed=1), SIGMAS, corner(), callback=swap)
    assert kinds(model) == "F", "the first call was of the compiled model"
    assert isinstance(other.diffusion_model, Transformer)


def test_calls_in_threads(patcher: ModelPatcher) -> None:
    """With several GPUs ComfyUI calls the model of each in a thread of its own."""
    with ThreadPoolExecutor(1, initializer=lambda: torch._C._set_grad_enabled(False)) as pool:

        def threaded(model: Any, x: torch.Tensor, sigmas: torch.Tensor, callback: Any) -> torch.Tensor:
            return euler(lambda *given: pool.submit(model, *given).result(), x, sigmas, callback)

        model = apply(patcher)
        result = sample(model, function=threaded)
    assert kinds(model) == "FRPRFRF"
    torch.testing.assert_close(result, sample(apply(patcher)))


# Masks


def test_both_masks_count(patcher: ModelPatcher) -> None:
    sampling = last(apply(patcher, mask=corner()))
    denoise = torch.zeros(1, 3, *SIZE)
    denoise[..., -1, -1] = 1
    plan = sampling.plan_for(patcher.model, denoise.shape, SIGMAS, denoise)
    generative = plan.tokens_of(hetcache.TokenKind.GENERATIVE)[0]
    assert generative[-1, -1]
    assert generative[2, 2]
    assert not generative[0, -1]
    assert plan.context_motion == 1


# Nodes


def test_applying_twice_counts_once(patcher: ModelPatcher) -> None:
    once = apply(patcher, "full")
    twice = apply(once)
    assert all(len(keys["hetcache"]) == 1 for keys in (*twice.wrappers.values(), *twice.callbacks.values()))
    sample(twice)
    assert kinds(twice) == "FRPRFRF"
    assert patcher.wrappers == patcher.attachments == {}, "the model that was given is not changed"


def test_the_preview_is_the_plan(patcher: ModelPatcher, caplog: pytest.LogCaptureFixture) -> None:
    model = apply(patcher)
    latent = {"samples": torch.zeros(1, 3, *SIZE), "noise_mask": corner()}
    picture, words = HetCachePreview().preview(model, latent, STEPS)
    assert picture.ndim == 4
    assert picture.shape[0] == 1
    assert picture.shape[-1] == 3
    assert 0 <= picture.min() < 0.2
    assert picture.max() == 1
    with caplog.at_level("INFO", logger="hetcache_compile.comfyui.sampling"):
        sample(model)
    assert caplog.messages == ["hetcache: model calls: 3 FULL, 1 PARTIAL, 3 REUSE; 0 unplanned"]
    assert words == last(model).session.plan.describe()  # type: ignore[union-attr]
    assert HetCacheReport().report(model, latent)["result"][0].startswith(words)
    with pytest.raises(hetcache.MaskError, match="there is no mask"):
        HetCachePreview().preview(model, {"samples": latent["samples"]}, STEPS)
    with pytest.raises(hetcache.PlanError, match="HetCache Apply"):
        HetCachePreview().preview(patcher, latent, STEPS)


def test_an_old_comfyui(patcher: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", None)
    with pytest.raises(hetcache.HetCacheError, match="needs ComfyUI of 2025 or newer"):
        apply(patcher)
