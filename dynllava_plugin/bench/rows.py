"""Measured rows: a JSON file that is whole after every row, so that an interrupted run loses nothing and can go on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dynllava_plugin.environment import host, versions
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.results.manifest import read_json
from dynllava_plugin.files import check_file, write_json, write_text

# What a row is about; everything else is what was measured.
KEYS = ("phase", "shape", "device", "dtype", "mode", "path", "prompts", "batch", "length")
NEEDED = ("phase", "mode", "batch", "length")
COLUMNS = (
    *KEYS, "median_s", "min_s", "max_s", "iqr_s", "repeats", "tokens_per_s", "speedup", "ideal_speedup", "of_ideal",
    "tflops_paper", "tflops_exact", "read_bytes", "requests", "requests_per_s", "first_token_s", "first_token_speedup",
    "kept_share", "cache_bytes", "resident_bytes",
    "needed_bytes", "growth_bytes", "peak_bytes",
    "weight_bytes", "fits", "baseline_s", "max_difference", "image_tokens", "text_tokens", "vision_keep_rate",
    "text_keep_rate", "threads",
)  # fmt: skip
SAME_MACHINE = ("processor", "cores", "accelerator", "threads")


class Rows:
    """Rows of a run, kept in a file if there is one.

    Parameters
    ----------
    path : Path, optional
        A JSON list of rows.
    resume : bool
        Go on from the rows that the file already holds.
    common : dict
        Fields of every row of this run: shape, device, dtype, rates.

    Raises
    ------
    UserError
        A file that isn't of rows, or can't be written; or, to go on from, one of another machine's rows.
    """

    keys: tuple[str, ...] = KEYS
    columns: tuple[str, ...] = COLUMNS
    needed: tuple[str, ...] = NEEDED

    def __init__(self, path: Path | None, resume: bool, common: dict[str, Any]) -> None:
        self.path, self.common = path, common
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        check_file("--json", path)
        if path.is_file():  # what isn't of rows isn't written over
            before = read_rows(path, self.needed if resume else ("phase",))
            self.rows = before if resume else []
        if resume:
            _check_machine(path)
        self._write()
        write_json(machine_file(path), {"host": host(), "versions": versions()})

    @classmethod
    def of(cls, args: argparse.Namespace, **common: Any) -> Rows:
        """Return the rows that a command line's `--json`, `--output` and `--resume` ask for."""
        path = args.json or (args.output / "rows.json" if args.output else None)
        return cls(path, args.resume, common)

    def carry_out(self, work: Callable[[], None], output: Path | None) -> int:
        """Do the work that adds rows, then write the report into `output`, or print rows that no file holds.

        Returns
        -------
        int
            0, or 130 where the user interrupts: the rows so far are kept.

        Raises
        ------
        UserError
            The device ran out of memory.
        """
        status = 0
        try:
            work()
        except KeyboardInterrupt:
            print("interrupted: the rows so far are kept", file=sys.stderr)
            status = 130
        except torch.OutOfMemoryError:
            raise UserError(
                "--batch, --new-tokens: the device ran out of memory; take less (the rows so far are kept)"
            ) from None
        if self.path is None:
            print(json.dumps(self.rows, indent=1))
        elif output and self.rows:
            from dynllava_plugin.bench.report import report

            report([self.path], output)
        return status

    def has(self, wanted: Iterable[dict[str, Any]]) -> bool:
        """Whether every one of these rows (given by its own `KEYS`) is there already."""
        return all(any(_matches(row, {**self.common, **keys}) for row in self.rows) for keys in wanted)

    def add(self, **values: Any) -> dict[str, Any]:
        """A row, in place of an older one about the same."""
        row = {**self.common, **values}
        about = {key: row.get(key) for key in self.keys}
        row = {name: row[name] for name in self.columns if name in row}
        self.rows = [old for old in self.rows if {key: old.get(key) for key in self.keys} != about]
        self.rows.append(row)
        if self.path is not None:
            self._write()
        return row

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.rows, indent=1) + "\n")  # type: ignore[arg-type]


def machine_file(path: Path) -> Path:
    """Where the machine is described that the rows in `path` were measured on."""
    return path.with_suffix(".machine.json")


def _check_machine(path: Path) -> None:
    """Times of two machines make no ratio."""
    described = machine_file(path)
    if not described.is_file():
        return
    there, here = read_json(described).get("host", {}), host()
    differing = [name for name in SAME_MACHINE if there.get(name) != here.get(name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"--resume {path}: measured on another machine ({name} {there.get(name)}, here {here.get(name)}); "
            "take another file, or leave --resume out to measure everything anew"
        )


def read_rows(path: Path, needed: tuple[str, ...] = NEEDED) -> list[dict[str, Any]]:
    """The rows of a file, each with at least the fields `needed`, or a `UserError`."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            _ = [row[name] for name in needed]
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: not a list of benchmark rows; take another file") from None
    return rows


def _matches(row: dict[str, Any], keys: dict[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in keys.items())
