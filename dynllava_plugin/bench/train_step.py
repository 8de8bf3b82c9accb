"""A whole training step of a random model: forward, backward, optimiser; its FLOPs, and what they say about a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dynllava_plugin.bench.attention import IMAGE_TOKENS, PROMPT_TOKENS, model_attention
from dynllava_plugin.bench.subject import IMAGE_ID, random_config
from dynllava_plugin.bench.timing import seconds
from dynllava_plugin.flops import DecoderShape
from dynllava_plugin.model.families.llava import DynamicLlavaForConditionalGeneration
from dynllava_plugin.sparsity.selection import KEEP

EPOCH_SAMPLES = 665_000  # LLaVA-1.5's finetuning mixture
# Dense bfloat16 FLOP/s of data sheets, by a part of the device's name; the longest that fits.
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip
# CLIP ViT-L/14-336 before models as wide as LLaVA's, else the least tower that gives as many tokens.
TOWER = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
         "image_size": 336, "patch_size": 14, "projection_dim": 768}  # fmt: skip
SMALL_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 32,
               "image_size": 96, "patch_size": 4, "projection_dim": 8}  # fmt: skip


@dataclass(frozen=True)
class StepSettings:
    """What a step is made of.

    Parameters
    ----------
    batch, text : int
        Samples; text tokens of each beside the 576 of its image, the last half of them the answer.
    checkpointing : bool
        Gradient checkpointing of every decoder layer.
    optimizer : "adamw" | "sgd"
        States in the weights' dtype. SGD has none.
    vision_keep_rate, text_keep_rate : float
        What the untrained predictors are biased to keep, on average.
    """

    shape: DecoderShape
    device: str
    dtype: torch.dtype
    batch: int
    text: int
    checkpointing: bool
    optimizer: str
    vision_keep_rate: float = 0.2
    text_keep_rate: float = 0.5

    @property
    def length(self) -> int:
        """Return the tokens of a sample."""
        return IMAGE_TOKENS + self.text

    @property
    def flops(self) -> float:
        """Return the FLOPs of the model in a step: forward once, backward twice that, causal pairs of tokens only.

        Recomputing, the optimiser and the (frozen) vision tower count nothing.
        """
        shape, length = self.shape, self.length
        matrices = shape.layers * shape.layer_parameters + shape.hidden * shape.vocab
        attention = 4.0 * shape.hidden * shape.layers * length * (length + 1) / 2
        predictors = IMAGE_TOKENS * shape.image_predictor_parameters
        predictors += self.text // 2 * shape.text_predictor_parameters
        return 3.0 * self.batch * (2.0 * (length * matrices + predictors) + attention)

    @property
    def needed_bytes(self) -> float:
        """Return the bytes of weights, gradients and optimiser states, which must fit whatever the attention."""
        copies = 2 if self.optimizer == "sgd" else 4
        return copies * self.shape.parameters * self.dtype.itemsize

    def small(self) -> StepSettings:
        """Return a step of the same kind that takes little time."""
        return replace(self, batch=1, shape=replace(self.shape, layers=3, vocab=64))

    def work(self, implementation: str) -> Callable[[], None]:
        """Return what builds the model and takes two steps: the first makes the optimiser's states."""

        def two_steps() -> None:
            step = Step(self)
            step(implementation)
            step(implementation)

        return two_steps


class Step:
    """A model in training and one batch; call it to take a step with "ours" or "plain"."""

    def __init__(self, settings: StepSettings) -> None:
        self.settings = settings
        torch.manual_seed(0)
        with torch.device(settings.device):
            tower = TOWER if settings.shape.hidden >= 4096 else SMALL_TOWER
            config = random_config(settings.shape, IMAGE_TOKENS, tower, min_text_length=1)
            self.model = DynamicLlavaForConditionalGeneration._from_config(config, dtype=settings.dtype)
            self.batch = _batch(settings, tower["image_size"])
        self.model.train()
        llm = self.model.model.language_model
        _bias(llm.image_predictor, settings.vision_keep_rate)
        _bias(llm.text_predictor, settings.text_keep_rate)
        if settings.checkpointing:
            getattr(llm, "activation_checkpointing_enable", llm.gradient_checkpointing_enable)()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("vision_tower" not in name and "multi_modal_projector" not in name)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # A step's work without its effect: every repeat sees the same model.
        if settings.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=0.0)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def __call__(self, implementation: str) -> float:
        """Take one step and return its loss."""
        torch.manual_seed(0)
        with model_attention(implementation):
            loss = self.model(**self.batch).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def peak_flops(device: torch.device, dtype: torch.dtype, given: float | None) -> tuple[float, str]:
    """Return (FLOP/s, where from): the user's figure in TFLOP/s, the data sheet's, or a large matrix product timed here."""
    if given:
        return given * 1e12, "--peak-tflops"
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        known = sorted((part for part in PEAK_FLOPS if part in name), key=len)
        if known:
            return PEAK_FLOPS[known[-1]], f"data sheet of {known[-1]}"
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda: left @ right, device) for _ in range(5))
    return 2.0 * size**3 / best, f"a {size} x {size} matrix product, timed here"


def epoch_hours(samples_per_s: float, devices: int) -> float:
    """Return the hours of an epoch of the mixture on so many devices, were nothing lost between them."""
    return EPOCH_SAMPLES / (samples_per_s * devices) / 3600


def _bias(predictor: Any, rate: float) -> None:
    """Make an untrained predictor keep a share of tokens: Gumbel noise makes the share of a logit x sigmoid(x)."""
    head = predictor.head[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[KEEP] = math.log(rate / (1 - rate))


def _batch(settings: StepSettings, image_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = settings.batch, settings.length
    ids = torch.randint(2, settings.shape.vocab, shape, generator=generator, device="cpu")
    start = min(PROMPT_TOKENS, settings.text // 4)
    ids[:, start : start + IMAGE_TOKENS] = IMAGE_ID
    labels = ids.clone()
    labels[:, : settings.length - settings.text // 2] = -100
    pixels = torch.randn(settings.batch, 3, image_size, image_size, generator=generator, device="cpu")
    device = settings.device
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "labels": labels.to(device),
        "pixel_values": pixels.to(device, settings.dtype),
    }
