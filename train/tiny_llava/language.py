"""Stage 2: projector and language model from scratch on the frozen vision tower, full context."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from train.easy_vqa_facts import COLORS, SHAPES
from train.tiny_llava.batches import IMAGE_TOKENS, Batch, Encoder, training_batches
from train.tiny_llava.optim import Optimizers
from train.tiny_llava.vision import (
    PATCHES,
    TileSet,
    batches,
    patch_features,
)

EMBEDDING_SIZE = 0.5  # root mean square


def build_model(
    tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast, layers: int, width: int
) -> LlavaForConditionalGeneration:
    """A LLaVA around the trained tower; everything else at random. Heads have 32 channels."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=-(-width * 8 // 3 // 32) * 32,
        num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=width // 32,
        max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False,
        **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower.config, text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS, vision_feature_layer=-1, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False).eval()
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    model.generation_config.do_sample = False
    return model


@torch.no_grad()
def align_projector(
    model: LlavaForConditionalGeneration, tiles: TileSet, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    """Start the projector where LLaVA's alignment stage leads: a patch becomes the words that name what it shows.

    A red circle's patch in the upper left half turns into the sum of the embeddings of "red", "circle", "top" and
    "left", by least squares on the tower's features. So matching a word to a place in the image and naming what is
    there are one circuit for all words, instead of one per colour and shape; the output layer starts as the
    embeddings for the same reason. Everything stays trainable.
    """
    pixels, owner, color, shape = next(batches(tiles, 80, 40, torch.Generator().manual_seed(seed)))
    features = patch_features(model.model.vision_tower, pixels).flatten(0, 1)
    owner = owner.flatten()
    owner = torch.where(owner < 0, len(color), owner)  # background and slivers show nothing
    place = torch.arange(PATCHES * PATCHES).repeat(len(pixels))
    half = PATCHES // 2
    shown = [
        one_hot(torch.cat([color, torch.tensor([len(COLORS)])])[owner], len(COLORS) + 1)[:, :-1],
        one_hot(torch.cat([shape, torch.tensor([len(SHAPES)])])[owner], len(SHAPES) + 1)[:, :-1],
        one_hot(place // PATCHES // half, 2),
        one_hot(place % PATCHES // half, 2),
    ]
    names = [*COLORS, *SHAPES, "top", "bottom", "left", "right"]
    words = torch.tensor([tokenizer(" " + name, add_special_tokens=False).input_ids for name in names])[:, 0]
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    ridge = 1e-4 * len(inputs) * torch.eye(inputs.shape[1])
    readout = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ torch.cat(shown, dim=1).float())
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    # gelu(x) - gelu(-x) = x: hidden units in pairs of opposite sign pass the read-outs through unchanged.
    mix = torch.nn.init.orthogonal_(torch.empty(first.out_features // 2, len(names)))
    up = mix @ readout.T
    first.weight.copy_(torch.cat([up, -up])[:, :-1])
    first.bias.copy_(torch.cat([up, -up])[:, -1])
    embeddings = model.get_input_embeddings().weight
    embeddings.normal_(std=EMBEDDING_SIZE)  # what the layers write must not drown what the tokens are
    down = embeddings[words].T @ mix.T
    second.weight.copy_(torch.cat([down, -down], dim=1))
    second.bias.zero_()
    model.lm_head.weight.copy_(0.02 / EMBEDDING_SIZE * embeddings)


def embed(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """float [B, T, width]: token embeddings with the projected image features in their places."""
    with torch.no_grad():
        features = patch_features(model.model.vision_tower, batch.pixels)
    image = model.model.multi_modal_projector(features)
    words = model.get_input_embeddings()(batch.ids)
    start = batch.image_start
    return torch.cat([words[:, :start], image, words[:, start + IMAGE_TOKENS :]], dim=1)


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
    tiles: TileSet,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int,
    *,
    scenes: int = 12,
    singles: int = 4,
    questions: int = 12,
    lr: float = 2e-3,
    muon_lr: float = 0.02,
    checkpoint: Callable[[LlavaForConditionalGeneration, int], None],
    checkpoint_every: int,
) -> LlavaForConditionalGeneration:
    """Train for `steps` batches; `checkpoint(model, step)` each `checkpoint_every` and at the end."""
    align_projector(model, tiles, tokenizer, seed)
    model.train()
    model.model.vision_tower.eval()
    optimizers = Optimizers(model, steps, lr=lr, muon_lr=muon_lr)
    stream = training_batches(tiles, Encoder(tokenizer), scenes, singles, questions, seed)
    bar = tqdm(range(1, steps + 1), desc="language model", unit="step", mininterval=1)
    started, smooth, right = time.time(), 0.0, 0.0
    for step in bar:
        logits, labels = answer_logits(model, next(stream))
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizers.step()
        fade = min(0.98, 1 - 1 / step)
        smooth = fade * smooth + (1 - fade) * loss.item()
        right = fade * right + (1 - fade) * (logits.argmax(-1) == labels).float().mean().item()
        bar.set_postfix(loss=f"{smooth:.3f}", tokens_right=f"{right:.1%}")
        if step % checkpoint_every == 0 or step == steps:
            seconds = time.time() - started
            bar.write(f"step {step}, {seconds:.0f} s: loss {smooth:.4f}, answer tokens right {right:.2%}")
            checkpoint(model, step)
    return model.eval()
