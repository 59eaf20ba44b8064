"""How far the uncached reference model moves from step to step, and what its generative tokens attend to.

    python benchmarks/drift.py --clips 6 --real    # writes benchmarks/results/drift.json
    python benchmarks/drift_page.py                 # plots in docs/, and the figures of docs/drift.md

What is recorded of each clip is kept in out/drift as it is done; a run that was cut short goes on with the clips that
are missing. Nothing here is timed, so the machine may be busy.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from drift_measures import attention_measures, extrapolate, key_mass, mean_by_kind, prediction_errors, relative_error
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from hetcache_compile import reference
from hetcache_compile.bench.quality import describe_clip, weights_digest
from hetcache_compile.edit.editing import EditRequest, make_plan, run_pipeline
from hetcache_compile.edit.media import Clip
from hetcache_compile.files import atomically
from hetcache_compile.plan.partition import TokenKind, classify
from hetcache_compile.plan.schedule import time_distances
from hetcache_compile.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULT, PARTS = ROOT / "benchmarks" / "results" / "drift.json", ROOT / "out" / "drift"
LAGS = (1, 2, 4, 8)
"""A FULL step comes every 4 to 12 steps in our presets, so caches grow up to that old."""
QUANTITIES = ("input", "key", "value", "output")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
TOP = 0.1
PREDICTED, GAPS = ("key", "value"), (1, 2, 4)
DIGITS = 3


class Recorder(TorchFunctionMode):
    """Measures one run of a WanVACE transformer while it goes.

    Attributes:
        change: float64 `[quantities, blocks, lags, S, kinds]`, mean relative change of a token since `lag` steps ago;
            NaN where there is no such step.
        line: float64 `[key and value, blocks, gaps, S, kinds]`, mean relative error of a token's state on the straight
            line in sigma through those of `gap` and 2 `gap` steps ago.
        mass: float32 `[S, blocks, N]`, `key_mass` of the generative queries.
        outputs: `S` tensors `[N, features]`, what the model predicts for each token.
    """

    def __init__(self, kind: NDArray[np.uint8], blocks: list[str], sigmas: NDArray[np.float64]) -> None:
        super().__init__()
        self.kind, self.blocks, self.sigmas = kind, blocks, sigmas.tolist()
        steps = len(sigmas)
        self.generative = torch.from_numpy(np.flatnonzero(kind == TokenKind.GENERATIVE))
        self.change = np.full((len(QUANTITIES), len(blocks), len(LAGS), steps, len(TokenKind)), np.nan)
        self.line = np.full((len(PREDICTED), len(blocks), len(GAPS), steps, len(TokenKind)), np.nan)
        self.mass = np.zeros((steps, len(blocks), kind.size), dtype=np.float32)
        self.outputs: list[torch.Tensor] = []
        self.past: dict[tuple[str, str], deque[torch.Tensor]] = defaultdict(lambda: deque(maxlen=max(LAGS)))
        self.attending: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.attending:
            self.see_attention(self.attending, **{name: kwargs[name][0] for name in ("query", "key", "value")})
        return func(*args, **(kwargs or {}))

    def see_attention(self, block: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Self-attention's `[heads, N, head_dim]` as they are, norms and positions included."""
        self.see("key", block, key.transpose(0, 1).flatten(1))
        self.see("value", block, value.transpose(0, 1).flatten(1))
        self.mass[len(self.outputs), self.blocks.index(block)] = key_mass(query, key, self.generative)

    def see(self, quantity: str, block: str, now: torch.Tensor) -> None:
        """Compare `[N, features]` with the same of earlier steps."""
        now = now.float().clone()
        past, step, b = self.past[quantity, block], len(self.outputs), self.blocks.index(block)
        for i, lag in enumerate(LAGS):
            if len(past) >= lag:
                error = relative_error(past[-lag], now)
                self.change[QUANTITIES.index(quantity), b, i, step] = mean_by_kind(error, self.kind)
        for i, gap in enumerate(GAPS if quantity in PREDICTED else ()):
            if len(past) >= 2 * gap:
                times = [self.sigmas[step - gap], self.sigmas[step - 2 * gap]]
                guess = extrapolate([past[-gap], past[-2 * gap]], times, self.sigmas[step])
                error = relative_error(guess, now)
                self.line[PREDICTED.index(quantity), b, i, step] = mean_by_kind(error, self.kind)
        past.append(now)


