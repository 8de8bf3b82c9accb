"""Stage 2: projector and language model from scratch on the frozen vision tower, full context."""

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dynllava_plugin.easy_vqa.facts import COLORS, SHAPES
from train.tiny_llava.batches import Batch
from train.tiny_llava.gaze import LAYERS, gaze_loss
from train.tiny_llava.optim import Optimizers
from train.tiny_llava.vision import VisionBatch, patch_features

EMBEDDING_SIZE = 0.5  # root mean square: what the layers write must not drown what the tokens are
PLACE_WEIGHT = 1.5  # places are the hardest to learn
GAZE_WEIGHT = 0.3


def build_model(
    tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast, layers: int, width: int
) -> LlavaForConditionalGeneration:
    """A LLaVA around the trained tower; everything else at random. Heads have 32 channels."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=-(-width * 8 // 3 // 32) * 32,
        num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=width // 32,
        max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False,
        # Slow rotations: what a word means must match in an image a hundred tokens away.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower.config, text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False).eval()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight.normal_(std=EMBEDDING_SIZE)
        model.lm_head.weight.copy_(0.02 / EMBEDDING_SIZE * embeddings)
    start_as_copying(model)
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    model.generation_config.do_sample = False
    return model


@torch.no_grad()
def start_as_copying(model: LlavaForConditionalGeneration) -> None:
    """Attention starts by matching like with like and copying what it finds (arXiv 2305.09828, in spirit)."""
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for pair in ((attention.q_proj, attention.k_proj), (attention.v_proj, attention.o_proj)):
            base = torch.nn.init.orthogonal_(torch.empty_like(pair[0].weight))
            for module, start in zip(
                pair, (base, base if pair[1] is attention.k_proj else 0.5 * base.T), strict=True
            ):
                module.weight.copy_(start).add_(0.02 * torch.randn_like(start))


def align_projector(
    model: LlavaForConditionalGeneration,
    stream: Iterator[VisionBatch],
    tokenizer: PreTrainedTokenizerFast,
    steps: int = 400,
    halves: bool = True,
) -> None:
    """LLaVA's alignment stage in small: a patch becomes the words that name what it shows.

    A red circle's patch in the upper left quarter learns to be the sum of the embeddings of "red", "circle", "top"
    and "left", background the embedding of "image". So matching a word to a place in the image and naming what is
    there are one circuit for all words, instead of one per colour and shape; the output layer starts as the
    embeddings for the same reason. Background names no place: it would attract every question about a place.

    Without `halves` a place is a point between the words: from "left" to "right" in even steps, so that two can be compared.
    """
    projector, embeddings = model.model.multi_modal_projector, model.get_input_embeddings().weight
    names = [*COLORS, *SHAPES, "top", "bottom", "left", "right", "image"]
    device = embeddings.device
    words = torch.tensor([tokenizer(" " + name, add_special_tokens=False).input_ids[0] for name in names])
    vectors = embeddings.detach()[words.to(device)]
    colors, shapes, rows, columns, background = vectors.split([len(COLORS), len(SHAPES), 2, 2, 1])
    side = int(model.config.image_seq_length**0.5)
    at = torch.arange(side, device=device)
    share = (at // (side // 2)).float() if halves else at / (side - 1)
    share = share[:, None]
    row, column = ((1 - share) * two[0] + share * two[1] for two in (rows, columns))
    where = PLACE_WEIGHT * (row[:, None] + column).flatten(0, 1)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=3e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    bar = tqdm(range(steps), desc="alignment", unit="step", mininterval=1)
    for step in bar:
        pixels, owner, color, shape = (part.to(device) for part in next(stream))
        with torch.no_grad():
            features = patch_features(model.model.vision_tower, pixels)
        item = owner.clamp(min=0)
        named = colors[color[item]] + shapes[shape[item]] + where
        target = torch.where((owner >= 0)[..., None], named, background)
        error = (projector(features) - target).square().mean() / embeddings.var().item()
        error.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(error=f"{error.item():.3f}")


def embed(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """float [B, T, width]: token embeddings with the projected image features in their places."""
    with torch.no_grad():
        features = patch_features(model.model.vision_tower, batch.pixels)
    image = model.model.multi_modal_projector(features)
    words = model.get_input_embeddings()(batch.ids)
    start = batch.image_start
    return torch.cat([words[:, :start], image, words[:, start + image.shape[1] :]], dim=1)


def answer_logits(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] and labels [n] of the answers' tokens, row after row."""
    hidden = model.model.language_model(
        inputs_embeds=embed(model, batch),
        attention_mask=batch.mask(),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    wanted = batch.labels[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][wanted]), batch.labels[:, 1:][wanted]


def train_language(
    model: LlavaForConditionalGeneration,
    stream: Iterator[Batch],
    steps: int,
    *,
    lr: float = 2e-3,
    muon_lr: float = 0.02,
    checkpoint: Callable[[LlavaForConditionalGeneration, int], None],
    checkpoint_every: int,
) -> LlavaForConditionalGeneration:
    """Train for `steps` batches; `checkpoint(model, step)` each `checkpoint_every` and at the end."""
    model.train()
    model.model.vision_tower.eval()
    llm = model.model.language_model
    entering: dict[int, Tensor] = {}
    hooks = [
        llm.layers[n].register_forward_pre_hook(lambda module, inputs, n=n: entering.update({n: inputs[0]}))
        for n in LAYERS
    ]
    optimizers = Optimizers(model, steps, lr=lr, muon_lr=muon_lr)
    bar = tqdm(range(1, steps + 1), desc="language model", unit="step", mininterval=1)
    started, smooth, right = time.time(), 0.0, 0.0
    for step in bar:
        batch = next(stream).to(model.device)
        logits, labels = answer_logits(model, batch)
        loss = F.cross_entropy(logits, labels)
        total = loss + GAZE_WEIGHT * gaze_loss(llm, entering, batch.positions, batch.image_start, batch.gaze)
        total.backward()
        optimizers.step()
        fade = min(0.98, 1 - 1 / step)
        smooth = fade * smooth + (1 - fade) * loss.item()
        right = fade * right + (1 - fade) * (logits.argmax(-1) == labels).float().mean().item()
        bar.set_postfix(loss=f"{smooth:.3f}", tokens_right=f"{right:.1%}")
        if step % checkpoint_every == 0 or step == steps:
            seconds = time.time() - started
            bar.write(f"step {step}, {seconds:.0f} s: loss {smooth:.4f}, answer tokens right {right:.2%}")
            checkpoint(model, step)
    for hook in hooks:
        hook.remove()
    return model.eval()
