"""Reading images so that a bad one is named in one line instead of ending hours of work with a traceback."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageFile, UnidentifiedImageError

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.processing import eight_bits


def load_image(source: str | os.PathLike[str] | Image.Image, sample: str = "") -> Image.Image:
    """Return an RGB image, fully decoded.

    Parameters
    ----------
    source : path or PIL image
    sample : str
        What the image belongs to, for the error message.

    Raises
    ------
    UserError
        If the file is missing, truncated, no image, or of grey values on a scale that it doesn't tell.
    """
    where = f"{sample}: " if sample else ""
    if isinstance(source, Image.Image):
        image, name = source, getattr(source, "filename", "") or "image given by the dataset"
    else:
        name = os.fspath(source)
        if not Path(name).is_file():
            raise UserError(f"{where}image {name} doesn't exist")
        try:
            image = Image.open(name)
        except UnidentifiedImageError:
            raise UserError(
                f"{where}image {name} isn't an image that PIL can read; replace the file"
            ) from None
        except (OSError, Image.DecompressionBombError) as error:
            raise UserError(f"{where}image {name} can't be opened: {error}") from None
    # lmms-eval switches PIL to fill what a truncated file lacks with gray, for the whole process.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        return eight_bits(image).convert("RGB")
    except UserError as error:
        raise UserError(f"{where}image {name}: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{where}image {name} is truncated or corrupt ({error}); replace the file") from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
