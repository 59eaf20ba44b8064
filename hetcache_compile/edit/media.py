"""Videos and masks in and out. PyAV for video files, Pillow for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import InputFileError
from ..files import atomically

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
Frames = NDArray[np.uint8]
GREY = np.uint8(128)
"""What masked pixels are filled with: 0 on the scale from -1 to 1."""
TINT = (230, 40, 40)
"""The colour of the mask in pictures."""
FPS = 16
"""Frames per second of videos that are written."""


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


def read_video(path: Path, num_frames: int, height: int, width: int, start: int = 0) -> Frames:
    """`num_frames` frames of a video or a folder of pictures, from frame `start`: uint8 `[T, height, width, 3]`.

    Each frame is scaled to cover the size and cut at the centre.

    Raises:
        InputFileError: nothing readable there, or too few frames.
    """
    found = _pictures(path, start + num_frames)[start:]
    pictures = [_cover(picture.convert("RGB"), height, width) for picture in found]
    return np.stack([np.asarray(picture) for picture in pictures])


def read_mask(path: Path, num_frames: int, height: int, width: int) -> NDArray[np.bool_]:
    """A mask as bool `[T, height, width]`, white is masked: a video, a folder of pictures, a picture, or a .npy.

    One picture stands for every frame. Its size must be that of the video: a mask that has to be resized is a
    mask of something else.

    Raises:
        InputFileError: nothing readable there, another size, or too few frames.
    """
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputFileError(f"{path} cannot be read as an array: {error}") from error
        frames = array if array.ndim == 3 else array[None] if array.ndim == 2 else None
        if frames is None:
            raise InputFileError(f"{path} must hold [frames, height, width], it holds shape {array.shape}")
        mask = frames > (0.5 if frames.max(initial=0) <= 1 else 127)
    else:
        one = path.suffix.lower() in PICTURES
        pictures = _pictures(path, 1 if one else num_frames)
        mask = np.stack([np.asarray(picture.convert("L")) > 127 for picture in pictures])
    if mask.shape[0] == 1 and num_frames > 1:
        mask = np.repeat(mask, num_frames, axis=0)
    if mask.shape[0] < num_frames or mask.shape[1:] != (height, width):
        raise InputFileError(
            f"{path} holds a mask of {mask.shape[0]} frames of {mask.shape[1]}x{mask.shape[2]} (height x width), "
            f"the edit needs {num_frames} frames of {height}x{width}"
        )
    return np.asarray(mask[:num_frames], dtype=np.bool_)


def write_video(path: Path, frames: Frames, fps: int = FPS) -> None:
    """Write uint8 `[T, H, W, 3]` as H.264 in an mp4, atomically. Odd sizes lose their last row or column."""
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]

    def write(temporary: str) -> None:
        with av.open(temporary, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode(None))

    atomically(path, write)


def to_pictures(frames: Frames | NDArray[np.bool_]) -> list[Image.Image]:
    """Frames or a mask as the list of pictures that diffusers' pipelines take."""
    if frames.dtype == np.bool_:
        frames = frames.astype(np.uint8) * 255
    return [Image.fromarray(frame) for frame in frames]


def to_frames(pipeline_frames: Any) -> Frames:
    """A pipeline's `frames[0]`, float `[T, H, W, 3]` from 0 to 1, as uint8."""
    return np.asarray(np.clip(np.asarray(pipeline_frames) * 255, 0, 255).round(), dtype=np.uint8)


def _pictures(path: Path, count: int) -> list[Image.Image]:
    """The first `count` pictures of a video file, a folder, or a picture file."""
    if not path.exists():
        raise InputFileError(f"no file or folder at {path}")
    try:
        if path.is_dir():
            names = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
            found = [_open(name) for name in names[:count]]
        elif path.suffix.lower() in PICTURES:
            found = [_open(path)]
        else:
            found = []
            with av.open(str(path)) as container:
                for frame in container.decode(video=0):
                    found.append(frame.to_image())
                    if len(found) == count:
                        break
    except (av.error.FFmpegError, UnidentifiedImageError, OSError, IndexError) as error:
        raise InputFileError(f"{path} cannot be read as video or pictures: {error}") from error
    if len(found) < count:
        raise InputFileError(f"{path} holds {len(found)} frames, the edit needs {count}")
    if len({picture.size for picture in found}) > 1:
        raise InputFileError(f"the pictures in {path} have different sizes")
    return found


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


def _cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = picture.resize(size, Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + width, top + height))


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
