"""A small random Dynamic-LLaVA and random batches: mixed prompt lengths, no, one or several images a sample."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from dynllava_plugin import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration

IMAGE_TOKEN = 90
PAD = 0
EOS = 2
VOCAB = 96
TOKENS_PER_IMAGE = 16


def random_model(seed: int = 0, attention: str = "sdpa", kv_heads: int = 2, **sparsity) -> torch.nn.Module:
    """5 layers x 32 wide; predictors scaled up so that decisions are far from ties and about half of the text stays."""
    torch.manual_seed(seed)
    config = DynamicLlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            image_size=28, patch_size=7, intermediate_size=32, projection_dim=16,
        ),
        text_config=dict(
            model_type="dynamic_llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=5,
            num_attention_heads=4, num_key_value_heads=kv_heads, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
            sparsity=dict(
                vision_keep_rate=0.3, predictor_dim=32, predictor_heads=4, predictor_ffn_dim=64, min_text_length=4,
                **sparsity,
            ),
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=TOKENS_PER_IMAGE,
    )  # fmt: skip
    config._attn_implementation = attention
    model = DynamicLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8 if "predictor" in name or "embed_tokens" in name else 4)
        # A trained head would never name a placeholder.
        model.lm_head.weight[IMAGE_TOKEN] = 0
    model.generation_config.pad_token_id = PAD
    _balance(model)
    return model


@torch.no_grad()
def _balance(model: torch.nn.Module) -> None:
    """Shift the text predictor's bias so that it keeps about half of random text behind an image."""
    predictor = model.model.language_model.text_predictor
    if predictor is None:
        return
    seen = []
    hook = predictor.register_forward_hook(lambda module, inputs, output: seen.append(output))
    rng = random.Random(0)
    batch = batch_of([random_sample(rng, 1, 64) for _ in range(8)])
    mode = model.config.sparsity.mode
    model.set_sparsity(mode="image_text")
    model(**batch, prompt_length=batch["input_ids"].shape[1] - 60, use_cache=False)
    model.set_sparsity(mode=mode)
    hook.remove()
    predictor.head[-1].bias[1] += (seen[0][..., 0] - seen[0][..., 1]).median()


@dataclass
class Sample:
    ids: list[int]
    images: torch.Tensor  # [n, 3, 28, 28]


def random_sample(rng: random.Random, images: int, text: int) -> Sample:
    parts = [[rng.randrange(3, 80) for _ in range(rng.randrange(1, 4))] for _ in range(images)]
    ids = [1] + [t for part in parts for t in part + [IMAGE_TOKEN] * TOKENS_PER_IMAGE]
    ids += [rng.randrange(3, 80) for _ in range(text)]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return Sample(ids, torch.randn(images, 3, 28, 28, generator=generator))


def batch_of(samples: list[Sample], left: bool = True, labels: list[list[int]] | None = None) -> dict:
    """Padded tensors; `labels` are appended answers, then also returned as labels."""
    answers = labels or [[] for _ in samples]
    rows = [sample.ids + answer for sample, answer in zip(samples, answers, strict=True)]
    width = max(len(row) for row in rows)
    ids, mask, target = [], [], []
    for row, answer in zip(rows, answers, strict=True):
        padding = width - len(row)
        wanted = [-100] * (len(row) - len(answer)) + answer
        before, after = (padding, 0) if left else (0, padding)
        ids.append([PAD] * before + row + [PAD] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
        target.append([-100] * before + wanted + [-100] * after)
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    images = torch.cat([sample.images for sample in samples])
    if len(images):
        batch["pixel_values"] = images
    if labels is not None:
        batch["labels"] = torch.tensor(target)
    return batch
