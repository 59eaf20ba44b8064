"""A stand-in for the parts of ComfyUI that the nodes use, in our own words: ComfyUI itself is on no package index.

It has the interface of ComfyUI's `comfy.patcher_extension`, `ModelPatcher`, `BaseModel`, `CFGGuider` and `KSAMPLER`:
the names, the order of arguments, and what happens in which order. The models are tiny, and called as ComfyUI's are.
"""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Callable, Sequence
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

# comfy.patcher_extension


class WrappersMP:
    SAMPLER_SAMPLE = "sampler_sample"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


class CallbacksMP:
    ON_APPLY_HOOKS = "on_apply_hooks"


class WrapperExecutor:
    """Calls the wrappers from the first to the last, then what they wrap."""

    def __init__(self, original: Callable[..., Any], owner: Any, wrappers: Sequence[Any], number: int = 0) -> None:
        self.original, self.class_obj, self.wrappers, self.number = original, owner, list(wrappers), number

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.number == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.number](self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        following = WrapperExecutor(self.original, self.class_obj, self.wrappers, self.number + 1)
        return following.execute(*args, **kwargs)


def wrappers_of(kind: str, options: dict[str, Any]) -> list[Any]:
    return [one for several in options.get("wrappers", {}).get(kind, {}).values() for one in several]


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import comfy.patcher_extension` find the stand-in."""
    package, extension = ModuleType("comfy"), ModuleType("comfy.patcher_extension")
    extension.WrappersMP, extension.CallbacksMP = WrappersMP, CallbacksMP  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)


# Models


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.text, self.query, self.cross = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(nn.Linear(width, 31), nn.GELU(), nn.Linear(31, width))
        self.modulation = nn.Linear(width, 2 * width)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor, vec: torch.Tensor, text: torch.Tensor, transformer_options: Any) -> torch.Tensor:
        scale, shift = self.modulation(vec).unsqueeze(1).chunk(2, dim=2)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        x = x + self.out(self.attend(*self.qkv(y).chunk(3, dim=2)))
        x = x + self.cross(self.attend(self.query(x), *self.text(text).chunk(2, dim=2)))
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class Transformer(nn.Module):
    """A diffusion transformer, called as those of `comfy.ldm` are.

    As there, one of pictures reshapes latents to patches, and one of videos makes patches by a convolution.
    """

    CHANNELS, WIDTH, TEXT, HEADS = 3, 22, 5, 2

    def __init__(self, patch_size: int | tuple[int, int, int], depth: int = 2) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch = (1, patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        per_token = self.CHANNELS * math.prod(self.patch)
        self.makes_videos = not isinstance(patch_size, int)
        patches = nn.Conv3d(self.CHANNELS, self.WIDTH, self.patch, self.patch)
        self.embed = patches if self.makes_videos else nn.Linear(per_token, self.WIDTH)
        self.head = nn.Linear(self.WIDTH, per_token)
        self.time, self.text = nn.Linear(10, self.WIDTH), nn.Linear(self.TEXT, self.WIDTH)
        self.blocks = nn.ModuleList(Block(self.WIDTH, self.HEADS) for _ in range(depth))
        self.dtype = torch.float32

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, control: Any = None,
        transformer_options: Any = MappingProxyType({}), **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        wrappers = wrappers_of(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, control, transformer_options, **kwargs)

    def _forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, control: Any, transformer_options: Any
    ) -> torch.Tensor:
        transformer_options = transformer_options.copy()
        video = x if x.ndim == 5 else x.unsqueeze(2)
        b, c, *sizes = video.shape
        (t, h, w), (pt, ph, pw) = (-(-size // p) for size, p in zip(sizes, self.patch, strict=True)), self.patch
        if any(size % p for size, p in zip(sizes, self.patch, strict=True)):
            video = F.pad(video, (0, w * pw - sizes[2], 0, h * ph - sizes[1], 0, t * pt - sizes[0]))
        if self.makes_videos:
            tokens = self.embed(video).flatten(2).transpose(1, 2)
        else:
            patches = video.reshape(b, c, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
            tokens = self.embed(patches.reshape(b, t * h * w, -1))
        angles = timestep[:, None] * torch.pow(100.0, -torch.arange(5) / 5)
        vec = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], dim=1)))
        text = self.text(context)
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        for number, block in enumerate(self.blocks):
            transformer_options["block_index"] = number
            assert ("block", number) not in replaced
            tokens = block(tokens, vec, text, transformer_options)
        out = self.head(self.mix(tokens)).reshape(b, t, h, w, c, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
        out = out.reshape(b, c, t * pt, h * ph, w * pw)[:, :, : sizes[0], : sizes[1], : sizes[2]]
        return out if x.ndim == 5 else out.squeeze(2)

    def mix(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


class Refused(Transformer):
    """Its tokens meet in an operator that has no rule."""

    def mix(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + torch.fft.fft(tokens, dim=1).real


class Flow:
    """Rectified flow: the model is given `multiplier` times sigma, and predicts a velocity."""

    def __init__(self, multiplier: float) -> None:
        self.multiplier = multiplier

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * self.multiplier


class BaseModel(nn.Module):
    def __init__(self, diffusion_model: nn.Module, multiplier: float = 1000.0, temporal_factor: int = 4) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.model_sampling = Flow(multiplier)
        self.latent_format = SimpleNamespace(temporal_downscale_ratio=temporal_factor)

    def apply_model(
        self, x: torch.Tensor, t: torch.Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: Any = MappingProxyType({}), **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        wrappers = wrappers_of(WrappersMP.APPLY_MODEL, transformer_options)
        executor = WrapperExecutor(self._apply_model, self, wrappers)
        return executor.execute(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _apply_model(
        self, x: torch.Tensor, t: torch.Tensor, c_concat: Any, c_crossattn: Any, control: Any, transformer_options: Any
    ) -> torch.Tensor:
        time = self.model_sampling.timestep(t).float()
        transformer_options = transformer_options.copy()
        out = self.diffusion_model(
            x, time, context=c_crossattn, control=control, transformer_options=transformer_options
        )
        return x - out.float() * t.view(-1, *[1] * (x.ndim - 1))


class ModelPatcher:
    def __init__(self, model: BaseModel, dynamic: bool = False) -> None:
        self.model, self.dynamic = model, dynamic
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.callbacks: dict[str, dict[str, list[Any]]] = {}
        self.attachments: dict[str, Any] = {}

    def is_dynamic(self) -> bool:
        """Whether it streams weights while the model runs."""
        return self.dynamic

    def clone(self, disable_dynamic: bool = False) -> ModelPatcher:
        other = ModelPatcher(self.model, self.dynamic and not disable_dynamic)
        for mine, copy in ((self.wrappers, other.wrappers), (self.callbacks, other.callbacks)):
            copy.update({kind: {key: list(them) for key, them in keys.items()} for kind, keys in mine.items()})
        other.attachments = dict(self.attachments)
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def add_callback_with_key(self, kind: str, key: str, callback: Any) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, kind: str, key: str) -> None:
        self.callbacks.get(kind, {}).pop(key, None)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def apply_hooks(self, hooks: Any) -> None:
        """Other weights are in the model; says so."""
        for several in self.callbacks.get(CallbacksMP.ON_APPLY_HOOKS, {}).values():
            for callback in several:
                callback(self, hooks)


# Sampling


def prepared(mask: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A noise mask as a sampler has it: scaled to the latents, for each of their channels and samples."""
    if len(shape) == 4:
        mask, mode = mask.reshape(-1, 1, *mask.shape[-2:]), "bilinear"
    else:
        mask, mode = mask.reshape(1, 1, -1, *mask.shape[-2:]), "trilinear"
    return F.interpolate(mask, size=tuple(shape[2:]), mode=mode).expand(*shape)


def euler(model: Any, x: torch.Tensor, sigmas: torch.Tensor, callback: Any) -> torch.Tensor:
    for step in range(len(sigmas) - 1):
        denoised = model(x, sigmas[step])
        if callback is not None:
            callback(step, denoised, x, len(sigmas) - 1)
        x = x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
    return x


def midpoint(model: Any, x: torch.Tensor, sigmas: torch.Tensor, callback: Any) -> torch.Tensor:
    """As dpm_2: a second call in each step but the last, at a time between it and the next."""
    for step in range(len(sigmas) - 1):
        now, end = sigmas[step], sigmas[step + 1]
        slope = (x - model(x, now)) / now
        if end > 0:
            middle = (now * end).sqrt()
            between = x + slope * (middle - now)
            slope = (between - model(between, middle)) / middle
        x = x + slope * (end - now)
    return x


def heun(model: Any, x: torch.Tensor, sigmas: torch.Tensor, callback: Any) -> torch.Tensor:
    """A second call in each step but the last, at the time of the next step."""
    for step in range(len(sigmas) - 1):
        now, end = sigmas[step], sigmas[step + 1]
        slope = (x - model(x, now)) / now
        if end > 0:
            ahead = x + slope * (end - now)
            slope = (slope + (ahead - model(ahead, end)) / end) / 2
        x = x + slope * (end - now)
    return x


class Sampler:
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function

    def sample(
        self, guider: Any, sigmas: torch.Tensor, extra_args: Any, callback: Any, noise: torch.Tensor,
        latent_image: torch.Tensor, denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            if denoise_mask is None:
                return guider(x, sigma, **extra_args)
            known = sigma * noise + (1 - sigma) * latent_image
            out = guider(x * denoise_mask + known * (1 - denoise_mask), sigma, **extra_args)
            return out * denoise_mask + latent_image * (1 - denoise_mask)

        return self.function(model, sigmas[0] * noise + (1 - sigmas[0]) * latent_image, sigmas, callback)


class Guider:
    """Classifier-free guidance, in one call or in two.

    Args:
        patcher: the model.
        conditions: text `[1, L, D]`, the positive and the negative one.
        batched: whether both are put into one call.
        area: the sizes of the part of the latents, from the first row and column, that the conditions are for.
    """

    def __init__(
        self, patcher: ModelPatcher, conditions: Sequence[torch.Tensor], batched: bool = True, area: Any = None
    ) -> None:
        self.model_patcher, self.conditions, self.batched, self.area = patcher, conditions, batched, area
        self.uuids = [uuid.uuid4() for _ in conditions]

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options: Any) -> torch.Tensor:
        numbers = range(len(self.conditions))
        part = x if self.area is None else x[..., : self.area[0], : self.area[1]]
        outputs = {}
        for together in [list(numbers)[::-1]] if self.batched else [[number] for number in numbers]:
            options = {**model_options["transformer_options"]}
            options |= {"cond_or_uncond": together, "uuids": [self.uuids[n] for n in together], "sigmas": sigma[None]}
            text = torch.cat([self.conditions[n].expand(len(x), -1, -1) for n in together])
            times = sigma.expand(len(x) * len(together))
            result = self.inner_model.apply_model(
                torch.cat([part] * len(together)), times, c_crossattn=text, transformer_options=options
            )
            outputs |= dict(zip(together, result.chunk(len(together)), strict=True))
        whole = {n: x.clone() for n in numbers}
        for n in numbers:
            whole[n][..., : part.shape[-2], : part.shape[-1]] = outputs[n]
        return whole[0] if len(numbers) == 1 else whole[1] + (whole[0] - whole[1]) * 2.0

    def sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, sigmas: torch.Tensor, denoise_mask: Any = None,
        function: Callable[..., torch.Tensor] = euler, callback: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        mask = None if denoise_mask is None else prepared(denoise_mask, noise.shape)
        wrappers = self.model_patcher.clone().wrappers
        options = {"transformer_options": {"wrappers": wrappers, "sample_sigmas": sigmas}}
        self.inner_model = self.model_patcher.model
        sampler = Sampler(function)
        executor = WrapperExecutor(
            sampler.sample, sampler, wrappers_of(WrappersMP.SAMPLER_SAMPLE, options["transformer_options"])
        )
        try:
            return executor.execute(self, sigmas, {"model_options": options}, callback, noise, latent_image, mask, True)
        finally:
            del self.inner_model
