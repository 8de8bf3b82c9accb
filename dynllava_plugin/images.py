"""Opening images: each as 8-bit RGB, and a bad one named in one line instead of ending hours of work with a traceback."""

from __future__ import annotations

import io
import os
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from dynllava_plugin.errors import UserError, one_line


def fetched(url: str) -> bytes:
    """Return what is at an http, https or data URL."""
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read()


def open_image(
    source: Any, sample: str = "", turned: bool = False, fetch: Callable[[str], bytes] = fetched
) -> Image.Image:
    """Return an image as RGB, fully decoded, 16-bit grey values scaled to 8 bits.

    Parameters
    ----------
    source : path, http(s) or data URL, PIL image, or uint8 array [H, W, 3] or [3, H, W]
    sample : str
        What the image belongs to, for the error message.
    turned : bool
        Whether it is turned as its EXIF note says, which LLaVA's code ignores.
    fetch : callable
        Returns what is at an http or https URL.

    Raises
    ------
    UserError
        If it is missing, truncated, no image, of a kind that has no RGB, or of grey values on a scale that it doesn't tell.
    """
    named = source if isinstance(source, (str, os.PathLike)) else getattr(source, "filename", "")
    where = f"{sample}: " if sample else ""
    where += f"image {os.fspath(named)[:200]}" if named else "the image given"
    # lmms-eval switches PIL to fill what a truncated file lacks with gray, for the whole process.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    problem = "cannot be read as an image"
    try:
        image = _opened(source, fetch)
        problem = "is truncated or corrupt"
        image.load()
        problem = "cannot be read as an image"
        image = _eight_bits(ImageOps.exif_transpose(image) if turned else image)
        return image.convert("RGB")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{where} doesn't exist") from None
    except UnidentifiedImageError:
        raise UserError(f"{where} isn't an image that PIL can read; replace the file") from None
    except (
        Exception
    ) as error:  # PIL raises anything from SyntaxError to struct.error, an address its network's errors
        raise UserError(f"{where} {problem} ({one_line(error)}); replace it") from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _opened(source: Any, fetch: Callable[[str], bytes]) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        return Image.open(io.BytesIO(fetched(source)))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return Image.open(io.BytesIO(fetch(source)))
    if isinstance(source, (str, os.PathLike)):
        return Image.open(source)
    array = np.asarray(source)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise UserError(f"an array must be uint8 [H, W, 3] or [3, H, W], not {array.dtype} {array.shape}")
    return Image.fromarray(array)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return 16-bit grey values scaled to 8 bits, where PIL would cut them off."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):  # 32-bit integers, floating-point numbers
        raise UserError(
            f"grey values of mode {image.mode!r} have no known scale; save the image with 8 or 16 bits"
        )
    return image
