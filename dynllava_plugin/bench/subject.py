"""A model of a shape with random weights, and prompts and answers to time it on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from dynllava_plugin.bench.modes import Mode
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


class Subject:
    """A model on its device, of a shape with random weights or a checkpoint's.

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

    def __init__(
        self,
        shape: DecoderShape,
        device: torch.device,
        dtype: torch.dtype,
        images: int,
        text: int,
        vision_keep_rate: float,
        text_keep_rate: float,
        loaded: Loaded | None = None,
    ) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.images, self.text, self.loaded = images, text, loaded
        self.vision_keep_rate, self.text_keep_rate = vision_keep_rate, text_keep_rate
        torch.manual_seed(0)
        if loaded is not None:
            self.model: Any = loaded.model
            self.model.set_sparsity(vision_keep_rate=vision_keep_rate)
        else:
            with torch.device(device):
                heads = max(1, shape.predictor_dim // PREDICTOR_HEAD)
                config = random_config(
                    shape, images, NO_TOWER, vision_keep_rate=vision_keep_rate, predictor_heads=heads
                )
                self.model = DynamicLlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
        self.model.requires_grad_(False)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def itemsize(self) -> int:
        """Return the bytes of one number."""
        return self.dtype.itemsize

    def context(self, mode: Mode) -> Context:
        """Return the mode's context for this subject's prompts."""
        return mode.context(
            self.shape.layers, self.images, self.text, self.vision_keep_rate, self.text_keep_rate
        )

    def switch(self, mode: Mode) -> None:
        """Bring the model into a mode."""
        self.model.set_sparsity(mode="full")  # nothing of the policy before
        self.model.set_sparsity(**mode.sparsity)

    def prompts(self, batch: int, new_tokens: int, mixed: bool = False) -> Prompts:
        """Return `batch` prompts with answers of `new_tokens` random tokens; `mixed`: texts of half to 1.5 times the length."""
        kind = Prompts if self.loaded is None else self.loaded.prompts
        return kind(self, batch, new_tokens, mixed)


class Prompts:
    """A batch: `batch` prompts of one text-image-text layout, and random answers int64 [B, T]."""

    def __init__(self, subject: Subject, batch: int, new_tokens: int, mixed: bool) -> None:
        self.subject, self.batch, self.mixed = subject, batch, mixed
        images, text, device = subject.images, subject.text, subject.device
        generator = torch.Generator(device=device).manual_seed(batch)
        spread = [0.5 + row / max(batch - 1, 1) if mixed else 1.0 for row in range(batch)]
        self.lengths = [images + max(round(text * times), 2) for times in spread]
        self.width = max(self.lengths)
        self.ids = torch.randint(
            3, subject.shape.vocab, (batch, self.width), generator=generator, device=device
        )
        self.mask = torch.ones_like(self.ids)
        token = subject.model.config.image_token_id
        for row, length in enumerate(self.lengths):
            padding = self.width - length
            before = padding + (length - images) // 2
            self.ids[row, :padding], self.mask[row, :padding] = 0, 0
            self.ids[row, before : before + images] = token
        self.answers = self.random_answers(new_tokens)
        features = torch.randn(batch, images, subject.shape.hidden, generator=generator, device=device) * 0.02
        self.features = list(features.to(subject.dtype))

    def random_answers(self, new_tokens: int) -> torch.Tensor:
        """Return int64 [B, T] tokens, the same for every batch of this size."""
        device, size = self.subject.device, (self.batch, max(new_tokens, 1))
        generator = torch.Generator(device=device).manual_seed(self.batch)
        return torch.randint(3, self.subject.shape.vocab, size, generator=generator, device=device)

    @property
    def more(self) -> dict[str, Any]:
        """Return what else the model takes of the images."""
        return {}

    @property
    def encoded(self) -> dict[str, Any]:
        """Return the images' features as the model would encode them under the policy that is in force."""
        seeded = self.subject.model.model.language_model.policy.image_seed is not None
        features = with_checksum(self.features, self.features) if seeded else self.features
        return {"image": SimpleNamespace(pooler_output=features)}

    @property
    def inputs(self) -> dict[str, Any]:
        """Return arguments of the model's `forward`; the images are encoded already."""
        return {"attention_mask": self.mask_with(0), "mm_encoder_outputs": self.encoded, **self.more}

    def prefill(self, cache: SparseContextCache | None) -> Any:
        """Return the model's output on the prompts, logits of the last token only."""
        return self.subject.model(
            self.ids, **self.inputs, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1
        )

    def mask_with(self, answered: int) -> torch.Tensor | None:
        """Return the int64 [B, L] attention mask of the prompts and `answered` tokens behind each; None without padding."""
        return torch.cat([self.mask, self.mask.new_ones(self.batch, answered)], 1) if self.mixed else None

    def feed(self, cache: SparseContextCache, first: int, last: int) -> None:
        """Feed answer tokens first..last-1 behind `cache`, many at once: the same decisions as one by one."""
        for start in range(first, last, FILL_CHUNK):
            ids = self.answers[:, start : min(start + FILL_CHUNK, last)]
            mask = self.mask_with(start + ids.shape[1])
            self.subject.model(
                ids, attention_mask=mask, past_key_values=cache, prompt_length=self.width, logits_to_keep=1
            )

    def step(self, cache: SparseContextCache, column: int) -> Any:
        """Take one decode step, of answer token number `column`, and return the model's output."""
        return self.subject.model(
            self.answers[:, column : column + 1], past_key_values=cache, logits_to_keep=1
        )

    @torch.no_grad()
    def calibrate(self) -> float:
        """Set the output predictor's bias so that the asked share of these answers is kept (bf16 rounds it); return the share.

        Layers before l see every token, so what enters the predictor doesn't depend on what it decides.
        """
        llm = self.subject.model.model.language_model
        predictor = llm.text_predictor
        predictor.head[-1].bias.zero_()
        tokens = torch.cat([self.ids, self.answers], 1)
        image_mask = tokens == self.subject.model.config.image_token_id
        scores = []
        for row in range(self.batch):  # one at a time: padding and memory
            features = self.features[row]
            hidden = llm.embed_tokens(tokens[row : row + 1])
            hidden = hidden.masked_scatter(image_mask[row : row + 1, :, None], features)
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


def estimated_bytes(
    shape: DecoderShape,
    contexts: list[Context],
    batch: int,
    new_tokens: int,
    itemsize: int,
    prefill: bool = True,
) -> tuple[float, float]:
    """Return the bytes of weights and of all else at its largest: caches of `contexts` side by side, a pass's activations."""
    weights = shape.parameters * itemsize
    caches = sum(cache_bytes(shape, context, new_tokens, itemsize, batch) for context in contexts)
    steps = len(contexts) * batch * shape.layers * GROWTH_STEP * shape.kv_bytes(itemsize)
    tokens = batch * (contexts[0].prompt if prefill else contexts[0].prompt + new_tokens)
    widest = 4 * shape.hidden + 3 * shape.intermediate
    return weights, caches + steps + tokens * widest * itemsize + batch * shape.vocab * (itemsize + 4)


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
