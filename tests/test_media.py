"""Videos and masks: what is written is what is read, and errors say what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hetcache_compile.edit.media import read_mask, read_video, stack_side_by_side, tint, to_pictures, write_video
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.errors import InputFileError
from hetcache_compile.reference.demo import demo_clip, moving_mask


def test_the_demo_clip_is_real_and_long_enough():
    frames = read_video(demo_clip(), 33, 64, 96)
    assert frames.shape == (33, 64, 96, 3)
    assert frames.std() > 20
    assert np.abs(frames[0].astype(int) - frames[32]).mean() > 5, "it moves"


def test_frames_are_counted_from_the_start_asked_for():
    frames = read_video(demo_clip(), 6, 32, 32)
    assert np.array_equal(read_video(demo_clip(), 4, 32, 32, start=2), frames[2:])


def test_a_video_survives_writing_and_reading(tmp_path):
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    frames = np.broadcast_to(ramp[None, None, :, None], (4, 32, 64, 3)).copy()
    write_video(tmp_path / "a.mp4", frames)
    assert psnr(read_video(tmp_path / "a.mp4", 4, 32, 64), frames) > 35
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_frame_is_scaled_to_cover_and_cut_at_the_centre(tmp_path):
    picture = np.zeros((10, 40, 3), dtype=np.uint8)
    picture[:, 15:25] = 255  # the middle 10x10, which fills the square
    Image.fromarray(picture).save(tmp_path / "0.png")
    assert (read_video(tmp_path, 1, 20, 20)[:, :, 8:-8] == 255).all()


@pytest.mark.parametrize("kind", ["npy bool", "npy uint8", "npy float", "folder", "video"])
def test_masks_of_every_kind_are_the_same_mask(kind, tmp_path):
    mask = moving_mask(5, 48, 64)
    path = tmp_path / "mask.npy"
    if kind == "npy bool":
        np.save(path, mask)
    elif kind == "npy uint8":
        np.save(path, mask.astype(np.uint8) * 255)
    elif kind == "npy float":
        np.save(path, mask.astype(np.float32))
    elif kind == "folder":
        path = tmp_path / "frames"
        path.mkdir()
        for number, picture in enumerate(to_pictures(mask)):
            picture.save(path / f"{number:03}.png")
    else:
        path = tmp_path / "mask.mp4"
        write_video(path, np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=3))
    read = read_mask(path, 5, 48, 64)
    assert read.dtype == np.bool_
    assert (read != mask).mean() < (0.01 if kind == "video" else 1e-9)


def test_one_picture_masks_every_frame(tmp_path):
    Image.fromarray(moving_mask(1, 48, 64)[0].astype(np.uint8) * 255).save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png", 3, 48, 64) == moving_mask(1, 48, 64)).all()


def test_pictures_of_different_sizes_are_refused(tmp_path):
    for number, size in enumerate((16, 32)):
        Image.new("L", (size, size)).save(tmp_path / f"{number}.png")
    with pytest.raises(InputFileError, match="different sizes"):
        read_mask(tmp_path, 2, 16, 16)


def test_psnr_by_hand_and_by_region():
    a, b = np.zeros((1, 2, 2, 3), dtype=np.uint8), np.zeros((1, 2, 2, 3), dtype=np.uint8)
    b[0, 0, 0] = 10
    assert psnr(a, b) == pytest.approx(10 * np.log10(255**2 / (100 / 4)))
    region = np.zeros((1, 2, 2), dtype=bool)
    region[0, 0, 0] = True
    assert psnr(a, b, region) == pytest.approx(10 * np.log10(255**2 / 100))
    assert psnr(a, b, ~region) is None
    assert psnr(a, a) is None


def test_side_by_side_keeps_frames_and_adds_titles():
    video = np.full((2, 8, 10, 3), 7, dtype=np.uint8)
    stacked = stack_side_by_side([video, video], ["one", "two"])
    assert stacked.shape[0] == 2
    assert stacked.shape[2] == 20
    assert (stacked[:, -8:] == 7).all()
    assert stacked[:, :-8].min() < 100
    mask = np.zeros((2, 8, 10), dtype=bool)
    mask[:, 2] = True
    tinted = tint(video, mask)
    assert (tinted[~mask] == 7).all()
    assert (tinted[mask] != 7).any()
