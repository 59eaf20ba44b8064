"""The nodes: settings, apply, preview, report."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import PlanError
from ..plan.preview import preview_pixels
from .sampling import KEY, SCHEDULES, CachedSampling, Settings

CATEGORY = "hetcache"
SETTINGS = "HETCACHE_SETTINGS"
"""The type of a link that carries `sampling.Settings`."""

Inputs = dict[str, dict[str, tuple[Any, ...]]]


class HetCacheSettings:
    """How an edit is cached."""

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = (SETTINGS,)
    RETURN_NAMES = ("settings",)
    DESCRIPTION = "How HetCache caches an edit. Without this node the defaults hold."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """What ComfyUI shows of it."""
        default = Settings()
        ratio = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "schedule": (
                    list(SCHEDULES),
                    {"default": default.schedule, "tooltip": "how many steps compute all tokens, some, or none"},
                ),
                "margin": (
                    "FLOAT",
                    {
                        "default": default.margin, "min": 0.0, "max": 64.0, "step": 0.5,
                        "tooltip": "how far around the mask tokens are computed too, in tokens",
                    },
                ),
                "context_ratio": (
                    "FLOAT",
                    {
                        "default": default.context_ratio, **ratio,
                        "tooltip": "share of the known tokens that partial steps compute too",
                    },
                ),
                "strict": (
                    "BOOLEAN",
                    {"default": default.strict, "tooltip": "what cannot be cached is an error, in place of a warning"},
                ),
                "compiler": (
                    ["inductor", "eager"],
                    {
                        "default": default.compiler,
                        "tooltip": "inductor compiles for minutes and then runs fast; eager compiles nothing",
                    },
                ),
                "reference_frames": (
                    "INT",
                    {
                        "default": default.reference_frames, "min": 0, "max": 64,
                        "tooltip": "latent frames in front of a video that hold references (WanVaceToVideo: 1 with a "
                        "reference image)",
                    },
                ),
            }
        }  # fmt: skip

    def make(
        self, schedule: str, margin: float, context_ratio: float, strict: bool, compiler: str, reference_frames: int
    ) -> tuple[Settings]:
        """The settings."""
        return (Settings(schedule, float(margin), float(context_ratio), strict, compiler, reference_frames),)


class HetCacheApply:
    """Let a model be cached while it samples a masked edit."""

    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        "Caches the tokens outside the mask while the model samples. The mask is that of the latents (Set Latent Noise "
        "Mask), or the one connected here: white is generated."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """What ComfyUI shows of it."""
        return {
            "required": {"model": ("MODEL",)},
            "optional": {
                "mask": ("MASK", {"tooltip": "white is generated; for a video, a mask for each frame or one for all"}),
                "settings": (SETTINGS,),
            },
        }

    def apply(self, model: Any, mask: torch.Tensor | None = None, settings: Settings | None = None) -> tuple[Any]:
        """The model with the wrappers of `sampling.CachedSampling`.

        Raises:
            HetCacheError: this ComfyUI has no wrappers.
        """
        return (CachedSampling(settings or Settings(), mask).attach(model),)


class HetCachePreview:
    """The plan before it is run: which tokens are computed, and in which steps."""

    CATEGORY = CATEGORY
    FUNCTION = "preview"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("plan", "description")
    DESCRIPTION = "Draws the plan of a model from HetCache Apply, for latents that will be sampled in so many steps."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """What ComfyUI shows of it."""
        return {
            "required": {
                "model": ("MODEL",),
                "latent": ("LATENT",),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
            }
        }

    def preview(self, model: Any, latent: dict[str, Any], steps: int) -> tuple[torch.Tensor, str]:
        """The picture `[1, H, W, 3]`, 0 to 1, and the plan in words.

        Raises:
            PlanError: no plan can be made.
        """
        plan = attached(model).plan_for_latents(model.model, latent, steps)
        return torch.from_numpy(preview_pixels(plan)).float()[None] / 255, plan.describe()


class HetCacheReport:
    """What the last run of a model was."""

    CATEGORY = CATEGORY
    FUNCTION = "report"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_NODE = True
    DESCRIPTION = "What was cached in the run that made these latents: steps by kind, and what was not as planned."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """What ComfyUI shows of it."""
        return {"required": {"model": ("MODEL",), "latent": ("LATENT", {"tooltip": "what the sampler gives"})}}

    def report(self, model: Any, latent: dict[str, Any]) -> dict[str, Any]:
        """The report of the run; the latents are its result, so that it comes after the run.

        Raises:
            PlanError: the model has no cache.
        """
        text = attached(model).report()
        return {"ui": {"text": (text,)}, "result": (text,)}


def attached(model: Any) -> CachedSampling:
    """What the apply node hung on a model.

    Raises:
        PlanError: it was not applied.
    """
    sampling = model.get_attachment(KEY)
    if not isinstance(sampling, CachedSampling):
        raise PlanError("connect the model that HetCache Apply gives")
    return sampling


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "HetCacheSettings": HetCacheSettings,
    "HetCacheApply": HetCacheApply,
    "HetCachePreview": HetCachePreview,
    "HetCacheReport": HetCacheReport,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HetCacheSettings": "HetCache Settings",
    "HetCacheApply": "HetCache Apply",
    "HetCachePreview": "HetCache Plan Preview",
    "HetCacheReport": "HetCache Report",
}
