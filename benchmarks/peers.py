"""Other libraries' caches as methods of `hetcache bench quality`: diffusers' own, and cache-dit's.

Each is enabled through its public interface on a copy of the model, and gets the best of three ways to run: compiled
whole (graph breaks allowed), compiled block by block, or eager. `firstblock:0.1` is a method: a peer and its setting.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import diffusers
import torch

from hetcache_compile import reference
from hetcache_compile.bench.methods import Method
from hetcache_compile.edit.editing import EditRequest, Progress, Run, run_pipeline
from hetcache_compile.errors import MethodError
from hetcache_compile.passes.analysis.flops import flop_counter

FROZEN_STEPS = 14
"""Enough for every setting below to reuse something: MagCache first computes a fifth of 50 steps."""
WAYS = ("compiled", "compiled blocks", "eager")
Enable = Callable[[Any, Any, EditRequest, float], None]
"""Called as `enable(pipe, model, request, setting)`; the model is a copy that may be changed."""


@dataclass(frozen=True)
class Peer:
    """A cache of another library, and the settings it is measured at: about 1.5x to 5x where it can."""

    label: str
    enable: Enable
    settings: tuple[float, ...]
    package: str = "diffusers"


@dataclass
class Rival:
    """One peer at one setting, as a `methods.RunEdit`.

    Without `timed` it runs eagerly, once, and its FLOPs are counted. With it, `ways` says which ways are tried on the
    first clip; the fastest is kept in `best` by peer, where other settings find it.
    """

    peer: Peer
    setting: float
    timed: bool
    best: dict[str, str] = field(default_factory=dict)
    ways: tuple[str, ...] = WAYS
    _ready: dict[str, Any] = field(default_factory=dict)
    _frozen: float | None = None
    _flops: int = 0

    def __call__(self, pipe: Any, request: EditRequest, progress: Progress) -> tuple[Run, dict[str, Any]]:
        if find_spec(self.peer.package) is None:
            raise MethodError(f"{self.peer.package} is not installed")
        ours = pipe.transformer
        plain = getattr(ours, "_orig_mod", ours)
        try:
            with quiet():
                if self._frozen is None:
                    self._frozen = self.frozen_input_error(pipe, plain, request, progress)
                runs, broken = self.try_ways(pipe, plain, request, progress)
        except Exception as error:
            raise MethodError(reason(error)) from error
        finally:
            pipe.transformer = ours
        way = min(runs, key=lambda name: sum(runs[name].seconds))
        if self.timed:
            self.best[self.peer.label] = way
        found = {"way": way, "frozen_input_error": self._frozen}
        return runs[way], found | ({"broken": broken} if broken else {}) | (
            {} if self.timed else {"flops": self._flops}
        )

    def try_ways(
        self, pipe: Any, plain: Any, request: EditRequest, progress: Progress
    ) -> tuple[dict[str, Run], dict[str, str]]:
        """A run of each way that works, and why the others do not. Raises what the last raised if none does."""
        ways = [self.best[self.peer.label]] if self.peer.label in self.best else list(self.ways)
        runs, broken = {}, {}
        for way in ways if self.timed else WAYS[-1:]:
            try:
                runs[way] = self.run(pipe, plain, request, way, progress)
            except Exception as error:
                broken[way], last = reason(error), error
        if not runs:
            raise last
        return runs, broken

    def run(self, pipe: Any, plain: Any, request: EditRequest, way: str, progress: Progress) -> Run:
        """One edit; where it counts, after another one that compiles."""
        if way not in self._ready:
            model = self.enabled(pipe, plain, request)
            if way == "compiled blocks":
                model.compile_repeated_blocks()
            self._ready[way] = pipe.transformer = torch.compile(model) if way == "compiled" else model
            if self.timed:
                run_pipeline(pipe, request, f"warming up, {way}", progress, decode=False)
        pipe.transformer = self._ready[way]
        if self.timed:
            return run_pipeline(pipe, request, "denoising", progress)
        with flop_counter() as counter:
            run = run_pipeline(pipe, request, "denoising", progress)
        self._flops = counter.get_total_flops()
        return run

    def enabled(self, pipe: Any, plain: Any, request: EditRequest) -> Any:
        """A copy of the model with the cache."""
        pipe.transformer = model = copy.deepcopy(plain)
        before = forwards(model)
        self.peer.enable(pipe, model, request, self.setting)
        if forwards(model) == before:
            raise MethodError("hooks nothing in this model")
        return model

    def frozen_input_error(self, pipe: Any, plain: Any, request: EditRequest, progress: Progress) -> float:
        """How far the output gets from the model's own while its inputs stay the same; a right cache gives 0.

        The largest relative error over `FROZEN_STEPS` steps of guidance, on one latent frame of the edit's first call.
        """
        calls: list[dict[str, Any]] = []
        pipe.transformer = plain
        handle = plain.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
        try:
            run_pipeline(pipe, replace(request, num_inference_steps=1), "frozen inputs", progress, decode=False)
        finally:
            handle.remove()
        first = {**calls[0], "return_dict": False}
        first = {name: value[:, :, :1] if is_video(value) else value for name, value in first.items()}
        text = first["encoder_hidden_states"]
        branches = {"cond": first, "uncond": {**first, "encoder_hidden_states": text.roll(1, -1)}}
        model = self.enabled(pipe, plain, request)
        worst = 0.0
        with torch.no_grad():
            expected = {name: plain(**kwargs)[0] for name, kwargs in branches.items()}
            for _ in range(min(FROZEN_STEPS, request.num_inference_steps)):
                for name, kwargs in branches.items():
                    with model.cache_context(name):
                        error = (model(**kwargs)[0] - expected[name]).norm() / expected[name].norm()
                    worst = max(worst, float(error))
        return worst


def rivals(names: list[str], timed: bool, best: dict[str, str], ways: tuple[str, ...] = WAYS) -> list[Method]:
    """The methods of names such as `firstblock:0.1`."""
    methods = []
    for name in names:
        kind, _, setting = name.partition(":")
        methods.append(Method(name, runner=Rival(PEERS[kind], float(setting), timed, best, ways)))
    return methods


def reason(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def is_video(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 5


def forwards(model: Any) -> list[Any]:
    """What each module's call runs: hooks and patches put something else there."""
    return [(id(type(module)), id(module.__dict__.get("forward"))) for module in model.modules()]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no prints of other libraries."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def first_block(pipe: Any, model: Any, request: EditRequest, threshold: float) -> None:
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))


