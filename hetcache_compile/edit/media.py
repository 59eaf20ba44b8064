"""Videos in and out, and what is done with their frames. PyAV writes video files; `frames` and `masks` read them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import HetCacheWarning, InputFileError
from ..files import atomically
from .frames import cover, open_source, read_frames
from .masks import read_mask as read_mask

Frames = NDArray[np.uint8]
GREY = np.uint8(128)
"""What masked pixels are filled with: 0 on the scale from -1 to 1."""
TINT = (230, 40, 40)
"""The colour of the mask in pictures."""
FPS = 16
"""Frames per second of videos that are written."""
TICKS = Fraction(90_000)
"""Units of time in a second, for videos whose rate varies."""
UNEVEN = 0.1
"""By how much of a frame the times of a video stray from its rate where the rate varies."""
SOUND_RATE = 48_000


@dataclass(frozen=True, eq=False)
class Clip:
    """A video to edit, with what is known about the result.

    Attributes:
        name: unlike that of any other clip in a set.
        video: uint8 `[T, H, W, 3]`, as the pipeline gets it.
        mask: bool `[T, H, W]`, true where to generate.
        prompt: what to generate there.
        truth: what the result should be, as `video`; None where nobody knows.
    """

    name: str
    video: Frames
    mask: NDArray[np.bool_]
    prompt: str
    truth: Frames | None = None


@dataclass(frozen=True, eq=False)
class Playback:
    """How the frames of a clip are shown.

    Attributes:
        rate: frames a second.
        times: float64 `[T]`, seconds after the first frame, where the rate varies; else None.
        sound: the file that the sound is in; None for a silent clip.
        begin: where the clip begins in this file, in seconds.
        end: where it ends.
    """

    rate: Fraction = Fraction(FPS)
    times: NDArray[np.float64] | None = None
    sound: Path | None = None
    begin: float = 0.0
    end: float = 0.0


def read_video(path: Path, num_frames: int, height: int, width: int, start: int = 0) -> Frames:
    """`num_frames` frames of a video or a folder of pictures, from frame `start`: uint8 `[T, height, width, 3]`.

    Each frame is turned upright, scaled to cover the size and cut at the centre. An HDR video gives a warning: its
    values are taken as they are.

    Raises:
        InputFileError: nothing readable there, or too few frames.
    """
    source = open_source(path)
    if source.transfer:
        warnings.warn(
            f"{path} is HDR ({source.transfer}), and is read without tone mapping: colours will be pale; convert it "
            "to SDR first",
            HetCacheWarning,
            stacklevel=2,
        )
    wanted = range(start, start + num_frames)
    return np.stack(read_frames(source, wanted, lambda one: np.asarray(cover(_rgb(one), height, width, source.aspect))))


def read_source(path: Path, num_frames: int, height: int, width: int, start: int = 0) -> Frames:
    """What is edited, as `read_video` reads it; one picture stands for every frame."""
    frames = read_video(path, 1 if open_source(path).count == 1 else num_frames, height, width, start)
    return np.broadcast_to(frames, (num_frames, *frames.shape[1:]))


def read_pictures(path: Path) -> list[Image.Image]:
    """Every frame of a video or a folder of pictures, or a picture alone, as RGB in its own size.

    Raises:
        InputFileError: nothing readable there.
    """
    source = open_source(path)
    if not source.count:
        raise InputFileError(f"{path} holds no pictures")
    return read_frames(source, range(source.count), _rgb)


def playback_of(path: Path, num_frames: int, start: int = 0) -> Playback:
    """How `num_frames` frames of a video are shown, from frame `start`; 16 a second for pictures, which do not say.

    Raises:
        InputFileError: nothing readable there.
    """
    source = open_source(path)
    if source.times is None or source.rate is None:
        return Playback()
    times = source.times[start : start + num_frames]
    begin, end = source.begin + times[0], source.begin + source.end(start + len(times) - 1)
    with av.open(str(path)) as container:
        sound = path if container.streams.audio else None
    even = np.arange(len(times)) / float(source.rate)
    varies = np.abs(times - times[0] - even).max() > UNEVEN / float(source.rate)
    return Playback(source.rate, times - times[0] if varies else None, sound, begin, end)


def write_video(path: Path, frames: Frames, fps: int | Fraction = FPS, like: Playback | None = None) -> None:
    """Write uint8 `[T, H, W, 3]` as H.264 in an mp4, atomically. Odd sizes lose their last row or column.

    Args:
        path: of the file.
        frames: to write.
        fps: frames a second.
        like: in place of `fps`: show the frames when those of this clip are shown, with its sound (as AAC).
    """
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    like = like or Playback(Fraction(fps))
    ticks = like.rate if like.times is None else TICKS
    stamps = range(len(frames)) if like.times is None else (like.times * float(TICKS)).round().astype(int).tolist()
    sound = _sound(like)

    def write(temporary: str) -> None:
        with av.open(temporary, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=like.rate, options={"crf": "16"})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = 1 / ticks
            if sound:
                heard = container.add_stream("aac", rate=SOUND_RATE, layout=sound[0].layout)
            for frame, stamp in zip(frames, stamps, strict=False):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                picture.pts, picture.time_base = stamp, 1 / ticks
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
            for part in (*sound, None) if sound else ():
                container.mux(heard.encode(part))

    atomically(path, write)


def write_picture(path: Path, picture: Frames) -> None:
    """Write uint8 `[H, W, 3]` as a PNG, atomically."""
    atomically(path, lambda temporary: Image.fromarray(picture).save(temporary, "png"))


def _sound(playback: Playback) -> list[av.AudioFrame]:
    """What is heard in a clip. If it cannot be read, nothing and a warning: the edit is done, and worth keeping."""
    if playback.sound is None:
        return []
    heard = []
    try:
        with av.open(str(playback.sound)) as container:
            for part in container.decode(audio=0):
                if part.time is None or part.time < playback.begin:
                    continue
                if part.time >= playback.end:
                    break
                rate = part.sample_rate
                part.pts, part.time_base = round((part.time - playback.begin) * rate), Fraction(1, rate)
                heard.append(part)
    except av.error.FFmpegError as error:
        warnings.warn(f"{playback.sound}: its sound is left out: {error}", HetCacheWarning, stacklevel=2)
        return []
    return heard


def to_pictures(frames: Frames | NDArray[np.bool_]) -> list[Image.Image]:
    """Frames or a mask as the list of pictures that diffusers' pipelines take."""
    if frames.dtype == np.bool_:
        frames = frames.astype(np.uint8) * 255
    return [Image.fromarray(frame) for frame in frames]


def to_frames(pipeline_frames: Any) -> Frames:
    """A pipeline's `frames[0]`, float `[T, H, W, 3]` from 0 to 1, as uint8."""
    return np.asarray(np.clip(np.asarray(pipeline_frames) * 255, 0, 255).round(), dtype=np.uint8)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # Pillow would clip
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def stack_side_by_side(videos: Sequence[Frames], titles: Sequence[str]) -> Frames:
    """Videos of one size beside each other, each with its title above."""
    from PIL import ImageDraw

    bar = 18
    panels = []
    for video, title in zip(videos, titles, strict=True):
        header = Image.new("RGB", (video.shape[2], bar), "white")
        ImageDraw.Draw(header).text((4, 3), title, fill="black")
        headers = np.broadcast_to(np.asarray(header), (video.shape[0], bar, video.shape[2], 3))
        panels.append(np.concatenate([headers, video], axis=1))
    return np.concatenate(panels, axis=2)


def tint(frames: Frames, mask: NDArray[np.bool_]) -> Frames:
    """Frames with the masked region tinted red."""
    red = np.array(TINT, dtype=np.float32)
    mixed = frames.astype(np.float32) * 0.5 + red * 0.5
    return np.where(mask[..., None], mixed, frames).astype(np.uint8)
