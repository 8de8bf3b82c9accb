"""The mixture's images on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import leaves
from train.mixture import Mixture


def missing_images(mixture: Mixture, image_folder: str | Path, allow_outside: bool) -> dict[str, str]:
    """Return the images that are not there and why, by listing each sub-folder once instead of opening every file.

    Raises
    ------
    UserError
        The folder can't be listed, or a path leaves it: upwards, as an absolute one, or through a link.
    """
    folder = Path(image_folder)
    parents: dict[str, list[str]] = {}
    for image in mixture.images():
        parents.setdefault(os.path.dirname(image), []).append(image)
    missing = {}
    for parent, images in parents.items():
        if not allow_outside and leaves(folder, parent):
            _refuse(mixture, image_folder, images[0])
        listed, links = _listed(image_folder, folder / parent)
        absent = []
        for image in images:
            name = os.path.basename(image)
            if name in links and not allow_outside and leaves(folder, image):
                _refuse(mixture, image_folder, image)
            if not (name in listed or (name in links and (folder / image).exists())):
                absent.append(image)
        for image in absent:
            missing[image] = f"image {image} is missing ({len(absent)} of {len(images)} in {parent or '.'})"
    return missing


def _listed(image_folder: str | Path, place: Path) -> tuple[set[str], set[str]]:
    """Return the names in a folder, and those that are links; none where there is no such folder."""
    listed: set[str] = set()
    links: set[str] = set()
    try:
        if place.is_dir():
            with os.scandir(place) as entries:
                for entry in entries:
                    (links if entry.is_symlink() else listed).add(entry.name)
    except OSError as error:
        raise UserError(
            f"--image_folder {image_folder}: {place} can't be listed ({error.strerror})"
        ) from None
    return listed, links


def _refuse(mixture: Mixture, image_folder: str | Path, image: str) -> NoReturn:
    index, _ = next(mixture.users({image}))
    raise UserError(
        f"--image_folder {image_folder}: {image} of {mixture.name(index)} lies outside of it; mend the path, or "
        "--allow_outside true where that is meant"
    )