@contextmanager
def recording(model: Any, recorder: Recorder) -> Iterator[None]:
    """Let the recorder see each block's residual stream, self-attention and output, and the model's output.

    The stream is taken where the first norm reads it: the first control block adds the latents to its input before.
    A control block's output is its hint to the main blocks; its stream is the input of the next.
    """
    handles = []

    def attend(block: str | None) -> None:
        recorder.attending = block

    for name, block in named_blocks(model).items():
        handles += [
            block.norm1.register_forward_pre_hook(lambda _, args, n=name: recorder.see("input", n, args[0][0])),
            block.attn1.register_forward_pre_hook(lambda *_, n=name: attend(n)),
            block.attn1.register_forward_hook(lambda *_: attend(None)),
            block.register_forward_hook(
                lambda _, args, out, n=name: recorder.see("output", n, (out[0] if isinstance(out, tuple) else out)[0])
            ),
        ]
    patch = model.config.patch_size
    handles.append(model.register_forward_hook(lambda _, args, out: recorder.outputs.append(to_tokens(out[0], patch))))
    try:
        with recorder:
            yield
    finally:
        for handle in handles:
            handle.remove()


def named_blocks(model: Any) -> dict[str, Any]:
    """The blocks in the order in which they run."""
    control = {f"control {i}": block for i, block in enumerate(model.vace_blocks)}
    return {**control, **{f"main {i}": block for i, block in enumerate(model.blocks)}}


