"""A small trained WanVACE in the box: every claim about speed and quality can be checked offline, in minutes.

`load()` gives diffusers' own `WanVACEPipeline`; `held_out(n)` the clips that it was never trained on. The model card
(`MODEL_CARD.md` beside this file) says how it was trained and what it can and cannot do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..edit.media import GREY, Clip, read_video
from ..errors import InputFileError
from .clips import HELD_OUT_TEXTURES, TRAINING_TEXTURES, Batch, render_batch
from .codec import BlockTransformCodec  # noqa: F401  diffusers loads it only where it was imported before
from .few_steps import add_difference, few_steps_scheduler

FOLDER = Path(__file__).parent / "weights"
"""A diffusers checkpoint: `from_pretrained(FOLDER)` works once this module is imported."""
CALIBRATION = Path(__file__).parent / "reference.hetcal"
"""What `hetcache calibrate` measured of it: see `calibration.Calibration`."""
NUM_FRAMES, SIZE = 17, 128
"""What the model was trained for: 17 frames of 128 x 128 pixels, 2,304 tokens."""
MAX_TEXT_LENGTH = 16
"""Text tokens; pass it as `max_sequence_length`. Cross-attention was never trained on longer padding."""
GUIDANCE_SCALE = 2.0
REAL_START = 142
"""Where the held-out clip has one shot."""
MASK_SHARES = (0.05, 0.2, 0.5)


def load(
    dtype: torch.dtype = torch.float32, device: str = "cpu", *, few_steps: bool = False, distilled: bool = False
) -> Any:
    """The reference model in diffusers' `WanVACEPipeline`.

    Args:
        dtype: of its weights.
        device: where it is.
        few_steps: whether its solver is one for 4 to 8 steps; see `few_steps_scheduler`.
        distilled: whether its weights are those for 4 and 8 steps without guidance (`guidance_scale=1`), and with them
            that solver.
    """
    from ..edit.editing import load_pipeline

    pipe = load_pipeline(FOLDER, dtype, device)
    if distilled:
        add_difference(pipe.transformer)
    if few_steps or distilled:
        pipe.scheduler = few_steps_scheduler()
    return pipe


def held_out(count: int) -> list[Clip]:
    """`count` procedural clips of texture families and seeds that training never saw.

    Masks of about 5, 20 and 50 % of the pixels take turns, of every kind, moving and still. The same clips each time.
    A prompt says what belongs inside the mask: it names the object only where the object is masked half of the time.
    """
    return [procedural_clip(number) for number in range(count)]


def procedural_clip(number: int) -> Clip:
    """Held-out clip `number`."""
    share = MASK_SHARES[number % len(MASK_SHARES)]
    kind = ("box", "ellipse", "brush", "border")[number // len(MASK_SHARES) % 4]
    generator = np.random.default_rng([2**31, number])
    batch = render_batch(
        1, NUM_FRAMES, SIZE, generator, textures=HELD_OUT_TEXTURES, mask_share=(share, share), mask_kinds=(kind,)
    )
    clip = to_clip(f"{number:02d}-{kind}-{share:.0%}".replace("%", ""), batch)
    return clip if float(batch.object_masked[0]) >= 0.5 else replace(clip, prompt="only pattern")


def calibration_clips(count: int, frames: int = NUM_FRAMES, size: int = SIZE) -> list[Clip]:
    """`count` clips to calibrate schedules on: the texture families of training, and seeds of their own.

    No held-out clip is among them, so what is tuned on these may be judged on those. Mask shares take turns.
    """
    return [_calibration_clip(number, frames, size) for number in range(count)]


def _calibration_clip(number: int, frames: int, size: int) -> Clip:
    share = MASK_SHARES[number % len(MASK_SHARES)]
    generator = np.random.default_rng([2**30, number])
    batch = render_batch(1, frames, size, generator, textures=TRAINING_TEXTURES, mask_share=(share, share))
    return to_clip(f"calibration-{number:02d}", batch)


def real_clip() -> Clip:
    """A real street scene that was kept out of training, with a moving mask. It comes with the extra `demo`."""
    from .demo import demo_clip as sample_clip
    from .demo import moving_mask

    video = read_video(sample_clip(), NUM_FRAMES, SIZE, SIZE, REAL_START)
    return masked_clip("bikes", video, moving_mask(NUM_FRAMES, SIZE, SIZE), "real video")


def demo_clip(edit: str) -> Clip:
    """A clip whose mask follows an object, and the prompt that removes or replaces it. `truth` shows the object.

    Raises:
        InputFileError: `edit` is neither "remove" nor "replace".
    """
    edits = {"remove": (1, "only pattern"), "replace": (0, "a yellow disc moves up over clouds")}
    if edit not in edits:
        raise InputFileError(f"the demo can {' or '.join(edits)} an object, not {edit!r}")
    number, prompt = edits[edit]
    generator = np.random.default_rng([77, number])
    return replace(to_clip(edit, render_batch(1, NUM_FRAMES, SIZE, generator, mask_kinds=("object",))), prompt=prompt)


def to_clip(name: str, batch: Batch) -> Clip:
    """The first clip of a rendered batch."""
    frames = ((batch.video[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()
    return masked_clip(name, frames, batch.mask[0, 0].numpy() > 0.5, batch.captions[0])


def masked_clip(name: str, video: Any, mask: Any, prompt: str) -> Clip:
    """A clip whose input is grey inside the mask, as WanVACE expects, and whose truth is the whole video."""
    return Clip(name, np.where(mask[..., None], GREY, video), mask, prompt, video)