def mag(pipe: Any, model: Any, request: EditRequest, threshold: float) -> None:
    """MagCache's own pairs of threshold and longest run: a larger error allowed, more steps skipped."""
    longest = {0.06: 2, 0.12: 4, 0.24: 6}.get(threshold)
    if longest is None:
        raise MethodError(f"no longest run is known for a threshold of {threshold:g}: give 0.06, 0.12 or 0.24")
    ratios = magnitude_ratios(pipe, copy.deepcopy(model), request)
    model.enable_cache(
        diffusers.MagCacheConfig(
            threshold=threshold,
            max_skip_steps=longest,
            num_inference_steps=request.num_inference_steps,
            mag_ratios=ratios,
        )
    )


RATIOS: dict[int, list[float]] = {}
"""Of MagCache, by number of steps."""


def magnitude_ratios(pipe: Any, model: Any, request: EditRequest) -> list[float]:
    """MagCache's calibration, on a clip that is not held out. It prints its result, and gives it in no other way."""
    steps = request.num_inference_steps
    if steps not in RATIOS:
        model.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=steps))
        (clip,) = reference.calibration_clips(1, *request.mask.shape[:2])
        calibration = replace(request, video=clip.video, mask=clip.mask, prompt=clip.prompt)
        before, pipe.transformer, printed = pipe.transformer, model, io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                run_pipeline(pipe, calibration, "calibrating MagCache", lambda *_: None, decode=False)
        finally:
            pipe.transformer = before
        RATIOS[steps] = ast.literal_eval(next(line for line in printed.getvalue().splitlines() if line[1:2].isdigit()))
    return RATIOS[steps]


