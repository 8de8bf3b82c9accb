"""Training: Gumbel masks at the gate (section 3.3.3), and the loss put together (Eq. 8 to 10)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.gate import Tokens, in_order, right_padded
from dynllava_plugin.model.outputs import DynamicLlavaOutput, SparseDecoderOutput, TrainingMasks
from dynllava_plugin.policies import Gate, Policy
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.objective import keep_loss, lm_loss
from dynllava_plugin.sparsity.selection import gumbel_keep_mask, gumbel_noise, keep_rates_at

IGNORE_INDEX = -100


class SparseTraining(nn.Module):
    """Of `SparseVLM`: `forward` in `train()` mode."""

    config: Any
    model: Any
    placeholders: slice
    gumbel_tau = 1.0  # the temperature of Eq. 11, set by the trainer

    def _check_trainable(self, policy: Policy) -> None:
        if self.config.sparsity.image_policy != "learned":
            raise UserError("image_policy: chance can't be trained; choose image_policy='learned'")
        if self.config.sparsity.policy is not None:
            raise UserError(f"policy: {policy.name} is for inference; choose what to train by mode")

    def _forward_training(
        self,
        tokens: Tokens,
        labels: torch.Tensor | None,
        noise: tuple[torch.Tensor | None, ...] | None,
        keep_rates: torch.Tensor | None,
        num_items: torch.Tensor | int | None,
    ) -> DynamicLlavaOutput:
        """Return logits and losses; the other arguments are `forward`'s."""
        settings = self.config.sparsity
        if labels is not None:
            refuse_labels_of_no_text(labels, tokens.valid, self.visual_places(labels), self.placeholders)  # type: ignore[operator]
        if keep_rates is None and settings.vision_keep_range is not None:
            uniform = torch.rand(len(tokens.valid), device=tokens.valid.device)
            keep_rates = keep_rates_at(uniform, *settings.vision_keep_range)
        outputs = self.model.language_model.forward_training(
            tokens, self.gumbel_tau, noise or (None, None), keep_rates
        )
        logits = self._logits(outputs.last_hidden_state)  # type: ignore[operator]
        return training_output(logits, outputs, settings, labels, num_items)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """As the stock class's; the kind that hides inputs from autograd, and so the keep masks, is refused."""
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise UserError(
                "use_reentrant: true would go backward through the keep masks once a layer; leave it out"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)  # type: ignore[misc]


def mask_images(
    masks: TrainingMasks, gate: Gate, share: float | torch.Tensor, noise: torch.Tensor | None
) -> None:
    """Add a gate's Gumbel masks of the image tokens.

    `share` of the whole image is to stay, of all samples or float [B]; `noise` is [B, N_img, 2], drawn where None.
    """
    layout = gate.layout
    if layout.image_mask is None:
        return
    earlier = masks.keep.flatten()[layout.image_index] if masks.images else None
    flat = _gumbel(_image_logits(gate, share, earlier), layout.image_mask, noise, masks.tau)
    flat = flat if earlier is None else flat * earlier
    masks.keep = masks.keep.masked_scatter(layout.image_mask, flat)
    masks.images.append((*right_padded(flat, layout.image_counts()), share))


def mask_texts(
    masks: TrainingMasks, gate: Gate, sparsity: SparsityConfig, *noises: torch.Tensor | None
) -> None:
    """Add a gate's Gumbel masks of output text and last question; `noises` are theirs, [B, longest, 2], drawn where None."""
    output = gate.layout.output_mask if sparsity.mode == "image_text" else None
    kinds = (
        ("text", output, gate.text_predictor, sparsity.min_text_length),
        ("prompt", gate.layout.question, gate.prompt_predictor, sparsity.min_prompt_length),
    )
    for (kind, places, predictor, shortest), noise in zip(kinds, noises, strict=True):
        if places is None or predictor is None:
            continue
        lengths = places.sum(1)
        counted = (lengths >= shortest) & (lengths > 0)
        flat = _gumbel(predictor(gate.hidden[places]), places, noise, masks.tau)
        # Short texts are kept whole; the product keeps the predictor in the graph, which DDP asks for.
        flat = torch.where(counted[:, None].expand_as(places)[places], flat, flat * 0 + 1)
        masks.keep = masks.keep.masked_scatter(places, flat)
        masks.texts[kind] = (*right_padded(flat, lengths.tolist()), counted)


