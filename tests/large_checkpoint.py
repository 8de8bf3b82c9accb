"""Loading a checkpoint of the published 7B's shape: `python -m tests.large_checkpoint make|safetensors|ours FOLDER`.

`make` writes 14.1 GB of random bfloat16 weights in the published layout; the others load them, read every weight once, and print
seconds, and peak memory in GB.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig

from dynllava_plugin.model.checkpoints import load_without_processor
from dynllava_plugin.model.checkpoints.building import empty_model
from dynllava_plugin.model.checkpoints.converting import published_config, published_name
from dynllava_plugin.model.checkpoints.layouts import CLIP_L_336_CONFIG
from dynllava_plugin.model.families.llava import DynamicLlavaConfig

SHARD = 2 * 10**9  # bytes


def make(folder: Path) -> None:
    """Write the checkpoint, at most `SHARD` bytes and one tensor of it in memory."""
    folder.mkdir(parents=True)
    vision = CLIPVisionConfig(**CLIP_L_336_CONFIG)
    text = LlamaConfig(num_hidden_layers=32, vocab_size=32000)  # its other defaults are the 7B's
    config = DynamicLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=31999, vision_feature_layer=-2
    )
    model = empty_model(config, torch.bfloat16, None)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    names = list(model.state_dict())
    for name, empty in model.state_dict().items():
        shard[published_name(name)] = torch.randn(empty.shape, dtype=torch.bfloat16) * 0.02
        if sum(2 * tensor.numel() for tensor in shard.values()) > SHARD or name == names[-1]:
            file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file)
            places |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(published_config(config, 32000, "clip", "bfloat16")))
    (folder / "clip").mkdir()
    (folder / "clip" / "config.json").write_text(
        json.dumps({**CLIP_L_336_CONFIG, "model_type": "clip_vision_model"})
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def load(folder: Path, ours: bool) -> str:
    """Return what loading by `load_without_processor`, or by safetensors alone, cost until the tensors were there and read."""
    before, start, cpu = _peak(), time.time(), time.process_time()
    if ours:
        weights = load_without_processor(folder, device="cpu").state_dict()
    else:
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as opened:
                weights |= {name: opened.get_tensor(name) for name in opened.keys()}
    there = f"{time.time() - start:.2f} s (CPU {time.process_time() - cpu:.2f} s), peak {_peak():.2f}"
    for weight in weights.values():
        weight.view(torch.int16).max()
    return (
        f"imports {before:.2f} GB; loaded {there} GB; read {time.time() - start:.1f} s, peak {_peak():.2f} GB"
    )


if __name__ == "__main__":
    what, place = sys.argv[1], Path(sys.argv[2])
    if what == "make":
        make(place)
    else:
        print(f"{what}: {load(place, what == 'ours')}")
