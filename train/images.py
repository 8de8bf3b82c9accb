"""The mixture's images on disk."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from dynllava_plugin.errors import UserError
from train.mixture import Mixture


def check_images(mixture: Mixture, image_folder: str | Path) -> None:
    """Find missing images before training, by listing each sub-folder once instead of opening every file.

    Raises
    ------
    UserError
        With the number missing per sub-folder and the first few names.
    """
    folder = Path(image_folder)
    if not folder.is_dir():
        raise UserError(f"--image_folder {image_folder}: no such folder")
    listed: dict[str, set[str]] = {}
    wanted: Counter[str] = Counter()
    missing: dict[str, list[str]] = {}
    for image in mixture.images():
        parent, file_name = os.path.split(image)
        if parent not in listed:
            path = folder / parent
            try:
                listed[parent] = set(os.listdir(path)) if path.is_dir() else set()
            except OSError as error:
                raise UserError(
                    f"--image_folder {image_folder}: {path} can't be listed ({error.strerror})"
                ) from None
        wanted[parent] += 1
        if file_name not in listed[parent]:
            missing.setdefault(parent, []).append(image)
    if missing:
        groups = [f"{len(names)} of {wanted[parent]} in {parent or '.'}" for parent, names in missing.items()]
        counts = ", ".join(groups[:5]) + (", ..." if len(groups) > 5 else "")
        names = [name for group in missing.values() for name in group]
        raise UserError(
            f"--image_folder {image_folder}: {len(names)} images are missing ({counts}), "
            f"first: {', '.join(names[:3])}; needed by {mixture.first_user(names[0])}"
        )
