"""One model of ComfyUI that is cached while it samples: what the node hangs on the model.

ComfyUI calls a wrapper around each run of a sampler, where all steps are known, and one around each call of the model.
The first makes the plan and opens a session. The second puts the compiled model in the place of the plain one for this
call, as ComfyUI's own node for `torch.compile` does. Between calls nothing is changed, so ComfyUI loads, patches and
unloads the model as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import GridMismatchError, HetCacheError, MaskError, PlanError, SessionError
from ..plan.options import USUAL, PlanOptions
from ..plan.plan import Plan
from ..plan.schedule import PRESETS
from ..runtime.backend import hetcache_backend
from ..sessions.session import Session, session
from .latents import grid_of, patch_of_model, tokens_of_denoise_mask, tokens_of_mask

LOG = logging.getLogger(__name__)
KEY = "hetcache"
"""Of what the node hangs on a model."""
SCHEDULES = tuple(name for name, preset in PRESETS.items() if not preset.options)
"""Presets that need nothing but the number of steps."""


@dataclass(frozen=True)
class Settings:
    """How an edit is cached.

    Attributes:
        schedule: a preset, one of `SCHEDULES`, or a cycle such as `"FRRP"`.
        margin: how far from the mask the margin reaches, in tokens.
        context_ratio: share of the context that PARTIAL steps compute too.
        strict: whether what cannot be cached is an error, in place of a warning.
        compiler: the inner compiler of the backend: `"inductor"`, or `"eager"`, which compiles nothing.
        reference_frames: latent frames of a video that stand in front and hold references, such as VACE's.
    """

    schedule: str = "balanced"
    margin: float = PlanOptions.margin
    context_ratio: float = PlanOptions.context_ratio
    strict: bool = False
    compiler: str = "inductor"
    reference_frames: int = 0


class CachedSampling:
    """The wrappers of one applied node, and what its last run was.

    Args:
        settings: how to cache.
        mask: of the node, see `tokens_of_mask`; None for the latents' own noise mask alone. With both, what either of
            them covers is generated.
    """

    def __init__(self, settings: Settings, mask: torch.Tensor | None = None) -> None:
        self.settings, self.mask = settings, mask
        self.session: Session | None = None
        """Of the run now, or of the last one."""
        self.refusal = "nothing was sampled yet"
        """Why the last run, or a part of it, was not cached; empty if it was."""
        self._model: Any = None
        self._compiled: Any = None

    def attach(self, patcher: Any) -> Any:
        """A clone of a `ModelPatcher` with these wrappers, in the place of those of another such node.

        Raises:
            HetCacheError: this ComfyUI has no wrappers.
        """
        try:
            from comfy.patcher_extension import CallbacksMP, WrappersMP
        except ImportError as error:
            raise HetCacheError("the node needs ComfyUI of 2025 or newer, which has comfy.patcher_extension") from error
        # Newer versions stream weights into each layer while it runs, which Dynamo cannot follow.
        is_dynamic = getattr(patcher, "is_dynamic", None)
        clone = patcher.clone(disable_dynamic=True) if is_dynamic is not None and is_dynamic() else patcher.clone()
        clone.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
        clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
        clone.remove_callbacks_with_key(CallbacksMP.ON_APPLY_HOOKS, KEY)
        # Its own node would put another compiled model into the place of this one.
        clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, "torch.compile")
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self.sample)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.apply_model)
        clone.add_callback_with_key(CallbacksMP.ON_APPLY_HOOKS, KEY, self.weights_changed)
        clone.set_attachments(KEY, self)
        return clone

    # What ComfyUI calls

    def sample(
        self,
        executor: Any,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: Any,
        callback: Any,
        noise: torch.Tensor,
        latent_image: Any = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Any:
        """Around one run of a sampler: the session.

        Args:
            executor: runs the sampler.
            guider: has the model in `inner_model`.
            sigmas: `[S + 1]`, the noise level of each step, and the last one.
            extra_args: of the sampler.
            callback: shows previews.
            noise: of the shape of the latents.
            latent_image: what is edited.
            denoise_mask: see `tokens_of_denoise_mask`.
            disable_pbar: of the sampler.

        Raises:
            PlanError: no plan can be made, and the settings are strict.
            SessionError: the model is not cached, and the settings are strict.
        """
        arguments = (guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        model = guider.inner_model
        self.session, self.refusal = None, ""
        try:
            plan = self.plan_for(model, noise.shape, sigmas, denoise_mask)
        except PlanError as error:
            self._refuse(error)
            return executor(*arguments)
        options: dict[str, Any] = {"inner": self.settings.compiler}
        with session(plan, strict=self.settings.strict) as self.session:
            self._model = model.diffusion_model
            self._compiled = torch.compile(self._model, backend=hetcache_backend, options=options)
            try:
                result = executor(*arguments)
            finally:
                self._model = self._compiled = None  # the model may be unloaded
        LOG.info("hetcache: %s", self.calls())
        return result

    def apply_model(
        self,
        executor: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Around one call of the model: the compiled one in its place.

        Conditions that ComfyUI puts into one call share a cache, by the identifiers that it gives them.
        """
        given = {} if transformer_options is None else transformer_options
        arguments = (x, t, c_concat, c_crossattn, control, given)
        owner, opened = executor.class_obj, self.session
        # Outside a run, and for copies of the model on other GPUs.
        if opened is None or self._compiled is None or owner.diffusion_model is not self._model:
            return executor(*arguments, **kwargs)
        conditions = given.get("uuids") or given.get("cond_or_uncond") or ()
        owner.diffusion_model = self._compiled
        try:
            # Joined, because with several GPUs a model is called in threads.
            with opened.joined(), opened.branch(" ".join(map(str, conditions))):
                return executor(*arguments, **kwargs)
        except GridMismatchError as error:  # a part of the latents: conditions with an area, windows of a video
            self._refuse(error)
        finally:
            owner.diffusion_model = self._model
        return executor(*arguments, **kwargs)

    def weights_changed(self, patcher: Any, hooks: Any) -> None:
        """ComfyUI has put other weights into the model between two calls, in place where torch does not count it."""
        if self.session is not None and self._compiled is not None:
            self.session.restart()

    # Plans and reports

    def plan_for(
        self, model: Any, shape: Sequence[int], sigmas: torch.Tensor, denoise_mask: torch.Tensor | None
    ) -> Plan:
        """The plan of one run of a sampler.

        Args:
            model: with a `diffusion_model`, a `latent_format`, and a `model_sampling` that knows the times of sigmas.
            shape: of the latents.
            sigmas: `[S + 1]`, see `sample`.
            denoise_mask: see `tokens_of_denoise_mask`.

        Raises:
            PlanError: the model or its latents are not known, there is no step, or a setting is out of range.
            MaskError: there is no mask, it is empty, or it is not like the latents.
        """
        patch = patch_of_model(model.diffusion_model)
        of_latents = [] if denoise_mask is None else [tokens_of_denoise_mask(denoise_mask, shape, patch)]
        plan = self._plan(model, shape, len(sigmas) - 1, of_latents)
        levels = sigmas[:-1]
        times = model.model_sampling.timestep(levels).float()  # what the model is given
        return replace(plan, timesteps=times.double().cpu().numpy(), sigmas=levels.double().cpu().numpy())

    def plan_for_latents(self, model: Any, latent: Mapping[str, Any], steps: int) -> Plan:
        """The plan for latents before they are sampled, without times.

        Args:
            model: see `plan_for`.
            latent: `samples` and perhaps a `noise_mask`, see `tokens_of_mask`. A sampler scales it by a way of its own,
                which may differ by a token at the edge.
            steps: how many.

        Raises:
            PlanError: see `plan_for`.
            MaskError: see `plan_for`.
        """
        shape, mask = latent["samples"].shape, latent.get("noise_mask")
        of_latents = [] if mask is None else [self._tokens(model, mask, shape)]
        return self._plan(model, shape, steps, of_latents)

    def _plan(self, model: Any, shape: Sequence[int], steps: int, of_latents: Sequence[NDArray[np.bool_]]) -> Plan:
        own = [] if self.mask is None else [self._tokens(model, self.mask, shape)]
        masks = [*own, *of_latents]
        if not masks:
            raise MaskError("there is no mask: connect one to the node, or give the latents a noise mask")
        grid, settings = grid_of(shape, patch_of_model(model.diffusion_model)), self.settings
        return Plan.from_mask(
            np.logical_or.reduce(masks), grid, num_inference_steps=steps, schedule=settings.schedule,
            margin=settings.margin, context_ratio=settings.context_ratio, **USUAL,
        )  # fmt: skip

    def _tokens(self, model: Any, mask: Any, shape: Sequence[int]) -> NDArray[np.bool_]:
        factor = getattr(getattr(model, "latent_format", None), "temporal_downscale_ratio", 1)
        patch = patch_of_model(model.diffusion_model)
        return tokens_of_mask(mask, shape, patch, factor, self.settings.reference_frames)

    def report(self) -> str:
        """The plan of the last run, and what it has run, in a few lines."""
        lines = [] if self.session is None else [self.session.plan.describe(), self.calls()]
        if self.refusal:
            lines.append(f"not cached: {self.refusal}")
        return "\n".join(lines)

    def calls(self) -> str:
        """The model calls of the last run by kind, in a line."""
        if self.session is None:
            return "no calls"
        stats, plain = self.session.stats, self.session.notices.refused_calls
        counts = ", ".join(f"{count} {kind}" for kind, count in stats.steps.items())
        refused = f"; {plain} calls ran plainly: the log says why" if plain else ""
        return f"model calls: {counts}; {stats.unplanned} unplanned{refused}"

    def _refuse(self, error: HetCacheError) -> None:
        """Say once in a run why it, or a part of it, is not cached.

        In the log, because Python says a warning once in a process, and the next run may have another workflow.

        Raises:
            HetCacheError: the settings are strict.
        """
        if self.settings.strict and isinstance(error, PlanError):
            raise error
        if self.settings.strict:
            raise SessionError(str(error)) from error
        if not self.refusal:
            self.refusal = str(error)
            LOG.warning("hetcache: this is sampled unmodified: %s", error)
