"""What exactly was evaluated: the checkpoint's content and this package's commit."""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

from dynllava_plugin.files import saved_json

HASH_VARIABLE = "DYNLLAVA_CHECKPOINT_HASH"
_CONTENT = ("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja")
_CHUNK = 2**22
# Rooms of this package that no harness's run goes through: work on them undoes no result.
_APART = ("bench", "compare", "demo", "serve", "visualize")


@cache
def checkpoint_hash(pretrained: str) -> str:
    """Return twelve digits that change with the checkpoint's weights or configuration.

    Of a folder its files' content, and that of an adapter's base where it is a folder too; of a hub id its commit in the local
    cache, ``unknown`` where it isn't there (`resolve_checkpoint` fetches it). `dynllava eval` computes it once for all of its
    runs and hands it on as ``$DYNLLAVA_CHECKPOINT_HASH``.
    """
    given = os.environ.get(HASH_VARIABLE, "")
    name, _, digest = given.rpartition("=")
    if digest and name == pretrained:
        return digest
    folder = Path(pretrained)
    if not folder.is_dir():
        from dynllava_plugin.model.checkpoints.sources import BUNDLED, find_checkpoint

        if pretrained not in BUNDLED:
            return _hub_commit(pretrained)
        folder = find_checkpoint(pretrained)
    digest_of_all = hashlib.sha256()
    files = sorted({path for pattern in _CONTENT for path in folder.glob(pattern) if path.is_file()})
    for path in files:
        digest_of_all.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest_of_all.update(chunk)
    base = saved_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).is_dir():
        digest_of_all.update(checkpoint_hash(base).encode())
    return digest_of_all.hexdigest()[:12]


def resolve_checkpoint(pretrained: str) -> str:
    """Return `checkpoint_hash`, of a hub id after its text files were fetched: it is the same before and after the weights come.

    Raises
    ------
    UserError
        For neither a folder, nor a hub id that is in the cache or can be fetched.
    """
    from dynllava_plugin.model.checkpoints.sources import find_checkpoint

    find_checkpoint(pretrained, weights=False)
    return checkpoint_hash(pretrained)


@cache
def source_digest() -> str:
    """Return twelve digits that change with the sources, task files and registry that a harness's run goes through."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for path in sorted([*root.rglob("*.py"), *root.rglob("*yaml"), *root.rglob("benchmarks.csv")]):
        if path.relative_to(root).parts[0] in _APART:
            continue
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _hub_commit(repo: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, "config.json")
    except ValueError:
        return "unknown"
    return Path(found).parent.name[:12] if isinstance(found, str) else "unknown"


@cache
def commit() -> str | None:
    """Return the commit this package runs from, ``+`` where its files were changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+"]
        return subprocess.check_output(describe, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
