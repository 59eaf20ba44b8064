"""Masks in files of every kind, and which of their frames goes with which frame of the video."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from videos import counted, save_video

from hetcache_compile.edit.frames import Source
from hetcache_compile.edit.masks import align, read_mask
from hetcache_compile.edit.media import to_pictures
from hetcache_compile.errors import InputFileError
from hetcache_compile.reference.demo import moving_mask

FRAMES, HEIGHT, WIDTH = 5, 48, 64
MASK = moving_mask(FRAMES, HEIGHT, WIDTH)
WHITE = MASK.astype(np.uint8) * 255
LABELS = np.where(np.arange(WIDTH) < WIDTH // 2, np.uint8(1), np.uint8(2)) * MASK
SIZE = (FRAMES, HEIGHT, WIDTH)


def folder(path: Path, pictures: list[Image.Image], name: str = "{:03}.png", **options: object) -> Path:
    path.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(path / name.format(number), **options)
    return path


def alpha(frame: np.ndarray) -> Image.Image:
    """White, opaque where masked."""
    return Image.merge("LA", [Image.new("L", (WIDTH, HEIGHT), 255), Image.fromarray(frame)])


def palette(frame: np.ndarray) -> Image.Image:
    """Labels in dark colours on black."""
    picture = Image.fromarray(frame).convert("P")
    picture.putdata(frame.ravel().tolist())
    picture.putpalette([0, 0, 0, 64, 0, 0, 0, 32, 0])
    return picture


def on_their_sides(path: Path) -> Path:
    """Pictures on their sides, with the EXIF tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return folder(path, [Image.fromarray(frame).transpose(Image.Transpose.ROTATE_90) for frame in WHITE], exif=exif)


def hidden(path: Path) -> Path:
    folder(path, to_pictures(MASK), "frame{}.PNG")
    for name in ("._frame0.png", ".DS_Store", "notes.txt"):
        (path / name).write_bytes(b"none of this is a picture")
    return path


def saved(path: Path, array: np.ndarray) -> Path:
    (np.savez if path.suffix == ".npz" else np.save)(path, array)
    return path


def pages(path: Path) -> Path:
    first, *rest = to_pictures(MASK)
    first.save(path, save_all=True, append_images=rest)
    return path


