"""Measured rows: a JSON file that is whole after every row, so that an interrupted run loses nothing and can go on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dynllava_plugin.bench.figures import described
from dynllava_plugin.environment import host, versions
from dynllava_plugin.errors import UserError
from dynllava_plugin.files import check_file, read_json, write_json, write_text

# What a row is about; everything else is how it was measured, and what.
KEYS = (
    "phase", "shape", "device", "dtype", "mode", "path", "prompts", "implementation", "kept", "checkpoint", "checkpoint_hash",
    "policy", "benchmark", "limit", "harness", "batch", "length", "repeat",
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
    needed : tuple of str
        Fields of the rows that may be gone on from.

    Raises
    ------
    UserError
        A file that isn't of rows, or can't be written; or, to go on from, one of another machine's rows.
    """

    def __init__(
        self,
        path: Path | None,
        resume: bool,
        common: dict[str, Any],
        needed: tuple[str, ...] = ("mode", "length"),
    ) -> None:
        self.path, self.common = path, common
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        check_file("--json", path)
        if path.is_file():  # what isn't of rows isn't written over
            before = read_rows(path, needed if resume else ())
            self.rows = before if resume else []
        if self.rows:
            _check_machine(path)
        self._write()
        write_json(machine_file(path), {"host": host(), "versions": versions()})

    @classmethod
    def of(cls, args: argparse.Namespace, common: dict[str, Any], *needed: str) -> Rows:
        """Return the rows that a command line's `--json`, `--output` and `--resume` ask for."""
        path = args.json or (args.output / "rows.json" if args.output else None)
        return cls(path, args.resume, common, needed or ("mode", "length"))

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
        """Return whether every one of these rows (given by its own `KEYS`) is there already."""
        return all(
            any({**self.common, **keys}.items() <= row.items() for row in self.rows) for keys in wanted
        )

    def add(self, **values: Any) -> None:
        """Add a row in place of an older one about the same, and print it as a line."""
        row = {**self.common, **values}
        about = {key: row.get(key) for key in KEYS}
        row = {**{key: row[key] for key in KEYS if key in row}, **row}
        self.rows = [old for old in self.rows if {key: old.get(key) for key in KEYS} != about]
        self.rows.append(row)
        self._write()
        print(described(row), file=sys.stderr, flush=True)

    def _write(self) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps(self.rows, indent=1) + "\n")


def machine_file(path: Path) -> Path:
    """Return where the machine is described that the rows in `path` were measured on."""
    return path.with_suffix(".machine.json")


def read_rows(path: Path, needed: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return the rows of a file, each with a phase, a batch and the fields `needed`, or raise `UserError`."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            _ = [row[name] for name in ("phase", "batch", *needed)]
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: not a list of benchmark rows; take another file") from None
    return rows


def _check_machine(path: Path) -> None:
    """Times of two machines make no ratio."""
    described = machine_file(path)
    if not described.is_file():
        return
    there, here = read_json(described).get("host", {}), host()
    for name in SAME_MACHINE:
        if there.get(name) != here.get(name):
            raise UserError(
                f"--resume {path}: measured on another machine ({name} {there.get(name)}, here {here.get(name)}); "
                "take another file, or leave --resume out to measure everything anew"
            )