def to_tokens(output: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """A model's output `[1, C, T, H, W]` as `[N, features]`."""
    channels, *sizes = output.shape[1:]
    split = [n for size, p in zip(sizes, patch, strict=True) for n in (size // p, p)]
    return output[0].reshape(channels, *split).permute(1, 3, 5, 0, 2, 4, 6).flatten(0, 2).flatten(1).float()


@dataclass(frozen=True)
class Part:
    """What was recorded of one clip: see `Recorder`; `sigmas` `[S]` are the scheduler's, without the last, 0."""

    kind: NDArray[np.uint8]
    distance: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    change: NDArray[np.float64]
    line: NDArray[np.float64]
    mass: NDArray[np.float32]
    outputs: NDArray[np.float32]


def record(pipe: Any, clip: Clip, steps: int) -> Part:
    """One uncached run, without guidance."""
    request = EditRequest(
        clip.video,
        clip.mask,
        clip.prompt,
        num_inference_steps=steps,
        guidance_scale=1.0,
        max_sequence_length=reference.MAX_TEXT_LENGTH,
    )
    plan = make_plan(pipe, request, "full")
    _, distance = classify(plan.tokens_of(TokenKind.GENERATIVE), margin=0)
    sigmas = plan.timesteps / pipe.scheduler.config.num_train_timesteps
    recorder = Recorder(plan.token_kind, list(named_blocks(pipe.transformer)), sigmas)
    with recording(pipe.transformer, recorder):
        run_pipeline(pipe, request, clip.name, lambda *_: None, decode=False)
    outputs = torch.stack(recorder.outputs).numpy()
    return Part(plan.token_kind, distance, sigmas, recorder.change, recorder.line, recorder.mass, outputs)


def recorded(pipe: Any, clip: Clip, steps: int, digest: str) -> Part:
    """The clip's part, from the disk if an earlier run of the same clip, model and steps left it there."""
    described = json.dumps([describe_clip(clip), steps, digest])
    path = PARTS / f"{clip.name}-{hashlib.sha256(described.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        with np.load(path) as file:
            return Part(**file)
    part = record(pipe, clip, steps)
    atomically(path, lambda temporary: np.savez(temporary, **vars(part)))
    return part


def measure(part: Part) -> dict[str, NDArray[np.float64]]:
    """Every array of the result, for one clip."""
    return {
        "change": part.change,
        "line": part.line,
        **prediction_errors(part.outputs, part.sigmas, part.kind, LAGS),
        **attention_measures(part.mass, part.kind, part.distance, SHARES, TOP, LAGS),
    }


def summarise(parts: dict[str, Part], clips: dict[str, Clip]) -> dict[str, Any]:
    """Means over the clips, and each clip's own medians over steps of means over blocks."""
    measures = {name: measure(part) for name, part in parts.items()}
    names = next(iter(measures.values()))
    return {
        "sigmas": rounded(next(iter(parts.values())).sigmas),
        "mean": {name: rounded(known_mean([of[name] for of in measures.values()], 0)) for name in names},
        "clips": {name: clip_summary(clips[name], parts[name], of) for name, of in measures.items()},
    }


def clip_summary(clip: Clip, part: Part, of: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """One clip in few figures, to see how much clips differ. The last steps are far from the others: so medians."""
    return {
        "masked": rounded(clip.mask.mean()),
        "tokens": np.bincount(part.kind, minlength=len(TokenKind)).tolist(),
        "change": rounded(np.nanmedian(known_mean(of["change"], 1), axis=2)),
        "line": rounded(np.nanmedian(known_mean(of["line"], 1), axis=2)),
        "prediction": rounded(np.nanmedian(of["prediction"][0], axis=2)),
        "mass": rounded(known_mean(of["mass"], (0, 1))),
        "shared_curve": rounded(known_mean(of["shared_curve"], 0)),
        "nearest_curve": rounded(known_mean(of["nearest_curve"], 0)),
        "overlap": rounded(known_mean(of["overlap"], 2)),
    }


def known_mean(values: Any, axis: int | tuple[int, ...]) -> NDArray[np.float64]:
    """The mean of what is not NaN; NaN where nothing is known."""
    array = np.asarray(values)
    known = ~np.isnan(array)
    count = known.sum(axis=axis)
    return np.divide(np.where(known, array, 0).sum(axis=axis), count, out=np.full(count.shape, np.nan), where=count > 0)


def rounded(array: Any) -> Any:
    """Nested lists of `DIGITS` significant digits, None for NaN."""
    if np.ndim(array):
        return [rounded(item) for item in array]
    return None if np.isnan(array) else float(f"{array:.{DIGITS}g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=6, help="held-out procedural clips")
    parser.add_argument("--real", action="store_true", help="the held-out real clip too")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    pipe = reference.load(torch.float32)
    digest = weights_digest(pipe)
    found = [*reference.held_out(options.clips), *([reference.real_clip()] if options.real else [])]
    clips = {clip.name: clip for clip in found}
    parts = {}
    for name, clip in clips.items():
        parts[name] = recorded(pipe, clip, options.steps, digest)
        print(name, "done", flush=True)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(options.steps)
    result = {
        **provenance("cpu"),
        "weights": digest,
        "distances": rounded(time_distances(pipe.transformer, scheduler.timesteps)),
        "axes": {
            "quantities": QUANTITIES,
            "blocks": list(named_blocks(pipe.transformer)),
            "lags": LAGS,
            "predicted": PREDICTED,
            "gaps": GAPS,
            "kinds": [kind.name.lower() for kind in TokenKind],
            "shares": SHARES,
            "top": TOP,
        },
        **summarise(parts, clips),
    }
    atomically(RESULT, lambda temporary: Path(temporary).write_text(json.dumps(result, separators=(",", ":")) + "\n"))


if __name__ == "__main__":
    main()
