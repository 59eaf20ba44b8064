"""Masks from files: a video, a folder of pictures, a picture or an array, for the frames of a video that are edited."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import InputFileError, MaskError
from ..plan.mask import describe, levels_of, levels_of_picture, mask_of, stack_levels
from .frames import Source, cover, open_source, read_frames

ARRAYS = (".npy", ".npz")


def read_mask(
    path: Path,
    num_frames: int,
    height: int,
    width: int,
    *,
    start: int = 0,
    video: Path | None = None,
    threshold: float | None = None,
    invert: bool = False,
    labels: Sequence[int] | None = None,
) -> NDArray[np.bool_]:
    """The mask of a clip as bool `[num_frames, height, width]`, white is masked.

    A video, a folder of pictures, a picture, a .npy, or a .npz with one array. One picture stands for every frame.

    Args:
        path: of the mask.
        num_frames: how many frames are edited.
        height: of the edit, in pixels. The mask has this size, or that of `video`, and is then scaled and cut like it.
        width: of the edit, in pixels.
        start: the first frame of the video that is edited.
        video: what is edited, where known; the mask itself of a picture that is not. A mask with as many frames goes
            with it frame by frame, and so does one of `num_frames` frames with the frames that are edited; other videos
            go by their times (see `align`).
        threshold: see `mask.to_mask`.
        invert: see `mask.to_mask`.
        labels: see `mask.to_mask`.

    Raises:
        InputFileError: nothing readable there, another size or number of frames, an empty mask, or values that are no
            mask or can mean several things.
    """
    clip = None if video is None else _open(video)
    labelled = labels is not None
    try:
        if path.suffix.lower() in ARRAYS:
            levels = levels_of(load_array(path), labelled=labelled)
            wanted = align(Source(path, len(levels.value)), clip, start, num_frames)
            masked = mask_of(levels, threshold=threshold, invert=invert, labels=labels)[wanted]
            value = levels.value[wanted]
        else:
            source = open_source(path)
            wanted = align(source, clip, start, num_frames)
            levels = stack_levels(read_frames(source, wanted, partial(levels_of_picture, labelled=labelled)))
            masked = mask_of(levels, threshold=threshold, invert=invert, labels=labels, exact=source.exact)
            value = levels.value
    except MaskError as error:
        raise InputFileError(f"{path}: {error}") from error
    if not masked.any():
        inverted = " when inverted" if invert else ""
        raise InputFileError(
            f"{path}: the mask is empty{inverted}: its frames {wanted[0]} to {wanted[-1]} hold {describe(value)}"
        )
    return _fitted(path, masked, height, width, clip)


def size_in(path: Path) -> tuple[int, int]:
    """Height and width of a mask, a picture or a video in a file.

    Raises:
        InputFileError: nothing readable there.
    """
    return _open(path).size


def _open(path: Path) -> Source:
    if path.suffix.lower() not in ARRAYS:
        return open_source(path)
    try:
        count, height, width = levels_of(load_array(path)).value.shape
    except MaskError as error:
        raise InputFileError(f"{path}: {error}") from error
    return Source(path, count, size=(height, width))


def align(mask: Source, video: Source | None, start: int, num_frames: int) -> list[int]:
    """Which frame of the mask goes with each of the `num_frames` frames from `start` of the video.

    1. One frame goes with all.
    2. As many frames as the video has go with it one by one, from the video's `start`.
    3. As many frames as are edited go with these one by one.
    4. Videos go by time. The mask begins with the frames that are edited if it lasts as long as they do, else with the
       video, and must last as long as is edited.
    5. Of pictures and arrays, or where the video is not known, more frames go with the video's, one by one.

    Raises:
        InputFileError: the mask has too few frames, or is too short.
    """
    edited = np.arange(start, start + num_frames)
    if mask.count == 1:
        return [0] * num_frames
    if mask.count == num_frames and (video is None or mask.count != video.count):
        return list(range(num_frames))
    if video is not None and video.count < start + num_frames:
        raise InputFileError(f"{video.path} holds {video.count} frames, the edit needs {start + num_frames}")
    if video is not None and mask.count != video.count and mask.times is not None and video.times is not None:
        return _by_time(mask, video, edited)
    if mask.count < start + num_frames:
        known = "" if video is None else f", the video has {video.count}"
        raise InputFileError(
            f"{mask.path} holds {mask.count} frames{known}, the edit needs {num_frames} from frame {start}: give 1, "
            f"{num_frames}, or a frame for each of the video"
        )
    return [int(frame) for frame in edited]


def _by_time(mask: Source, video: Source, edited: NDArray[np.int64]) -> list[int]:
    assert mask.times is not None
    assert video.times is not None
    times = video.times[edited]
    end, tolerance = video.end(int(edited[-1])), 1.5 * max(mask.interval, video.interval)
    if abs(mask.seconds - video.seconds) > tolerance and abs(mask.seconds - (end - times[0])) <= tolerance:
        times, end = times - times[0], end - times[0]
    if mask.seconds < end - tolerance:
        raise InputFileError(
            f"{mask.path} holds {mask.count} frames in {mask.seconds:.2f} s, the video {video.count} in "
            f"{video.seconds:.2f} s, and the edit needs those until {end:.2f} s"
        )
    nearest = np.abs(mask.times[None] - times[:, None]).argmin(axis=1)
    return [int(frame) for frame in nearest]


def _fitted(path: Path, mask: NDArray[np.bool_], height: int, width: int, video: Source | None) -> NDArray[np.bool_]:
    """The mask in the size of the edit."""
    size = mask.shape[1:]
    if size == (height, width):
        return mask
    accepted = {} if video is None else {video.size: float(video.aspect), _square(video): 1.0}
    if size not in accepted:
        sizes = " or ".join(f"{h}x{w}" for h, w in {(height, width): None, **accepted})
        raise InputFileError(
            f"{path} holds a mask of {size[0]}x{size[1]} (height x width), the edit needs one of {sizes}"
        )
    pictures = (Image.fromarray(frame.astype(np.uint8) * 255) for frame in mask)
    return np.stack([np.asarray(cover(picture, height, width, accepted[size])) > 127 for picture in pictures])


def _square(video: Source) -> tuple[int, int]:
    """The size of a video as a player shows it."""
    return video.size[0], round(video.size[1] * video.aspect)


def load_array(path: Path) -> NDArray[Any]:
    """The array of a .npy, or the one of a .npz.

    Raises:
        InputFileError: there is none, or more than one.
    """
    try:
        found = np.load(path, allow_pickle=False)
        arrays = dict(found) if isinstance(found, np.lib.npyio.NpzFile) else {"": found}
    except FileNotFoundError as error:
        raise InputFileError(f"no file or folder at {path}") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputFileError(f"{path} cannot be read as an array: {error}") from error
    if len(arrays) != 1:
        raise InputFileError(f"{path} must hold one array, it holds {len(arrays)}: {', '.join(arrays)}")
    return np.asarray(next(iter(arrays.values())))