def _image_logits(gate: Gate, share: float | torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """[T, 2] logits of the call's image tokens, of which `keep` [T] are left (None: all); each image is seen alone."""
    hidden, layout, predictor = gate.hidden, gate.layout, gate.image_predictor
    tokens = hidden.flatten(0, 1)[layout.image_index]
    shares = torch.as_tensor(share, dtype=torch.float32, device=hidden.device).expand(len(hidden))
    if not layout.image_lengths:  # a stand-in image: through the predictor, to no place
        return predictor(tokens[:, None], shares[:0]).flatten(0, 1)
    groups, found = [images for _, images in layout.image_groups()], []
    for images in groups:
        of_group = gate.of_group(images)
        present = None if keep is None else of_group.in_question(keep.detach() > 0.5)
        rates = shares[[layout.image_rows[image] for image in images]]
        found.append(predictor(of_group.in_question(tokens), rates, present))
    return in_order(groups, found)


def _gumbel(logits: torch.Tensor, mask: torch.Tensor, noise: torch.Tensor | None, tau: float) -> torch.Tensor:
    if noise is None:
        drawn = gumbel_noise(logits.shape, logits.device)
    else:
        counts = mask.sum(1)
        drawn = noise[torch.arange(noise.shape[1], device=noise.device) < counts[:, None]]
    return gumbel_keep_mask(logits, drawn, tau)


def training_output(
    logits: torch.Tensor,
    outputs: SparseDecoderOutput,
    sparsity: SparsityConfig,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> DynamicLlavaOutput:
    """Return logits [B, L, V] with the objective: lm_loss + lambda * (image_keep_loss + text_keep_loss), Eq. 8 to 10."""
    result, masks = DynamicLlavaOutput(logits=logits), outputs.masks
    assert masks is not None
    for values, valid, share in masks.images:  # of several gates the sum, and what is left last
        result.image_keep = values.detach() > 0.5
        loss = keep_loss(values, valid, valid.any(1), share)
        result.image_keep_loss = loss if result.image_keep_loss is None else result.image_keep_loss + loss
    for kind, (values, valid, counted) in masks.texts.items():
        loss = keep_loss(values, valid, counted, getattr(sparsity, f"{kind}_keep_rate"))
        setattr(result, f"{kind}_keep", values.detach() > 0.5)
        setattr(result, f"{kind}_keep_loss", loss)
    if labels is not None:
        result.lm_loss = lm_loss(logits, labels, num_items_in_batch)
        result.loss = result.lm_loss
        for term in (result.image_keep_loss, result.text_keep_loss, result.prompt_keep_loss):
            if term is not None:
                result.loss = result.loss + sparsity.keep_loss_weight * term
    return result


def labels_at(labels: torch.Tensor, token_index: torch.Tensor) -> torch.Tensor:
    """Return, of labels [B, L], those [B, L'] of the tokens that are still there."""
    nothing_before = pad(token_index[:, :-1] < 0, (1, 0))  # what padding "predicts" is no loss
    return labels.gather(1, token_index.clamp(min=0)).masked_fill(
        (token_index < 0) | nothing_before, IGNORE_INDEX
    )


def refuse_labels_of_no_text(
    labels: torch.Tensor, valid: torch.Tensor, visual: torch.Tensor, masked: slice
) -> None:
    """Raise `UserError` for labels that are `visual` placeholders, `masked` rows or padding: their loss would be without bound."""
    wrong = visual | ((labels >= masked.start) & (labels < masked.stop))
    wrong |= (labels != IGNORE_INDEX) & ~valid
    rows = wrong.any(1).tolist()
    if any(rows):
        raise UserError(
            f"labels: sample {rows.index(True)} of the batch has labels on image tokens or padding; "
            f"set them to {IGNORE_INDEX}"
        )
