"""The frames of a video file, a folder of pictures or a picture file, upright and in order, and when they are shown.

PyAV reads videos and Pillow pictures.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from ..errors import InputFileError

T = TypeVar("T")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm")
LOSSY = (".jpg", ".jpeg", ".webp")
HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions of HDR, by FFmpeg's numbers."""
UNREADABLE = (
    av.error.FFmpegError, UnidentifiedImageError, Image.DecompressionBombError, OSError, EOFError, SyntaxError,
    ValueError,
)  # fmt: skip
"""What PyAV and Pillow raise for a file that is damaged, or is no video or picture."""
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read alpha where FFmpeg's own leaves it out."""
TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True, eq=False)
class Source:
    """What a file or a folder holds, known before a frame is decoded.

    Attributes:
        path: of the file or the folder.
        count: how many frames.
        times: float64 `[count]`, when each frame is shown, in seconds after the first one; None for pictures.
        rate: frames a second; None for pictures.
        begin: when the first frame is shown, in seconds of the file.
        size: height and width of the first frame, upright.
        aspect: width of an upright pixel over its height.
        exact: whether values are as they were written: nothing was compressed with loss.
        transfer: of an HDR video, `PQ` or `HLG`; else empty.
        files: the pictures of a folder, in order.
    """

    path: Path
    count: int
    times: NDArray[np.float64] | None = None
    rate: Fraction | None = None
    begin: float = 0.0
    size: tuple[int, int] = (0, 0)
    aspect: Fraction = Fraction(1)
    exact: bool = True
    transfer: str = ""
    files: tuple[Path, ...] = ()

    @property
    def seconds(self) -> float:
        """How long a video lasts."""
        return self.end(self.count - 1)

    def end(self, frame: int) -> float:
        """When the next frame follows a frame of a video, in seconds after the first one."""
        assert self.times is not None
        if frame + 1 < self.count:
            return float(self.times[frame + 1])
        return float(self.times[-1]) + self.interval

    @property
    def interval(self) -> float:
        """Seconds between frames of a video, as a median."""
        if self.times is not None and self.count > 1:
            return float(np.median(np.diff(self.times)))
        return float(1 / self.rate) if self.rate else 0.0


def open_source(path: Path) -> Source:
    """What is at a path.

    Raises:
        InputFileError: nothing readable, or a folder whose pictures have no clear order.
    """
    if not path.exists():
        raise InputFileError(f"no file or folder at {path}")
    with _readable(path):
        if path.is_dir():
            files = picture_files(path)
            size = _open(files[0]).size[::-1] if files else (0, 0)
            exact = not any(file.suffix.lower() in LOSSY for file in files)
            return Source(path, len(files), size=size, exact=exact, files=files)
        if path.suffix.lower() in PICTURES:
            with Image.open(path) as picture:
                count = getattr(picture, "n_frames", 1)
                size = ImageOps.exif_transpose(picture).size[::-1]
            return Source(path, count, size=size, exact=path.suffix.lower() not in LOSSY)
        return _open_video(path)


def read_frames(source: Source, wanted: Sequence[int], convert: Callable[[Image.Image], T]) -> list[T]:
    """What `convert` makes of the frames with these numbers, in this order.

    Frames come upright, in the mode of the file; those of videos are `L`, `I;16`, `RGB` or `RGBA`. Their pixels are not
    made square (see `Source.aspect`).

    Raises:
        InputFileError: not readable, fewer frames, or frames of several sizes.
    """
    if max(wanted) >= source.count:
        raise InputFileError(f"{source.path} holds {source.count} frames, the edit needs {max(wanted) + 1}")
    found: dict[int, T] = {}
    with _readable(source.path):
        for number, picture in _pictures(source, set(wanted)):
            if picture.size[::-1] != source.size:
                raise InputFileError(f"the pictures in {source.path} have different sizes")
            found[number] = convert(picture)
    if missing := set(wanted) - set(found):
        raise InputFileError(f"{source.path} ends at frame {min(missing)} of {source.count}: it is damaged")
    return [found[number] for number in wanted]


def _pictures(source: Source, wanted: set[int]) -> Iterator[tuple[int, Image.Image]]:
    if source.files:
        yield from ((number, _open(source.files[number])) for number in sorted(wanted))
    elif source.times is not None:
        yield from _decode(source, wanted)
    else:
        with Image.open(source.path) as picture:
            for number, page in enumerate(ImageSequence.Iterator(picture)):
                if number in wanted:
                    yield number, ImageOps.exif_transpose(page)


