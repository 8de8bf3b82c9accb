"""A model card with recipe and results, and the upload of a checkpoint to the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub

from dynllava_plugin.errors import UserError
from dynllava_plugin.files import read_json
from dynllava_plugin.markup import MARKDOWN

PAPER = "https://arxiv.org/abs/2412.00876"
# Of a trained model's folder: what others need. Logs, checkpoints to go on from and pickles stay.
UPLOADED = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "README.md", "train_log.csv", "clip/*"]
# In words, in this order; the rest of the run's arguments follow by their names.
SPARSITY = {
    "sparse_layer": "l, the first decoder layer with the reduced context",
    "vision_keep_rate": "image tokens kept",
    "text_keep_rate": "output tokens kept as context",
    "min_text_length": "shortest answer that was thinned in training (tokens)",
    "mode": "mode",
}


def write_card(folder: Path, results: str | None = None) -> Path:
    """Write README.md of a checkpoint and return its path: what it is, how to load it, its recipe, its results.

    `folder` is a checkpoint in this package's layout, or an adapter's; `run.json` of the training there holds the recipe.
    `results` is a table in Markdown, as `dynllava table` makes it. Raises `UserError` where it is no checkpoint.
    """
    config = read_json(folder / "config.json")
    sparsity = config.get("text_config", {}).get("sparsity") or config.get("sparse_config")
    if sparsity is None:
        raise UserError(f"{folder / 'config.json'}: not a Dynamic-LLaVA (no sparsity settings)")
    kind = str(config.get("model_type")).removeprefix("dynamic_")
    run = read_json(folder / "run.json").get("arguments", {}) if (folder / "run.json").is_file() else {}
    parts = [
        _front_matter(run),
        f"# {folder.resolve().name}\n",
        f"A {'LLaVA-1.5' if kind in ('llava', 'llava_llama') else kind} as a [Dynamic-LLaVA]({PAPER}): its learned predictors "
        "drop most image tokens and part of the generated text from the context of the later decoder layers.\n",
        "## Use\n",
        '```python\nfrom dynllava_plugin import load_model\n\nmodel, processor = load_model("THIS_REPOSITORY")\n```\n',
        "## Sparsification\n",
        _table([(words, sparsity[name]) for name, words in SPARSITY.items() if name in sparsity]),
        "## Recipe\n",
        _recipe(run),
        "## Results\n",
        results.strip() + "\n" if results else "Not measured.\n",
    ]
    path = folder / "README.md"
    temporary = folder / ".README.md"
    temporary.write_text("\n".join(parts), encoding="utf-8")
    temporary.replace(path)
    return path


def push(folder: Path, hub_id: str, results: str | None = None, private: bool = False) -> str:
    """Write the card, upload a checkpoint and return the repository's address; `UserError` where the hub refuses, too."""
    write_card(folder, results)
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder, allow_patterns=UPLOADED)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{hub_id}: cannot be uploaded ({reason}); log in with `hf auth login`") from None
    return str(address)


def _front_matter(run: dict[str, Any]) -> str:
    base = run.get("model_name_or_path")
    # A hub id is OWNER/NAME; a path of the machine that trained means nothing elsewhere.
    if not base or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) or Path(base).exists():
        base = None
    facts = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "base_model": base}
    return f"---\n{huggingface_hub.ModelCardData(**facts, tags=['dynamic-llava', 'token-pruning']).to_yaml()}\n---\n"


def _recipe(run: dict[str, Any]) -> str:
    if not run:
        return "Not recorded.\n"
    left_out = {*SPARSITY, "lora_targets"} if not run.get("lora_rank") else set(SPARSITY)
    rows = [(f"`{name}`", value) for name, value in run.items() if name not in left_out and value is not None]
    return _table([(name, value if isinstance(value, str) else json.dumps(value)) for name, value in rows])


def _table(rows: list[tuple[str, Any]]) -> str:
    body = "\n".join(f"| {name} | {str(value).translate(MARKDOWN)} |" for name, value in rows)
    return f"| setting | value |\n|---|---|\n{body}\n"
