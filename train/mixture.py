"""A training mixture in LLaVA's JSON format: checked once, then an Arrow file that every process maps.

A parsed JSON of 1 GB would take several GB in each process. Here its samples are read one by one and kept as Arrow
in a cache folder; the file is memory-mapped, so that all processes and workers of a node share its pages, and a
second start reads nothing but its index.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.llava_json import JsonList, Sample, opens_with_image, read_sample

FORMAT = 2  # of the cached files; another number builds them anew
ROWS = 4096  # samples a record batch


class Mixture:
    """Samples of a cached mixture, by number.

    Parameters
    ----------
    arrow_file : path
    data_path : path
        The JSON file, for names.
    rows : int64 [n], optional
        Which of the file's conversations, in order; all where None.
    """

    def __init__(self, arrow_file: Path, data_path: Path, rows: np.ndarray | None = None) -> None:
        import pyarrow as pa

        self.arrow_file, self.data_path = arrow_file, data_path
        with pa.memory_map(str(arrow_file)) as source:
            self._table = pa.ipc.open_file(source).read_all()
        self.rows = np.arange(self._table.num_rows) if rows is None else rows

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.arrow_file, self.data_path, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        values = {name: self._table[name][row].as_py() for name in ("images", "questions", "answers")}
        turns = tuple(zip(values["questions"], values["answers"], strict=True))
        return Sample(self.name(index), tuple(values["images"]), turns)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def name(self, index: int) -> str:
        """Return how errors call a sample: its place in the file and its id."""
        row = int(self.rows[index])
        return _name(self.data_path, row, self._table["id"][row].as_py())

    def take(self, indices: np.ndarray) -> Mixture:
        """Return the samples with these numbers."""
        return Mixture(self.arrow_file, self.data_path, self.rows[indices])

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON file."""
        return self._table.schema.metadata[b"digest"].decode()

    def image_counts(self) -> np.ndarray:
        """int64 [n]: images of each sample."""
        import pyarrow.compute as pc

        return pc.list_value_length(self._table["images"]).to_numpy()[self.rows].astype(np.int64)

    def lengths(self, tokens_per_image: int | Mapping[str, float]) -> np.ndarray:
        """int64 [n]: about how many tokens each sample has, four characters of text a token.

        `tokens_per_image` may be by the images' folders.
        """
        text = self._table["characters"].to_numpy()[self.rows] // 4
        if not isinstance(tokens_per_image, Mapping):
            return text + self.image_counts() * tokens_per_image
        import pyarrow as pa

        names = self._table["images"].combine_chunks().take(pa.array(self.rows)).to_pylist()
        of_images = [sum(tokens_per_image[os.path.dirname(name)] for name in sample) for sample in names]
        return text + np.array(of_images).round().astype(np.int64)

    def images(self) -> list[str]:
        """Return every image's path, once, in order of first use."""
        import pyarrow as pa
        import pyarrow.compute as pc

        used = self._table["images"].combine_chunks().take(pa.array(self.rows))
        return pc.unique(pc.list_flatten(used)).to_pylist()

    def users(self, images: Collection[str]) -> Iterator[tuple[int, str]]:
        """Yield (place in `rows`, image) of every sample that has any of these images, once a sample."""
        column = self._table["images"].combine_chunks()
        for index, row in enumerate(self.rows.tolist()):
            for image in column[row].as_py():
                if image in images:
                    yield index, image
                    break

    def problems(self) -> dict[int, str]:
        """Return what is wrong with each malformed sample, by its place in the file."""
        column = self._table["problem"]
        if column.null_count == len(column):
            return {}
        found = zip(self.rows.tolist(), column.take(self.rows).to_pylist(), strict=True)
        return {row: problem for row, problem in found if problem is not None}

    def without(self, rows: Collection[int]) -> Mixture:
        """Return the samples but those with these places in the file."""
        return Mixture(self.arrow_file, self.data_path, np.setdiff1d(self.rows, np.fromiter(rows, int)))

    def is_text(self) -> np.ndarray:
        """bool [n]: which samples are conversations without an image, malformed or not."""
        return self._table["text"].to_numpy()[self.rows]


