"""A model of a shape with random weights, and prompts and answers to time it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from dynllava_plugin.bench.modes import context_in, policy_text
from dynllava_plugin.errors import UserError
from dynllava_plugin.flops import Context, DecoderShape, cache_bytes
from dynllava_plugin.model.families.llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynllava_plugin.model.token_layout import with_checksum
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.selection import KEEP
from dynllava_plugin.sparsity.tracks import GROWTH_STEP

if TYPE_CHECKING:
    from dynllava_plugin.bench.pictures import Loaded

PREDICTOR_HEAD = 64  # width of the image predictor's heads at any width of its own: the paper's, 512 / 8
IMAGE_ID = 1
# The prompts' images are encoded already: the vision tower is as small as one can be.
NO_TOWER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
            "intermediate_size": 8, "projection_dim": 8}  # fmt: skip
FILL_CHUNK = 128  # tokens fed at once between two measured lengths


@dataclass
class Subject:
    """A model on its device, of a shape with random weights or a checkpoint's, and what it is asked.

    Parameters
    ----------
    shape : DecoderShape
    device, dtype
        Where and in what the weights are drawn: nothing passes through the CPU.
    images, text : int
        Image and text tokens of a prompt.
    vision_keep_rate, text_keep_rate : float
        Shares that stay.
    loaded : Loaded, optional
        A checkpoint instead of random weights, asked about pictures.
    """

    shape: DecoderShape
    device: torch.device
    dtype: torch.dtype
    images: int
    text: int
    vision_keep_rate: float
    text_keep_rate: float
    loaded: Loaded | None = None
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        if self.loaded is not None:
            self.model = self.loaded.model
            self.model.set_sparsity(vision_keep_rate=self.vision_keep_rate)
        else:
            rate, heads = self.vision_keep_rate, max(1, self.shape.predictor_dim // PREDICTOR_HEAD)
            config = random_config(
                self.shape, self.images, NO_TOWER, vision_keep_rate=rate, predictor_heads=heads
            )
            with torch.device(self.device):
                self.model = DynamicLlavaForConditionalGeneration._from_config(
                    config, dtype=self.dtype
                ).eval()
        self.model.requires_grad_(False)
        self.itemsize = self.dtype.itemsize  # bytes of one number
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())

    def context(self, mode: str) -> Context:
        """Return the mode's context for this subject's prompts."""
        rates = self.vision_keep_rate, self.text_keep_rate
        return context_in(mode, self.shape.layers, self.images, self.text, *rates)

    def switch(self, mode: str) -> None:
        """Bring the model into a mode."""
        self.model.set_sparsity(policy=policy_text(mode))

    def prompts(self, batch: int, new_tokens: int, mixed: bool = False) -> Prompts:
        """Return `batch` prompts with answers of `new_tokens` random tokens; `mixed`: texts of half to 1.5 times the length."""
        if self.loaded is not None:
            return self.loaded.prompts(self, batch, new_tokens, mixed)
        generator = torch.Generator(device=self.device).manual_seed(batch)
        spread = [0.5 + row / max(batch - 1, 1) if mixed else 1.0 for row in range(batch)]
        lengths = [self.images + max(round(self.text * times), 2) for times in spread]
        size = batch, max(lengths)
        ids = torch.randint(3, self.shape.vocab, size, generator=generator, device=self.device)
        mask = torch.ones_like(ids)
        for row, length in enumerate(lengths):
            padding = size[1] - length
            before = padding + (length - self.images) // 2
            ids[row, :padding], mask[row, :padding] = 0, 0
            ids[row, before : before + self.images] = IMAGE_ID
        wide = batch, self.images, self.shape.hidden
        features = (torch.randn(wide, generator=generator, device=self.device) * 0.02).to(self.dtype)

        def encode() -> dict[str, Any]:
            seeded = self.model.model.language_model.policy.image_seed is not None
            shown = with_checksum(list(features), list(features)) if seeded else list(features)
            return {"image": SimpleNamespace(pooler_output=shown)}

        return Prompts(self, ids, mask, encode, new_tokens, features=features)


class Prompts:
    """A batch of prompts, ids and mask int64 [B, L] padded on the left, and random answers int64 [B, T].

    Parameters
    ----------
    subject : Subject
    ids, mask : Tensor
    encode : callable
        Returns the images' features (`mm_encoder_outputs`) as the model encodes them under the policy that is in force.
    new_tokens : int
        T, at least one.
    more : dict, optional
        What else the model takes of the images: sizes and grids.
    features : Tensor [B, N, D], optional
        Of random images; without them the predictors are a checkpoint's, and stay as they are.
    """

    def __init__(
        self,
        subject: Subject,
        ids: torch.Tensor,
        mask: torch.Tensor,
        encode: Callable[[], dict[str, Any]],
        new_tokens: int,
        more: dict[str, Any] | None = None,
        features: torch.Tensor | None = None,
    ) -> None:
        self.subject, self.ids, self.mask, self.features = subject, ids, mask, features
        self.encode, self.more = encode, more or {}
        (self.batch, self.width), self.lengths = ids.shape, mask.sum(1).tolist()
        self.mixed = min(self.lengths) < self.width
        generator = torch.Generator(device=ids.device).manual_seed(1000 + self.batch)
        size = self.batch, max(new_tokens, 1)
        self.answers = torch.randint(3, subject.shape.vocab, size, generator=generator, device=ids.device)

    def inputs(self, answered: int = 0) -> dict[str, Any]:
        """Return arguments of the model's `forward` and `score` for the prompts and `answered` tokens behind each."""
        ids = torch.cat([self.ids, self.answers[:, :answered]], 1)
        mask = self.mask_with(answered)
        return {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": self.encode(), **self.more}

    def mask_with(self, answered: int) -> torch.Tensor | None:
        """Return the int64 [B, L] attention mask of the prompts and `answered` tokens behind each; None without padding."""
        return torch.cat([self.mask, self.mask.new_ones(self.batch, answered)], 1) if self.mixed else None

    def prefill(self, cache: SparseContextCache) -> Any:
        """Return the model's output on the prompts, logits of the last token only."""
        return self.subject.model(**self.inputs(), cache=cache, use_cache=True, logits_to_keep=1)

    def feed(self, cache: SparseContextCache, first: int, last: int) -> None:
        """Feed answer tokens first..last-1 behind `cache`, many at once: the same decisions as one by one."""
        for start in range(first, last, FILL_CHUNK):
            ids = self.answers[:, start : min(start + FILL_CHUNK, last)]
            mask = self.mask_with(start + ids.shape[1])
            self.subject.model(
                ids, attention_mask=mask, cache=cache, prompt_length=self.width, logits_to_keep=1
            )

    def step(self, cache: SparseContextCache, column: int) -> Any:
        """Take one decode step, of answer token number `column`, and return the model's output."""
        token = self.answers[:, column : column + 1]
        return self.subject.model(token, cache=cache, logits_to_keep=1)

    @torch.no_grad()
    def calibrate(self) -> float:
        """Set the output predictor's bias so that the asked share of these answers is kept (bf16 rounds it); return the share.

        Layers before l see every token, so what enters the predictor doesn't depend on what it decides.
        """
        if self.features is None:
            return self.subject.text_keep_rate
        llm = self.subject.model.model.language_model
        predictor = llm.text_predictor
        predictor.head[-1].bias.zero_()
        tokens = torch.cat([self.ids, self.answers], 1)
        scores = []
        for row in range(self.batch):  # one at a time: padding and memory
            here = tokens[row : row + 1]
            hidden = llm.embed_tokens(here).masked_scatter((here == IMAGE_ID)[..., None], self.features[row])
            hidden = hidden[:, self.width - self.lengths[row] :]
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            rotary = llm.rotary_emb(hidden, position_ids=positions)
            for layer in llm.layers[: self.subject.model.config.text_config.sparsity.sparse_layer]:
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
            logits = predictor(hidden[:, self.lengths[row] :]).float()
            scores.append(logits[..., KEEP] - logits[..., 1 - KEEP])
        flat = torch.cat(scores).flatten().sort(descending=True).values
        kept = round(self.subject.text_keep_rate * flat.numel())
        if kept < 1:
            raise UserError(
                f"--text-keep-rate: {self.subject.text_keep_rate} keeps none of {flat.numel()} tokens; take more"
            )
        edge = flat[-1] - 1.0 if kept == flat.numel() else (flat[kept - 1] + flat[kept]) / 2
        predictor.head[-1].bias[1 - KEEP] += edge.to(predictor.head[-1].bias.dtype)
        return kept / flat.numel()


def working_bytes(
    shape: DecoderShape, contexts: list[Context], batch: int, fed: int, itemsize: int, whole: bool = False
) -> float:
    """Return the bytes beside the weights at the most: caches of `contexts` side by side, and a pass's activations.

    `fed` output tokens stand behind each prompt; `whole`: one pass takes them with it.
    """
    caches = sum(cache_bytes(shape, context, fed, itemsize, batch) for context in contexts)
    growth = len(contexts) * batch * shape.layers * GROWTH_STEP * shape.kv_bytes(itemsize)
    tokens = batch * (contexts[0].prompt + (fed if whole else 0))
    widest = 4 * shape.hidden + 3 * shape.intermediate
    return caches + growth + tokens * widest * itemsize + batch * shape.vocab * (itemsize + 4)


def random_config(
    shape: DecoderShape, images: int, vision: dict[str, Any], **sparsity: Any
) -> DynamicLlavaConfig:
    """Return the configuration of a model of a shape whose images are `images` tokens, with a CLIP tower of `vision`'s sizes."""
    text: dict[str, Any] = dict(
        model_type="dynamic_llama", vocab_size=shape.vocab, hidden_size=shape.hidden,
        intermediate_size=shape.intermediate, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=1 << 16, pad_token_id=0,
        sparsity=dict(
            predictor_dim=shape.predictor_dim, predictor_ffn_dim=shape.predictor_ffn_dim,
            predictor_layers=shape.predictor_layers, **sparsity,
        ),
    )  # fmt: skip
    return DynamicLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=images,
    )