RED = np.where(MASK[..., None], np.uint8([255, 0, 0]), np.uint8(0))
CUT_OUT = np.concatenate([np.full_like(RED, 255), WHITE[..., None]], axis=-1)
EXACT: dict[str, Callable[[Path], Path]] = {
    "npy bool": lambda path: saved(path / "a.npy", MASK),
    "npy of labels": lambda path: saved(path / "a.npy", LABELS.astype(np.int64)),
    "npy with channels": lambda path: saved(path / "a.npy", np.repeat(WHITE[..., None], 3, -1)),
    "npz": lambda path: saved(path / "a.npz", WHITE),
    "8 bits": lambda path: folder(path / "a", to_pictures(MASK)),
    "1 bit": lambda path: folder(path / "a", [Image.fromarray(frame) for frame in MASK]),
    "16 bits": lambda path: folder(path / "a", [Image.fromarray(f.astype(np.uint16) * 254 + 600) for f in WHITE]),
    "tif": lambda path: folder(path / "a", [Image.fromarray(f.astype(np.uint16) * 257) for f in WHITE], "{}.tif"),
    "0 and 1": lambda path: folder(path / "a", [Image.fromarray(frame.astype(np.uint8)) for frame in MASK]),
    "alpha": lambda path: folder(path / "a", [alpha(frame) for frame in WHITE]),
    "palette": lambda path: folder(path / "a", [palette(frame) for frame in LABELS]),
    "red": lambda path: folder(path / "a", to_pictures(RED)),
    "jpg": lambda path: folder(path / "a", to_pictures(MASK), "{}.jpg", quality=95, subsampling=0),
    "on its side": lambda path: on_their_sides(path / "a"),
    "hidden files": lambda path: hidden(path / "a"),
    "pages of a tif": lambda path: pages(path / "a.tiff"),
    "grey video": lambda path: save_video(path / "a.mkv", WHITE, "ffv1", pixels="gray"),
    "video of labels": lambda path: save_video(path / "a.mkv", LABELS, "ffv1", pixels="gray"),
    "video of 16 bits": lambda path: save_video(path / "a.mkv", WHITE, "ffv1", pixels="gray16le"),
    "video with alpha": lambda path: save_video(path / "a.mov", CUT_OUT, "qtrle", pixels="argb"),
    "webm with alpha": lambda path: save_video(path / "a.webm", CUT_OUT, "libvpx-vp9", pixels="yuva420p"),
    "gif": lambda path: save_video(path / "a.gif", WHITE, "gif", pixels="gray", rate=10),
    "turned video": lambda path: save_video(
        path / "a.mov", np.rot90(WHITE, axes=(2, 1)), "libx264rgb", pixels="rgb24", turn=90
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_every_kind_of_file_is_the_same_mask(name: str, tmp_path: Path) -> None:
    read = read_mask(EXACT[name](tmp_path), *SIZE)
    assert read.dtype == np.bool_
    assert read.shape == SIZE
    assert (read != MASK).mean() < (0.01 if name in ("jpg", "turned video", "webm with alpha") else 1e-9)


@pytest.mark.parametrize("frames", [WHITE, RED], ids=["white", "red"])
def test_compression_moves_the_edge_by_a_pixel_at_most(frames: np.ndarray, tmp_path: Path) -> None:
    read = read_mask(save_video(tmp_path / "a.mp4", frames), *SIZE)
    assert (read != MASK).mean() < 0.02
    assert not (read & ~gaussian_filter(WHITE, (0, 2, 2), truncate=1).astype(bool)).any(), "noise is not masked"


def test_labels_polarity_and_threshold_of_files(tmp_path: Path) -> None:
    labels = folder(tmp_path / "labels", [palette(frame) for frame in LABELS])
    assert np.array_equal(read_mask(labels, *SIZE, labels=[2]), LABELS == 2)
    white = folder(tmp_path / "white", to_pictures(MASK))
    assert np.array_equal(read_mask(white, *SIZE, invert=True), ~MASK)
    soft = gaussian_filter(WHITE, (0, 2, 2))
    edges = folder(tmp_path / "soft", to_pictures(soft))
    assert np.array_equal(read_mask(edges, *SIZE), soft > 127)
    assert np.array_equal(read_mask(edges, *SIZE, threshold=0.2), soft > 51)
    video = save_video(tmp_path / "a.mp4", WHITE)
    with pytest.raises(InputFileError, match="labels pick values of a label map, and the mask has values that were"):
        read_mask(video, *SIZE, labels=[1])


@pytest.mark.parametrize("suffix", [".png", ".npy", ".gif"])
def test_one_picture_masks_every_frame(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mask{suffix}"
    np.save(path, MASK[0]) if suffix == ".npy" else Image.fromarray(WHITE[0]).save(path)
    assert (read_mask(path, *SIZE) == MASK[0]).all()
    assert (read_mask(path, *SIZE, start=7) == MASK[0]).all()


def test_pictures_are_ordered_by_their_numbers(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", to_pictures(moving_mask(12, HEIGHT, WIDTH)), "clip2_frame{}_mask.png")
    assert np.array_equal(read_mask(path, 12, HEIGHT, WIDTH), moving_mask(12, HEIGHT, WIDTH))
    assert sorted(file.name for file in path.iterdir())[2] == "clip2_frame11_mask.png"


WRONG = {
    "a gap": (["a1.png", "a2.png", "a4.png", "a5.png", "a6.png"], "holds 5 pictures, .*between a2.png and a4.png"),
    "a number twice": (["a1.png", "a01.png", "a2.png"], "a frame twice: a01.png and a1.png"),
    "a name twice": (["a.png", "a.jpg"], "a frame twice: a.jpg and a.png"),
    "two sequences": (["a1.png", "a2.png", "b1.png"], "more than one sequence, such as a[12].png and b1.png"),
    "too few": (["a1.png", "a2.png"], "holds 2 frames, the edit needs 5"),
    "none": ([], "holds 0 frames, the edit needs 5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_folder_without_a_clear_order_is_refused(name: str, tmp_path: Path) -> None:
    names, message = WRONG[name]
    for file in names:
        Image.fromarray(WHITE[0]).save(tmp_path / file)
    with pytest.raises(InputFileError, match=message):
        read_mask(tmp_path, *SIZE)


def test_every_tenth_frame_is_a_sequence(tmp_path: Path) -> None:
    for number, picture in enumerate(to_pictures(MASK)):
        picture.save(tmp_path / f"{number * 10}.png")
    assert np.array_equal(read_mask(tmp_path, *SIZE), MASK)


def test_what_cannot_be_read_right_says_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=MASK, b=MASK)
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    np.save(tmp_path / "empty.npy", MASK * 0)
    np.save(tmp_path / "shades.npy", np.where(LABELS == 1, 100, LABELS // 2 * 255))
    save_video(tmp_path / "labels.mp4", LABELS)
    (tmp_path / "cut.npz").write_bytes(b"PK")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, message in {
        "two.npz": "must hold one array, it holds 2: a, b",
        "objects.npy": "cannot be read as an array",
        "empty.npy": "the mask is empty: its frames 0 to 4 hold the value 0",
        "shades.npy": "shades.npy: the mask holds the values 0, 100, 255, which may be labels or shades",
        "labels.mp4": "the mask is empty: its frames 0 to 4 hold the values 0, 1, 2",
        "cut.npz": "cannot be read as an array",
        "cut.png": "cannot be read as video or pictures",
        "none.npy": "no file or folder at",
    }.items():
        with pytest.raises(InputFileError, match=message) as caught:
            read_mask(tmp_path / name, *SIZE)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_mask_of_the_size_of_the_video_is_scaled_and_cut_with_it(tmp_path: Path) -> None:
    video = save_video(tmp_path / "in.mp4", counted(FRAMES, 96, 256))
    large = np.zeros((96, 256), dtype=bool)
    large[32:64, 80:140] = True
    Image.fromarray(large).save(tmp_path / "mask.png")
    read = read_mask(tmp_path / "mask.png", *SIZE, video=video)
    assert np.array_equal(read[0], large[::2, ::2][:, 32:96])
    Image.fromarray(large[:, :200]).save(tmp_path / "mask.png")
    with pytest.raises(InputFileError, match=r"of 96x200 \(height x width\), the edit needs one of 48x64 or 96x256"):
        read_mask(tmp_path / "mask.png", *SIZE, video=video)


@pytest.mark.parametrize("shown", [False, True])
def test_pixels_that_are_not_square(shown: bool, tmp_path: Path) -> None:
    """A mask as wide as the pixels of the video, or as wide as the video is shown."""
    video = save_video(tmp_path / "in.mkv", counted(FRAMES, 48, 32), aspect=Fraction(2))
    narrow = np.zeros((48, 32), dtype=bool)
    narrow[12:30, 8:20] = True
    expected = np.repeat(narrow, 2, axis=1)
    Image.fromarray(expected if shown else narrow).save(tmp_path / "mask.png")
    read = read_mask(tmp_path / "mask.png", FRAMES, 48, 64, video=video)
    assert np.array_equal(read[0], expected)


def timed(count: int, rate: float) -> Source:
    return Source(Path("v.mp4"), count, np.arange(count) / rate, Fraction(rate))


def untimed(count: int) -> Source:
    return Source(Path("folder"), count)


CLIP = timed(48, 24)
ALIGNED = {
    "one frame": (untimed(1), CLIP, 10, 5, [0] * 5),
    "as long as the clip": (untimed(48), CLIP, 10, 5, [10, 11, 12, 13, 14]),
    "as long as the clip, of another rate": (timed(48, 16), CLIP, 10, 5, [10, 11, 12, 13, 14]),
    "as long as the edit": (untimed(5), CLIP, 10, 5, [0, 1, 2, 3, 4]),
    "as long as the edit, of another rate": (timed(5, 16), CLIP, 10, 5, [0, 1, 2, 3, 4]),
    "half the rate": (timed(24, 12), CLIP, 10, 6, [5, 5, 6, 6, 7, 7]),
    "twice the rate": (timed(96, 48), CLIP, 10, 5, [20, 22, 24, 26, 28]),
    "half the rate, as long as the edit": (timed(6, 12), CLIP, 10, 12, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    "the first half of the clip": (timed(24, 24), CLIP, 10, 5, [10, 11, 12, 13, 14]),
    "more pictures than are edited": (untimed(20), CLIP, 10, 5, [10, 11, 12, 13, 14]),
    "without the video": (untimed(20), None, 0, 5, [0, 1, 2, 3, 4]),
    "without the video, from a frame": (untimed(20), None, 10, 5, [10, 11, 12, 13, 14]),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_frames_of_the_mask_go_with_frames_of_the_video(name: str) -> None:
    mask, video, start, count, expected = ALIGNED[name]
    found = align(mask, video, start, count)
    # Halfway between two frames either is as near.
    assert len(found) == len(expected)
    assert all(abs(a - b) <= (1 if "half the rate" in name else 0) for a, b in zip(found, expected, strict=True))
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("mask", "video", "message"),
    [
        (untimed(12), CLIP, "folder holds 12 frames, the video has 48, the edit needs 5 from frame 10: give 1, 5, or"),
        (untimed(12), None, "folder holds 12 frames, the edit needs 5 from frame 10"),
        (timed(3, 24), CLIP, r"v.mp4 holds 3 frames in 0.12 s, the video 48 in 2.00 s, .* until 0.62 s"),
        (untimed(48), timed(12, 24), "v.mp4 holds 12 frames, the edit needs 15"),
    ],
)
def test_a_mask_that_is_too_short_is_refused_with_the_counts(mask: Source, video: Source | None, message: str) -> None:
    with pytest.raises(InputFileError, match=message):
        align(mask, video, 10, 5)


def test_a_rate_that_varies_is_followed_by_time(tmp_path: Path) -> None:
    """51 frames in 2 s; the mask, of 10 frames a second, is left in the first second, and right in the other."""
    times = np.cumsum([0, *([20, 60] * 25)])
    video = save_video(tmp_path / "in.mp4", counted(51) * 0, milliseconds=times.tolist())
    mask = np.zeros((20, 32, 48), dtype=np.uint8)
    mask[:10, :, :24] = mask[10:, :, 24:] = 255
    path = save_video(tmp_path / "mask.mkv", mask, "ffv1", rate=10, pixels="gray")
    left = read_mask(path, 9, 32, 48, start=20, video=video)[:, 16, 4]
    assert left.tolist() == (times[20:29] < 950).tolist(), "950 ms is halfway between the frames at 900 and 1000"
    assert left.any()
    assert not left.all()