def open_mixture(
    data_path: str | Path, cache: str | Path | None = None, text_only: bool = False
) -> tuple[Mixture, int]:
    """Return a mixture, through the cache: parsed and checked where it is new or has changed.

    Parameters
    ----------
    data_path : path
        A JSON list in LLaVA's format.
    cache : path, optional
        Folder of the Arrow files; default ``$XDG_CACHE_HOME/dynllava``, else ``~/.cache/dynllava``.
    text_only : bool
        Whether conversations without an image belong to it.

    Returns
    -------
    mixture : Mixture
        In file order, malformed samples (`problems`) among them.
    left_out : int
        Conversations without an image that don't belong to it.

    Raises
    ------
    UserError
        Not a JSON list, none with an image, or a cache that can't be written.
    """
    if not find_spec("pyarrow"):
        raise UserError('training keeps its data as Arrow: pip install -e ".[train]"')
    path = Path(data_path)
    arrow_file = _cached(path, cache)
    everything = Mixture(arrow_file, path)
    if text_only:
        return everything, 0
    rows = np.flatnonzero(~everything.is_text())
    if not len(rows):
        raise UserError(
            f"--data_path {data_path}: none of its {len(everything)} samples has an 'image' to train on"
        )
    return everything.take(rows), len(everything) - len(rows)


def _cached(path: Path, cache: str | Path | None) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynllava"
    folder = Path(cache) if cache is not None else default
    try:
        facts = path.stat()
    except OSError:
        raise UserError(f"--data_path {path}: no such file") from None
    identity = f"{FORMAT} {path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    arrow_file = folder / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.arrow"
    if not arrow_file.is_file():
        fresh = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Nodes that share the folder may have processes of one number.
            handle, name = tempfile.mkstemp(dir=folder, prefix=f".{arrow_file.name}-")
            os.close(handle)
        except OSError as error:
            raise UserError(
                f"--data_cache {folder}: cannot write there ({error.strerror}); name another"
            ) from None
        temporary = Path(name)
        try:
            temporary.chmod(0o644)  # mkstemp's own would shut out whoever else uses the cache
            _write(path, temporary)
            os.replace(temporary, arrow_file)
        except UserError:
            raise
        except (OSError, ValueError) as error:  # Arrow's own are of either kind
            reason = " ".join(str(error).split())
            raise UserError(f"--data_cache {folder}: cannot write there ({reason})") from None
        finally:
            temporary.unlink(missing_ok=True)
            if fresh and not arrow_file.is_file():
                folder.rmdir()
    return arrow_file


def _write(path: Path, target: Path) -> None:
    """Parse the JSON and write its samples as Arrow."""
    import pyarrow as pa

    texts = pa.list_(pa.large_string())
    schema = pa.schema(
        {"id": pa.string(), "images": pa.list_(pa.string()), "questions": texts, "answers": texts}
        | {"characters": pa.int64(), "problem": pa.string(), "text": pa.bool_()}
    )
    schema = schema.with_metadata({"digest": _digest(path)})
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        rows: list[dict[str, Any]] = []
        for number, item in enumerate(JsonList(path, "--data_path")):
            rows.append(_row(path, number, item))
            if len(rows) == ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                rows = []
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def _row(path: Path, number: int, item: Any) -> dict[str, Any]:
    identity = repr(item["id"]) if isinstance(item, dict) and "id" in item else None
    problem = None
    try:
        sample = read_sample(_name(path, number, identity), item)
    except UserError as error:
        sample = Sample("", (), ())
        problem = str(error).encode(errors="backslashreplace").decode()
    questions, answers = [turn[0] for turn in sample.turns], [turn[1] for turn in sample.turns]
    return {
        "id": identity,
        "images": list(sample.images),
        "questions": questions,
        "answers": answers,
        "characters": sum(map(len, questions)) + sum(map(len, answers)),
        "problem": problem,
        "text": _plain_text(item),
    }


def _plain_text(item: Any) -> bool:
    """Whether a sample, malformed or not, is a conversation without images, which most runs leave out."""
    if not isinstance(item, dict) or item.get("image") or not isinstance(item.get("conversations"), list):
        return False
    return not opens_with_image(item["conversations"])


def _name(path: Path, row: int, identity: str | None) -> str:
    return f"{path}: sample {row}" + (f" (id {identity})" if identity else "")
