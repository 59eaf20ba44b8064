"""How well the reference model does in 4 and 8 steps, distilled and as it is: the second table of its model card.

    python benchmarks/reference/evaluate_few_steps.py     # writes benchmarks/results/reference_few_steps.json
    python benchmarks/tables.py                           # puts the figures into the model card

Against the true video and against the teacher's 50 steps with guidance from the same noise, inside the mask: the
distilled model; the teacher in as many steps, with guidance and without, and at the times of the distilled model; and
the fills of evaluate.py. Goes on where it was cut short.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate import BASELINES

from hetcache_compile import reference
from hetcache_compile.bench.quality import load_frames, save_frames
from hetcache_compile.edit.editing import EditRequest, run_pipeline
from hetcache_compile.edit.media import Clip
from hetcache_compile.edit.metrics import compare, psnr
from hetcache_compile.files import atomically
from hetcache_compile.provenance import provenance
from hetcache_compile.reference.few_steps import DIFFERENCE, add_difference

RESULT = Path(__file__).parents[1] / "results" / "reference_few_steps.json"
METRICS = ("psnr_db", "ssim", "flip")


@dataclass(frozen=True)
class Sampler:
    """A model, a number of steps and a guidance scale.

    Attributes:
        distilled: whether the difference is added to the weights.
        own_times: whether the steps are those of the distilled model's solver.
    """

    distilled: bool
    own_times: bool
    steps: int
    guidance: float


TEACHER = "teacher, 50 steps"
SAMPLERS = {
    TEACHER: Sampler(False, False, 50, reference.GUIDANCE_SCALE),
    **{
        f"{name}, {steps} steps": Sampler(distilled, own_times, steps, guidance)
        for steps in (8, 4)
        for name, distilled, own_times, guidance in (
            ("teacher", False, False, reference.GUIDANCE_SCALE),
            ("teacher at the times of the distilled", False, True, reference.GUIDANCE_SCALE),
            ("teacher without guidance", False, True, 1.0),
            ("distilled", True, True, 1.0),
        )
    },
}
"""The teacher first: the others are compared with it."""
CALLS = {name: sampler.steps * (2 if sampler.guidance > 1 else 1) for name, sampler in SAMPLERS.items()}


def run(sampler: Sampler, clip: Clip, difference: Path) -> Any:
    """The result, uint8 `[T, H, W, 3]`."""
    pipe = reference.load(few_steps=sampler.own_times)
    if sampler.distilled:
        add_difference(pipe.transformer, difference)
    request = EditRequest(
        video=clip.video, mask=clip.mask, prompt=clip.prompt, num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance, max_sequence_length=reference.MAX_TEXT_LENGTH,
    )  # fmt: skip
    return run_pipeline(pipe, request, clip.name, lambda *_: None).frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=12, help="held-out procedural clips, beside the real one")
    parser.add_argument("--samplers", default=";".join(SAMPLERS), help="those to run now, with semicolons between")
    parser.add_argument("--difference", type=Path, default=DIFFERENCE)
    parser.add_argument("--frames", type=Path, default=Path("out/few_steps_evaluation"), help="where results are kept")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    clips: dict[str, Any] = json.loads(options.out.read_text())["clips"] if options.out.exists() else {}
    chosen = options.samplers.split(";")
    for clip in [*reference.held_out(options.clips), reference.real_clip()]:
        found = clips.setdefault(clip.name, {})
        teacher = options.frames / f"{clip.name}.npz"
        for name in [*(name for name in SAMPLERS if name in chosen), *BASELINES]:
            if name in found:
                continue
            frames = run(SAMPLERS[name], clip, options.difference) if name in SAMPLERS else BASELINES[name](clip)
            if name == TEACHER:
                save_frames(teacher, frames)
            quality = compare(frames, clip.truth, clip.mask)["generative"]
            found[name] = {
                "to_truth": {metric: quality[metric] for metric in METRICS},
                "to_teacher": None if name == TEACHER else psnr(frames, load_frames(teacher), clip.mask),
            }
            text = json.dumps({**provenance("cpu"), "calls": CALLS, "clips": clips}, indent=1) + "\n"
            atomically(options.out, lambda temporary, text=text: Path(temporary).write_text(text))
            print(clip.name, name, json.dumps(found[name]), flush=True)


if __name__ == "__main__":
    main()
