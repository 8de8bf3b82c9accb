"""Opening videos: some of their frames as RGB, and a bad file named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dynllava_plugin.errors import UserError, check_installed, one_line

SUFFIXES = frozenset(
    (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
)
FRAMES = 32  # of a video, unless told


def is_video(source: Any) -> bool:
    """Return whether `source` is the path of a video, by its name's ending."""
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() in SUFFIXES


def open_video(path: Any, frames: int = FRAMES, sample: str = "") -> tuple[np.ndarray, Any]:
    """Return uint8 [F, H, W, 3], at most `frames` of a video's frames, evenly spaced from the first to the last, and its metadata.

    The metadata is transformers' `VideoMetadata`, which a processor makes time stamps of.

    Raises
    ------
    UserError
        Naming `sample` and the file, if it is missing or can't be decoded, or OpenCV isn't installed.
    """
    where = f"{sample}: video {path}" if sample else f"video {path}"
    if not Path(path).is_file():
        raise UserError(f"{where} doesn't exist")
    check_installed("videos", "eval", "cv2")
    from transformers.video_utils import load_video

    def chosen(metadata: Any, **_: Any) -> np.ndarray:
        return (
            np.linspace(0, metadata.total_num_frames - 1, min(frames, metadata.total_num_frames))
            .round()
            .astype(int)
        )

    try:
        pictures, metadata = load_video(str(path), backend="opencv", sample_indices_fn=chosen)
    except Exception as error:  # a decoder raises what it likes
        raise UserError(f"{where} can't be decoded ({one_line(error)}); replace it") from error
    if not len(pictures):
        raise UserError(f"{where} has no frames; replace it")
    return np.asarray(pictures), metadata