def cover(picture: Image.Image, height: int, width: int, aspect: Fraction | float = 1) -> Image.Image:
    """A picture scaled to cover a size and cut at the centre; `aspect` is the width of its pixels over their height."""
    shown = float(picture.width * aspect)
    scale = max(height / picture.height, width / shown)
    size = max(width, round(shown * scale)), max(height, round(picture.height * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = picture.resize(size, Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + width, top + height))


def picture_files(folder: Path) -> tuple[Path, ...]:
    """The pictures of a folder in the order of their numbers; hidden files are none.

    Raises:
        InputFileError: numbers are missing or occur twice, or there is more than one sequence.
    """
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".")]
    by_name: dict[tuple[str, ...], list[tuple[tuple[int, ...], Path]]] = defaultdict(list)
    for file in files:
        parts = re.split(r"(\d+)", file.stem)
        by_name[tuple(parts[::2])].append((tuple(map(int, parts[1::2])), file))
    if len(by_name) > 1 and any(len(name) > 1 for name in by_name):
        some = " and ".join(sorted(found[0][1].name for found in by_name.values())[:2])
        raise InputFileError(f"{folder} holds pictures of more than one sequence, such as {some}: move others away")
    ordered = sorted(entry for found in by_name.values() for entry in found)
    for (number, file), (next_number, next_file) in pairwise(ordered):
        if number == next_number and (number or file.stem == next_file.stem):
            raise InputFileError(f"{folder} holds a frame twice: {file.name} and {next_file.name}")
    _check_gaps(folder, ordered)
    if len(by_name) > 1:
        return tuple(sorted(files))
    return tuple(file for _, file in ordered)


def _check_gaps(folder: Path, ordered: Sequence[tuple[tuple[int, ...], Path]]) -> None:
    """Numbers must follow at about one distance, where only one number of the names varies."""
    columns = [column for column in zip(*(number for number, _ in ordered), strict=True) if len(set(column)) > 1]
    if len(columns) != 1:
        return
    steps = np.diff(columns[0])
    if (gaps := np.flatnonzero(steps >= 2 * steps.min())).size:
        first = int(gaps[0])
        names = f"{ordered[first][1].name} and {ordered[first + 1][1].name}"
        raise InputFileError(f"{folder} holds {len(ordered)} pictures, and frames are missing between {names}")


def _open_video(path: Path) -> Source:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise InputFileError(f"{path} cannot be read as video: it has none")
        stream = container.streams.video[0]
        # Packets are read, and no frame is decoded: this is fast, and files know their number of frames only sometimes.
        stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        rate = stream.average_rate or stream.guessed_rate or Fraction(len(stamps) or 1)
        times, begin = np.arange(len(stamps)) / float(rate), 0.0
        if stamps and None not in stamps:
            ticks = np.sort(stamps)
            begin = float(ticks[0] * stream.time_base)
            times = (ticks - ticks[0]) * float(stream.time_base)
        transfer = HDR.get(int(stream.codec_context.color_trc), "")
        codec = stream.codec_context.codec
        lossless = codec.lossless and not codec.lossy
        aspect = stream.sample_aspect_ratio or Fraction(1)
    with av.open(str(path)) as container:
        first = next(_decoded(container), None)
    if first is None:
        raise InputFileError(f"{path} cannot be read as video: it has no frames")
    turned = _turn(first) in (90, 270)
    return Source(
        path, len(stamps), times, rate, begin,
        size=(first.width, first.height) if turned else (first.height, first.width),
        aspect=1 / aspect if turned else aspect, exact=lossless and _as_written(first.format), transfer=transfer,
    )  # fmt: skip


def _as_written(pixels: av.VideoFormat) -> bool:
    """Whether values of this format are read without a change of colour space."""
    return bool(pixels.is_rgb or pixels.has_palette or pixels.name.startswith("gray"))


def _decode(source: Source, wanted: set[int]) -> Iterator[tuple[int, Image.Image]]:
    with av.open(str(source.path)) as container:
        for number, frame in enumerate(_decoded(container)):
            if number in wanted:
                picture, turn = _picture(frame, source.exact), _turn(frame)
                yield number, picture.transpose(TURNS[turn]) if turn else picture
            if number >= max(wanted):
                return


def _decoded(container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    with_alpha = WITH_ALPHA.get(stream.codec_context.name) if stream.metadata.get("alpha_mode") == "1" else None
    if with_alpha is None:
        yield from container.decode(stream)
        return
    decoder = av.CodecContext.create(with_alpha, "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _turn(frame: av.VideoFrame) -> int:
    """By how many degrees a frame is turned against the clock to stand upright."""
    return int(round(frame.rotation / 90) * 90 % 360)


def _picture(frame: av.VideoFrame, exact: bool) -> Image.Image:
    """A decoded frame with all that a mask may be in: alpha, and values of more than 8 bits."""
    if exact and frame.format.name.startswith("gray"):
        deep = frame.format.components[0].bits > 8
        return Image.fromarray(frame.to_ndarray(format="gray16le" if deep else "gray"))
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        return Image.fromarray(frame.to_ndarray(format="rgba"))
    return Image.fromarray(frame.to_ndarray(format="rgb24"))


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except InputFileError:
        raise
    except UNREADABLE as error:
        raise InputFileError(f"{path} cannot be read as video or pictures: {error}") from error