def taylor_seer(pipe: Any, model: Any, request: EditRequest, interval: float) -> None:
    """The lite mode: blocks are skipped and the output is predicted. The default patterns match nothing in WanVACE."""
    model.enable_cache(
        diffusers.TaylorSeerCacheConfig(
            cache_interval=int(interval), max_order=1, use_lite_mode=True, taylor_factors_dtype=torch.float32
        )
    )


def clock(model: Any) -> Callable[[], float]:
    """The timestep of the call that runs."""
    now: list[float] = [0.0]
    model.register_forward_pre_hook(
        lambda _, args, kwargs: now.__setitem__(0, float(kwargs["timestep"].flatten()[0])), with_kwargs=True
    )
    return lambda: now[0]


def pyramid(pipe: Any, model: Any, request: EditRequest, interval: float) -> None:
    span = (-1, 1001)
    model.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=int(interval),
            cross_attention_block_skip_range=int(interval),
            spatial_attention_timestep_skip_range=span,
            cross_attention_timestep_skip_range=span,
            current_timestep_callback=clock(model),
        )
    )


def faster(pipe: Any, model: Any, request: EditRequest, interval: float) -> None:
    model.enable_cache(
        diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=int(interval),
            tensor_format="BCFHW",
            current_timestep_callback=clock(model),
        )
    )


def sea(pipe: Any, model: Any, request: EditRequest, threshold: float) -> None:
    """SeaCache wants the step and sigma in each call's context; the pipeline does not give them, so they are added."""
    model.enable_cache(
        diffusers.SeaCacheConfig(
            threshold=threshold,
            max_consecutive_cached=5,
            raw_vision_callback=lambda _, args, kwargs: list(kwargs["hidden_states"].unbind(0)),
        )
    )
    steps, context, counts = request.num_inference_steps, model.cache_context, {}
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)

    def counted(name: str) -> Any:
        step = counts[name] = (counts.get(name, -1) + 1) % steps
        return context(name, step_index=step, sigma=float(scheduler.sigmas[step]), num_inference_steps=steps)

    model.cache_context = counted


def dual_block(
    pipe: Any, model: Any, request: EditRequest, threshold: float, *, front: int, back: int, taylor: bool
) -> None:
    """cache-dit's DBCache: the first `front` blocks decide and run always, the last `back` too."""
    import cache_dit

    steps = request.num_inference_steps
    cache_dit.enable_cache(
        model,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=front,
            Bn_compute_blocks=back,
            residual_diff_threshold=threshold,
            max_warmup_steps=max(2, steps // 12),
            num_inference_steps=steps,
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None,
    )


def dual(label: str, settings: tuple[float, ...], **options: Any) -> Peer:
    return Peer(f"cache-dit {label}", functools.partial(dual_block, **options), settings, "cache_dit")


PEERS = {
    "firstblock": Peer("diffusers FirstBlockCache", first_block, (0.1, 0.2, 0.4)),
    "magcache": Peer("diffusers MagCache", mag, (0.06, 0.12, 0.24)),
    "taylorseer": Peer("diffusers TaylorSeer", taylor_seer, (2, 3, 5, 7)),
    "pab": Peer("diffusers PyramidAttentionBroadcast", pyramid, (3, 5)),
    "fastercache": Peer("diffusers FasterCache", faster, (2,)),
    "seacache": Peer("diffusers SeaCache", sea, (0.1, 0.3, 0.6)),
    "dbcache-f1b0": dual("DBCache F1B0", (0.08, 0.16, 0.4), front=1, back=0, taylor=False),
    "dbcache-f2b2": dual("DBCache F2B2", (0.08, 0.24), front=2, back=2, taylor=False),
    "dbcache-taylor": dual("DBCache F1B0, TaylorSeer", (0.08, 0.16, 0.4), front=1, back=0, taylor=True),
}
NAMES = [f"{kind}:{setting:g}" for kind, peer in PEERS.items() for setting in peer.settings]
