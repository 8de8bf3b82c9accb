"""Where a checkpoint's files are: a local folder, the bundled model, or the Hugging Face hub."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from dynllava_plugin.errors import UserError

BUNDLED = {"tiny": "tiny_llava", "tiny-hard": "tiny_llava_hard"}  # folders of assets/
# Never fetched: training_args.bin and other pickles; PyTorch weights only where there are no safetensors, or beside
# an adapter.
TEXT_FILES = ["*.json", "*.jinja", "tokenizer.model"]
WEIGHT_FILES = ["model*.safetensors", "adapter_model.safetensors", "non_lora_trainables.bin"]
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def find_checkpoint(path_or_hub_id: str | Path, weights: bool = True) -> Path:
    """Return the local folder of a checkpoint: a folder, a bundled model (``"tiny"``, ``"tiny-hard"``), or a hub id.

    The last, ``owner/name``, is downloaded, with its `weights` or without, or taken from the hub's cache. Raises `UserError`
    where there is no such folder, no ``config.json`` in it, or the hub id cannot be fetched.
    """
    name = str(path_or_hub_id)
    folder = Path(path_or_hub_id).expanduser()
    if name in BUNDLED and not folder.is_dir():
        folder = Path(str(files("dynllava_plugin") / "assets" / BUNDLED[name]))
    elif not folder.is_dir():
        if folder.exists() or not HUB_ID.match(name) or name.startswith("."):
            raise UserError(
                f"{name}: no such checkpoint folder, nor a hub id (owner/name), nor one of {', '.join(BUNDLED)}"
            )
        folder = _download(name, weights)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json here, so it is not a checkpoint")
    return folder


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=TEXT_FILES))
        if weights:
            snapshot_download(hub_id, allow_patterns=WEIGHT_FILES)
            if not list(folder.glob("*.safetensors")):
                snapshot_download(hub_id, allow_patterns=["pytorch_model*.bin", "adapter_model.bin"])
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{hub_id}: can't be fetched from the hub ({reason}); give a local folder") from None
    return folder
