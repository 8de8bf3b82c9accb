"""Checkpoints to go on from: whole or not there, and known for whole before they are used."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynllava_plugin.errors import UserError

MANIFEST = "manifest.json"
SAVING = ".saving"
NAME = re.compile(r"checkpoint-(\d+)$")


def checkpoints(output_dir: Path) -> list[Path]:
    """Return a run's checkpoint folders, oldest first, whole or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step a checkpoint was saved after."""
    name = NAME.match(checkpoint.name)
    assert name, checkpoint
    return int(name[1])


def saved_step(checkpoint: Path) -> int:
    """Return the optimiser step of a whole checkpoint under any name, as Trainer's state says."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def seal(folder: Path) -> None:
    """List a folder's files, their sizes and checksums in its manifest, everything on disk before that."""
    sizes, checksums = {}, {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        name = path.relative_to(folder).as_posix()
        sizes[name], checksums[name] = path.stat().st_size, checksum(path)
    manifest = folder / MANIFEST
    content = {"files": sizes, "crc32": checksums}
    manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file: it finds damage, not forgery."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found = zlib.crc32(block, found)
    return found


def damage(folder: Path, read: bool = True) -> str | None:
    """Return what a checkpoint lacks, in words; None where it is whole.

    With `read` every byte is held against the manifest's checksums (one of an earlier version has none), else sizes alone.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes, checksums = dict(manifest["files"]), dict(manifest.get("crc32", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}, so it was not finished"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if read and name in checksums and checksum(path) != checksums[name]:
            return f"{name} is damaged: its checksum is not the manifest's"
    return None


def last_whole(output_dir: Path, read: bool = True) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is whole (None: there is none), and a line for each newer one that isn't."""
    notes: list[str] = []
    for folder in reversed(checkpoints(output_dir)):
        problem = damage(folder, read)
        if problem is None:
            return folder, notes
        notes.append(f"{folder}: not used, {problem}")
    return None, notes


def publish(folder: Path, output_dir: Path, keep: int | None) -> None:
    """Move a sealed checkpoint into place, then delete older ones.

    Parameters
    ----------
    folder : Path
        The sealed checkpoint, alone in a folder on the same disk.
    output_dir : Path
    keep : int or None
        How many whole ones stay; all where None. Older damaged ones never do.
    """
    target = output_dir / folder.name
    discard(target)  # a damaged one, or this step's from before
    os.replace(folder, target)
    shutil.rmtree(folder.parent, ignore_errors=True)
    _sync(output_dir)
    older = [path for path in checkpoints(output_dir) if step_of(path) < step_of(target)]
    whole = [path for path in older if damage(path, read=False) is None]
    kept = whole if keep is None else whole[max(0, len(whole) - (keep - 1)) :]
    for path in older:
        if path not in kept:
            discard(path)


def discard(folder: Path) -> None:
    """Delete a checkpoint; under another name first, so that half of it is never taken for one."""
    if folder.exists():
        doomed = folder.with_name(f".deleting-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clean_up(output_dir: Path) -> None:
    """Delete what a killed run left behind."""
    for path in [output_dir / SAVING, *output_dir.glob(".deleting-*")]:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def saying_what_is_left(what: str, output_dir: Path, partial: Path, delete: bool) -> Iterator[None]:
    """Turn whatever goes wrong while saving into one line that names the last whole checkpoint.

    Parameters
    ----------
    what : str
        What is being saved.
    output_dir, partial : Path
        The run's folder, and where in it the half-saved files are.
    delete : bool
        Whether this process deletes those.

    Raises
    ------
    UserError
        The disk is full, or anything else that the writers raise.
    """
    try:
        yield
    except Exception as error:  # safetensors, PyTorch and Python each have their own for a full disk
        if delete:
            shutil.rmtree(partial, ignore_errors=True)
        last = last_whole(output_dir, read=False)[0]
        left = f"{last} is whole" if last else "there is no earlier checkpoint"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        free = shutil.disk_usage(output_dir).free / 1e9  # PyTorch's writer doesn't say that a disk is full
        raise UserError(
            f"{what} could not be saved ({reason}; {free:.1f} GB are free there); {left}: make room, then give the "
            "same command again to go on"
        ) from error


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
