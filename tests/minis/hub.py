"""Hub dataset repositories written to a folder: parquet files and the README that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynllava_plugin.files import write_text

# "string", "int64", ...; "image"; [x] for a list of x; {name: x} for a struct.
Schema = Any
Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """One configuration of a repository.

    Attributes
    ----------
    schema : dict
        Column -> type, in the repository's order.
    splits : dict
        Split -> rows.
    path : str
        Folder of the parquet files inside the repository, e.g. ``data/``, or the one file's name.
    """

    schema: dict[str, Schema]
    splits: dict[str, list[Row]]
    path: str = "data/"


def image(content: bytes, name: str) -> dict[str, Any]:
    """An image cell as the hub's parquet files hold it."""
    return {"bytes": content, "path": name}


def write_repo(root: Path, repo: str, configs: Mapping[str, Config]) -> None:
    """Write `root/repo`, which `datasets.load_dataset(repo, config)` reads from the folder `root`.

    Parameters
    ----------
    root : Path
    repo : str
        ``owner/name``.
    configs : mapping
        Configuration -> its content; one named "default" needs no name when loading.
    """
    import yaml
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    folder = root / repo
    header: dict[str, list[dict[str, Any]]] = {"dataset_info": [], "configs": []}
    for name, config in configs.items():
        features = _features(config.schema)
        files, sizes = [], []
        for split, rows in config.splits.items():
            table = Dataset.from_dict(
                {column: [row.get(column) for row in rows] for column in config.schema}, features=features
            )
            one_file = config.path.endswith(".parquet")
            path = folder / (config.path if one_file else f"{config.path}{split}-00000-of-00001.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(str(path))
            files.append({"split": split, "path": config.path if one_file else f"{config.path}{split}-*"})
            sizes.append({"name": split, "num_examples": len(rows)})
        info = {"config_name": name, "features": features._to_yaml_list(), "splits": sizes}
        header["dataset_info"].append(info)
        header["configs"].append({"config_name": name, "data_files": files})
    text = yaml.safe_dump(header, sort_keys=False)
    write_text(
        folder / "README.md",
        f"---\n{text}---\n\nA miniature of {repo}: its schema, made of easy-VQA's images.\n",
    )


def _features(schema: Mapping[str, Schema]) -> Any:
    from datasets import Features

    return Features({name: _feature(kind) for name, kind in schema.items()})


def _feature(kind: Schema) -> Any:
    from datasets import Image, List, Value

    if isinstance(kind, Sequence) and not isinstance(kind, str):
        return List(_feature(kind[0]))
    if isinstance(kind, Mapping):
        return {name: _feature(inner) for name, inner in kind.items()}
    return Image() if kind == "image" else Value(kind)
