"""Videos and masks: what is written is what is read, and errors say what is wrong."""

from __future__ import annotations

import errno
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from videos import SAMPLES, counted, numbers, save_video

from hetcache_compile.edit.frames import open_source
from hetcache_compile.edit.media import playback_of, read_mask, read_video, stack_side_by_side, tint, write_video
from hetcache_compile.edit.metrics import psnr
from hetcache_compile.errors import HetCacheWarning, InputFileError, OutputFileError
from hetcache_compile.files import atomically
from hetcache_compile.reference.demo import demo_clip


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


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputFileError, match=r"file/a\.mp4 cannot be written: .*File exists"):
        write_video(tmp_path / "file" / "a.mp4", counted(2))
    with pytest.raises(OutputFileError, match=r"cannot be written: .*No space left"):
        atomically(tmp_path / "a.json", fill_the_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def fill_the_disk(path):
    with open(path, "w") as file:
        file.write("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_frame_is_scaled_to_cover_and_cut_at_the_centre(tmp_path):
    picture = np.zeros((10, 40, 3), dtype=np.uint8)
    picture[:, 15:25] = 255  # the middle 10x10, which fills the square
    Image.fromarray(picture).save(tmp_path / "0.png")
    assert (read_video(tmp_path, 1, 20, 20)[:, :, 8:-8] == 255).all()


def test_pictures_of_different_sizes_are_refused(tmp_path):
    for number, size in enumerate((16, 32)):
        Image.new("L", (size, size)).save(tmp_path / f"{number}.png")
    with pytest.raises(InputFileError, match="different sizes"):
        read_mask(tmp_path, 2, 16, 16)


def corners(picture: np.ndarray) -> list[bool]:
    """Which corners are white: top left, top right, bottom left, bottom right."""
    return [bool(picture[y, x].mean() > 127) for y in (4, -5) for x in (4, -5)]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [(0, [True, False, False, False]), (90, [False, False, True, False]), (180, [False, False, False, True]),
     (-90, [False, True, False, False])],
)  # fmt: skip
def test_a_turned_video_stands_upright(turn, expected, tmp_path):
    """A phone held on its side writes a turned picture, and a note that says so."""
    frames = np.zeros((2, 32, 48, 3), dtype=np.uint8)
    frames[:, :16, :24] = 255
    path = save_video(tmp_path / "a.mp4", frames, turn=turn)
    size = (48, 32) if turn % 180 else (32, 48)
    assert open_source(path).size == size
    assert corners(read_video(path, 1, *size)[0]) == expected


@pytest.mark.parametrize(("turn", "size"), [(0, (32, 96)), (90, (96, 32))])
def test_pixels_are_made_square(turn, size, tmp_path):
    """Of 48 x 32 pixels, each twice as wide as high, nothing is cut away at 96 x 32."""
    frames = np.zeros((1, 32, 48, 3), dtype=np.uint8)
    frames[:, :, :12] = frames[:, :, -12:] = 255
    path = save_video(tmp_path / "a.mkv", frames, aspect=Fraction(2), turn=turn)
    picture = read_video(path, 1, *size)[0].mean(axis=(1, 2) if turn else (0, 2))
    assert (picture[:20] > 200).all()
    assert (picture[28:68] < 50).all()
    assert (picture[-20:] > 200).all()


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_told(transfer, name, tmp_path):
    path = save_video(tmp_path / "a.mkv", counted(2), transfer=transfer)
    with pytest.warns(HetCacheWarning, match=rf"a.mkv is HDR \({name}\), and is read without tone mapping"):
        read_video(path, 2, 32, 48)


def test_pictures_of_16_bits_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16)).save(tmp_path / "0.png")
    assert (read_video(tmp_path, 1, 8, 8) == 100).all()


def test_numbered_pictures_are_a_video(tmp_path):
    for number, frame in enumerate(counted(12)):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    assert numbers(read_video(tmp_path, 10, 32, 48, start=2)) == list(range(2, 12))
    assert playback_of(tmp_path, 10).rate == 16


def test_a_video_that_is_too_short_or_none(tmp_path):
    sound = tmp_path / "sound.m4a"
    with av.open(str(sound), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), dtype=np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(InputFileError, match=r"sound\.m4a cannot be read as video: it has none"):
        read_video(sound, 1, 32, 48)
    video = save_video(tmp_path / "a.mp4", counted(4))
    with pytest.raises(InputFileError, match=r"a\.mp4 holds 4 frames, the edit needs 6"):
        read_video(video, 3, 32, 48, start=3)
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputFileError, match=r"a\.mp4 cannot be read as video or pictures"):
        read_video(video, 3, 32, 48)


@pytest.mark.parametrize("rate", [25, Fraction(24_000, 1001)], ids=str)
def test_the_rate_of_the_input_is_kept(rate, tmp_path):
    path = save_video(tmp_path / "in.mkv", counted(20), rate=rate)  # its times are rounded to milliseconds
    write_video(tmp_path / "out.mp4", read_video(path, 8, 32, 48, start=5), like=playback_of(path, 8, start=5))
    written = open_source(tmp_path / "out.mp4")
    assert written.rate == rate
    assert numbers(read_video(tmp_path / "out.mp4", 8, 32, 48)) == list(range(5, 13))


def test_times_that_vary_are_kept(tmp_path):
    times = np.cumsum([0, *([40, 80] * 9)])
    path = save_video(tmp_path / "in.mp4", counted(19), milliseconds=times.tolist())
    write_video(tmp_path / "out.mp4", read_video(path, 8, 32, 48, start=5), like=playback_of(path, 8, start=5))
    assert open_source(tmp_path / "out.mp4").times == pytest.approx((times[5:13] - times[5]) / 1000, abs=1e-3)


def heard_at(path):
    """Seconds of each audio sample of a file, and how loud it is."""
    with av.open(str(path)) as container:
        parts = [(frame.time, frame.to_ndarray()[0], frame.sample_rate) for frame in container.decode(audio=0)]
    times = np.concatenate([time + np.arange(len(part)) / rate for time, part, rate in parts])
    return times, np.abs(np.concatenate([part for _, part, _ in parts]))


def test_the_sound_of_the_clip_is_carried(tmp_path):
    """A tone begins at 1 s; of the frames from 0.5 s to 1.5 s it is heard in the second half."""
    seconds = np.arange(2 * SAMPLES) / SAMPLES
    tone = np.where(seconds > 1, np.sin(2 * np.pi * 440 * seconds), 0)
    path = save_video(tmp_path / "in.mp4", counted(20), rate=10, sound=tone)
    write_video(tmp_path / "out.mp4", counted(10), like=playback_of(path, 10, start=5))
    times, loud = heard_at(tmp_path / "out.mp4")
    assert times[-1] == pytest.approx(1, abs=0.05)
    assert loud[times < 0.45].max() < 0.1 < 0.5 < loud[times > 0.55].max()
    assert open_source(tmp_path / "out.mp4").rate == 10


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
