"""A tiny LLaVA for larger images and more words starts from the bundled one: what both have is copied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast


@torch.no_grad()
def start_tower(tower: CLIPVisionModel, trained: CLIPVisionModel) -> None:
    """Copy `trained` into `tower`, whose image may be larger: its position embeddings are interpolated."""
    state = {name: value for name, value in trained.state_dict().items() if "position_ids" not in name}
    name = next(name for name in state if name.endswith("position_embedding.weight"))
    places = state[name]
    old, new = (model.config.image_size // model.config.patch_size for model in (trained, tower))
    grid = places[1:].view(old, old, -1).permute(2, 0, 1)[None]  # [1, width, old, old]
    grid = F.interpolate(grid, size=(new, new), mode="bicubic")[0].flatten(1).T
    state[name] = torch.cat([places[:1], grid])
    tower.load_state_dict(state)


@torch.no_grad()
def start_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    trained: LlavaForConditionalGeneration,
    trained_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Copy projector, decoder layers and the rows of pieces that both tokenizers have; a plural starts as its singular."""
    model.model.multi_modal_projector.load_state_dict(trained.model.multi_modal_projector.state_dict())
    layers = trained.model.language_model.layers.state_dict()
    model.model.language_model.layers.load_state_dict(layers)
    model.model.language_model.norm.load_state_dict(trained.model.language_model.norm.state_dict())
    known = trained_tokenizer.get_vocab()
    for target, source in zip(_word_tables(model), _word_tables(trained), strict=True):
        for piece, row in tokenizer.get_vocab().items():
            like = piece if piece in known else piece.removesuffix("s")
            if like in known:
                target[row] = source[known[like]]


def _word_tables(model: LlavaForConditionalGeneration) -> tuple[Tensor, Tensor]:
    return model.get_input_embeddings().weight, model.lm_head.weight
