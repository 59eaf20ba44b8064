"""Video files of any kind, for tests: codecs, rates, turns, pixel aspects, sound."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SAMPLES = 44_100


def save_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    *,
    rate: int | Fraction = 16,
    pixels: str = "yuv420p",
    milliseconds: Sequence[int] | None = None,
    turn: int = 0,
    aspect: Fraction | None = None,
    transfer: int | None = None,
    sound: np.ndarray | None = None,
) -> Path:
    """Write grey `[T, H, W]`, RGB or RGBA `[T, H, W, C]`; `sound` is float `[samples]`, heard on both sides."""
    written = {3: "gray", 4: {3: "rgb24", 4: "rgba"}.get(frames.shape[-1])}[frames.ndim]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if aspect is not None:
            stream.sample_aspect_ratio = aspect
        if turn:
            stream.set_display_rotation(turn)
        if transfer is not None:
            stream.codec_context.color_trc = transfer
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound is not None:
            heard = container.add_stream("aac", rate=SAMPLES, layout="stereo")
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=written)
            if milliseconds is not None:
                picture.pts, picture.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if sound is not None:
            for start in range(0, len(sound), 1024):
                part = np.repeat(sound[None, start : start + 1024].astype(np.float32), 2, axis=0)
                audio = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
                audio.sample_rate, audio.pts, audio.time_base = SAMPLES, start, Fraction(1, SAMPLES)
                container.mux(heard.encode(audio))
            container.mux(heard.encode(None))
    return path


def counted(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """RGB frames `[T, H, W, 3]` that hold their number as grey, in steps of 10 levels."""
    levels = (10 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames of `counted` hold."""
    return (frames.mean(axis=(1, 2, 3)) / 10).round().astype(int).tolist()
