"""Files and checkpoints as they shouldn't be, each made in a folder of its own."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open


def write(path: Path, content: bytes | str | Any = b"") -> None:
    """Write bytes, text, or anything else as JSON, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def images(folder: Path) -> None:
    """A good picture, `good.png`, and those that are none."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "red").save(folder / "good.png")
    good = (folder / "good.png").read_bytes()
    write(folder / "empty.png")
    write(folder / "text.png", "not a picture\n")
    write(folder / "half.png", good[: len(good) // 2])
    write(folder / "page.html", "<html></html>")
    write(folder / "drawing.svg", '<svg xmlns="http://www.w3.org/2000/svg"/>')
    write(
        folder / "video.mp4",
        struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"isom", 512, b"isom", b"mp41") + b"\0" * 64,
    )
    write(folder / "weights.png", struct.pack("<Q", 2) + b"{}")
    (folder / "folder.png").mkdir()


MODEL = Path(tempfile.gettempdir())  # set by the campaign: the bundled checkpoint as this package saves it


def tiny(folder: Path) -> Path:
    """The bundled checkpoint, its weights linked, its other files copied."""
    folder.mkdir(parents=True)
    for file in MODEL.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        elif file.is_file():
            shutil.copy(file, folder / file.name)
    return folder


def with_config(**changes: Any) -> Callable[[Path], None]:
    """The bundled checkpoint whose config.json has other values; ``a__b`` is b of a."""

    def make(folder: Path) -> None:
        file = tiny(folder) / "config.json"
        values = json.loads(file.read_text())
        for name, value in changes.items():
            *above, last = name.split("__")
            place = values
            for key in above:
                place = place[key]
            place[last] = value
        write(file, values)

    return make


def with_file(name: str, content: bytes | str | Any) -> Callable[[Path], None]:
    """The bundled checkpoint with another content of one file."""

    def make(folder: Path) -> None:
        file = tiny(folder) / name
        file.unlink(missing_ok=True)
        write(file, content)

    return make


def without(name: str) -> Callable[[Path], None]:
    """The bundled checkpoint without one file."""

    def make(folder: Path) -> None:
        (tiny(folder) / name).unlink()

    return make


def _cut(folder: Path) -> None:
    for file in tiny(folder).glob("*.safetensors"):
        content = file.read_bytes()
        file.unlink()
        write(file, content[: len(content) // 2])


def _only_pickles(folder: Path) -> None:
    for file in tiny(folder).glob("*.safetensors*"):
        file.unlink()
    write(folder / "pytorch_model.bin", b"\x80\x04N.")


def _shard_missing(folder: Path) -> None:
    (weights,) = tiny(folder).glob("*.safetensors")
    with safe_open(weights, framework="pt") as opened:
        places = dict.fromkeys(opened.keys(), "model-00001-of-00002.safetensors")
    weights.unlink()
    write(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": places})


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    # name: how it is made, what the line must name
    "missing": (lambda folder: None, "missing"),
    "empty": (lambda folder: folder.mkdir(parents=True), "empty"),
    "a-file": (lambda folder: write(folder, "text"), "a-file"),
    "no-config": (without("config.json"), "config.json"),
    "config-garbage": (with_file("config.json", "{ not json"), "config.json"),
    "config-empty": (with_file("config.json", ""), "config.json"),
    "config-list": (with_file("config.json", "[1, 2]"), "config.json"),
    "config-binary": (with_file("config.json", b"\xff\xfe\x00{"), "config.json"),
    "other-model": (with_config(model_type="bert"), "bert"),
    "no-such-model": (with_config(model_type="llavva"), "llavva"),
    "weights-cut": (_cut, "safetensors"),
    "weights-empty": (with_file("model.safetensors", b""), "safetensors"),
    "weights-text": (
        with_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "safetensors",
    ),
    "weights-missing": (without("model.safetensors"), "safetensors"),
    "only-pickles": (_only_pickles, "safetensors"),
    "shard-missing": (_shard_missing, "model-00001-of-00002.safetensors"),
    "tokenizer-garbage": (with_file("tokenizer.json", "{ not json"), "tokenizer"),
    "sparsity-mode": (with_config(text_config__sparsity__mode="both"), "both"),
    "sparsity-rate": (with_config(text_config__sparsity__vision_keep_rate=1.5), "vision_keep_rate"),
    "sparsity-layer": (with_config(text_config__sparsity__sparse_layer=400), "400"),
    "sparsity-policy": (with_config(text_config__sparsity__policy="fastvv"), "fastvv"),
    "generation-garbage": (with_file("generation_config.json", "{ not json"), "generation_config.json"),
    "layers-a-million": (with_config(text_config__num_hidden_layers=1_000_000), "num_hidden_layers"),
    "vision-layer": (with_config(vision_feature_layer=50), "vision_feature_layer"),
}
