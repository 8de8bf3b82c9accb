"""Dynamic-LLaVA on transformers' LLaVA: the published model's training, prefill, decoding and scoring."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaForConditionalGeneration,
)

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.configuration import DynamicLlavaConfig
from dynllava_plugin.model.decoder import DynamicLlamaModel, DynamicLlamaOutput
from dynllava_plugin.model.gate import TokenLayout, TrainingMasks
from dynllava_plugin.model.outputs import ScoreDetails
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.objective import keep_loss, label_log_probs, lm_loss
from dynllava_plugin.sparsity.selection import last_answer

IGNORE_INDEX = -100


@dataclass
class DynamicLlavaOutput(LlavaCausalLMOutputWithPast):
    """Logits, losses and decisions of one call.

    Parameters
    ----------
    loss : scalar
        lm_loss + lambda * (image_keep_loss + text_keep_loss) in training; lm_loss in evaluation.
    lm_loss, image_keep_loss, text_keep_loss : scalar
        Keep losses without lambda, in training only.
    logits : [B, L', V]
        L' = L in training; at inference without the dropped image tokens, packed to the right.
    token_index : int64 [B, L']
        The input column of each logit row, -1 on padding; None in training.
    image_keep : bool [B, N_img]
        Image tokens that stay, right padded over samples; None without images or in mode "full".
    text_keep : bool [B, T]
        Output tokens that stay as context; at inference T counts from the first output column of the batch.
    """

    lm_loss: torch.Tensor | None = None
    image_keep_loss: torch.Tensor | None = None
    text_keep_loss: torch.Tensor | None = None
    token_index: torch.Tensor | None = None
    image_keep: torch.Tensor | None = None
    text_keep: torch.Tensor | None = None


class DynamicLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA-1.5 with dynamic vision-language context sparsification (arXiv 2412.00876).

    `model.train()` runs the masked-softmax training of section 3.3.3; `model.eval()` the three inference modes of section
    3.3.2, of which decoding with a KV cache, without one (`use_cache=False`) and `score` give the same distribution.
    """

    config: DynamicLlavaConfig
    config_class = DynamicLlavaConfig
    _no_split_modules = ["DynamicLlamaDecoderLayer", "CLIPEncoderLayer"]
    _supports_flex_attn = False

    def __init__(self, config: DynamicLlavaConfig) -> None:
        super().__init__(config)
        self.gumbel_tau = 1.0

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SparseContextCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        gumbel_noise: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
        prompt_length: int | None = None,
        output_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DynamicLlavaOutput:
        """One call: training in `train()` mode, prefill or decoding in `eval()` mode.

        Parameters
        ----------
        input_ids : int64 [B, L]
            Each image is `config.image_token_id`, repeated once per image token.
        attention_mask : int [B, L], or [B, cached + L] behind a cache
            0 on padding, at either end.
        pixel_values : [M, 3, H, W]
            The batch's images in the order of their places.
        labels : int64 [B, L]
            -100 is ignored. The last answer (the last run of labels) is the output text; its tokens may be dropped.
        gumbel_noise : (image [B, N_img, 2], text [B, longest answer, 2]), right padded
            Training noise; drawn where None.
        prompt_length : int
            Columns from here on are output text; set by `generate`. A single token behind a cache is output text anyway.
        output_mask : bool [B, prompt]
            Inference: tokens of the prompt that are output text as well, the earlier answers of a conversation; what the
            text predictor drops of them is no context for later rounds. With labels, in place of their last run.
        num_items_in_batch : int
            Labels of the whole accumulated batch, the divisor of lm_loss.

        Raises
        ------
        UserError
            Image places and images that don't match; a cache of another kind; an attention mask of another length.
        """
        if past_key_values is not None and past_key_values.get_seq_length() > 0 and pixel_values is None:
            mm_encoder_outputs = None  # generate() may hand the prompt's images to every step
        embeds, layout = self._embed(input_ids, inputs_embeds, pixel_values, mm_encoder_outputs)
        if self.training:
            if labels is not None:
                layout.output_mask = last_answer(labels)
            outputs = self._llm.forward_training(
                embeds, attention_mask, position_ids, layout, self.gumbel_tau, gumbel_noise or (None, None)
            )
            return self._training_output(outputs, labels, num_items_in_batch)

        if labels is not None:
            layout.output_mask = last_answer(labels) if output_mask is None else output_mask.bool()
        else:
            self._mark_output(layout, embeds, past_key_values, prompt_length, output_mask)
        only_last = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
        outputs = self._llm(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            layout=layout,
            last_only=only_last,
        )
        hidden = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep and labels is None:
            hidden = hidden[:, -logits_to_keep:]
        logits = self._logits(hidden)
        loss = None
        if labels is not None:
            loss = lm_loss(logits, _labels_at(labels, outputs.token_index), num_items_in_batch)
        return DynamicLlavaOutput(
            loss=loss,
            lm_loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            token_index=outputs.token_index,
            image_keep=outputs.decision.image_keep,
            text_keep=outputs.decision.text_keep,
        )

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`; everything behind the given prompt is output text that the text predictor may drop.

        Greedy search, sampling, beam search, several return sequences and streaming work, with and without `use_cache`.
        Assisted decoding doesn't: dropped tokens can't be brought back.
        """
        prompt = next(
            (x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
        )
        if prompt is not None:
            kwargs.setdefault("prompt_length", prompt.shape[1])
        generation_config = kwargs.get("generation_config") or self.generation_config
        use_cache = kwargs.get("use_cache", generation_config.use_cache)
        if use_cache is not False and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = self._llm.new_cache()
        return super().generate(inputs, **kwargs)

    def score(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Teacher-forced log-probabilities under the sparsified decode, in one pass (equal to step by step).

        Parameters
        ----------
        input_ids, attention_mask, pixel_values
            As in `forward`.
        labels : int64 [B, L]
            -100 is ignored. The last run of labels is the output text; earlier labels are scored as prompt text.

        Returns
        -------
        float32 [B, L], 0 where the label is -100.
        """
        return self.score_details(input_ids, attention_mask, pixel_values, labels).log_probs

    @torch.no_grad()
    def score_details(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
    ) -> ScoreDetails:
        """As `score`, with the decisions behind it.

        Parameters
        ----------
        output_mask : bool [B, L]
            Output text in place of the last run of labels, e.g. every answer of a conversation.
        mm_encoder_outputs : dict
            ``{"image": ...}`` with the images' features instead of `pixel_values`.
        """
        if labels is None or labels.shape != input_ids.shape:
            raise UserError("labels: score needs labels of the shape of input_ids")
        was_training = self.training
        self.eval()
        try:
            embeds, layout = self._embed(input_ids, None, pixel_values, mm_encoder_outputs)
            layout.output_mask = last_answer(labels) if output_mask is None else output_mask.bool()
            outputs = self._llm(
                inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False, layout=layout
            )
        finally:
            self.train(was_training)
        target = _labels_at(labels, outputs.token_index)[:, 1:]
        wanted = target != IGNORE_INDEX
        logits = self._logits(outputs.last_hidden_state[:, :-1][wanted])
        rows = wanted.nonzero()[:, 0]
        columns = outputs.token_index[:, 1:][wanted]
        scores = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        scores[rows, columns] = label_log_probs(logits, target[wanted])
        greedy = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
        greedy[rows, columns] = logits.argmax(-1) == target[wanted]
        return ScoreDetails(scores, greedy, outputs.decision.image_keep, outputs.decision.text_keep)

    def set_sparsity(self, **changes: Any) -> SparsityConfig:
        """Change the mode, a keep rate, l or the image policy of the loaded model.

        Raises
        ------
        UserError
            An unknown setting, a value out of range, or a predictor size, which the weights fix.
        """
        current = self.config.sparsity
        fixed = (
            "predictor_dim",
            "predictor_heads",
            "predictor_ffn_dim",
            "predictor_layers",
            "text_predictor",
        )
        for name in fixed:
            if name in changes and changes[name] != getattr(current, name):
                raise UserError(
                    f"{name}: the loaded predictors have {getattr(current, name)}; it can't be changed"
                )
        settings = current.replace(**changes)
        settings.validate(self.config.text_config.num_hidden_layers)
        self.config.text_config.sparsity = settings
        return settings

    def new_cache(self) -> SparseContextCache:
        """An empty KV cache, to hand to `forward` or `generate`."""
        return self._llm.new_cache()

    @property
    def _llm(self) -> DynamicLlamaModel:
        return self.model.language_model

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden)
        if self.config.placeholder_tokens:
            logits[..., -self.config.placeholder_tokens :] = torch.finfo(logits.dtype).min
        return logits

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        encoded: dict[str, Any] | None,
    ) -> tuple[torch.Tensor, TokenLayout]:
        """Token embeddings [B, L, d] with image features in their places, and where those are."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        images = (encoded or {}).get("image")
        if images is None and pixel_values is not None:
            images = self.model.get_image_features(pixel_values=pixel_values, return_dict=True)
        if images is None:
            return inputs_embeds, TokenLayout()
        if input_ids is None:
            raise UserError("inputs_embeds: images need input_ids, which say where they go")
        features = torch.stack(tuple(images.pooler_output)).to(inputs_embeds)  # [M, N, d]
        image_mask = input_ids == self.config.image_token_id
        places = int(image_mask.sum())
        if places != features.shape[0] * features.shape[1]:
            raise UserError(
                f"input_ids: {places} image tokens for {features.shape[0]} images of {features.shape[1]} tokens; "
                "give as many <image> places as images"
            )
        embeds = inputs_embeds.masked_scatter(image_mask[..., None], features)
        seeds = None
        if self.config.sparsity.image_policy == "random":
            seeds = [_image_seed(image, self.config.sparsity.random_seed) for image in features]
        return embeds, TokenLayout(
            image_mask=image_mask, tokens_per_image=features.shape[1], image_seeds=seeds
        )

    @staticmethod
    def _mark_output(
        layout: TokenLayout,
        embeds: torch.Tensor,
        cache: SparseContextCache | None,
        prompt_length: int | None,
        output_mask: torch.Tensor | None,
    ) -> None:
        seen = cache.get_seq_length() if cache is not None else 0
        length = embeds.shape[1]
        if prompt_length is None:
            prompt_length = seen if seen and length == 1 else seen + length
        start = max(prompt_length - seen, 0)
        if start < length:
            columns = torch.arange(length, device=embeds.device) >= start
            layout.output_mask = columns.expand(embeds.shape[0], -1)
            layout.output_start = start
        if output_mask is not None and not seen:
            # The prompt's own output text; behind it, where nothing is cached, what was generated so far.
            mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            mask[:, : output_mask.shape[1]] = output_mask.bool()
            layout.output_mask = mask if layout.output_mask is None else mask | layout.output_mask
            layout.output_start = 0

    def _training_output(
        self,
        outputs: DynamicLlamaOutput,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> DynamicLlavaOutput:
        logits = self._logits(outputs.last_hidden_state)
        result = DynamicLlavaOutput(logits=logits)
        if outputs.masks is not None:
            self._add_keep_losses(result, outputs.masks)
        if labels is not None:
            result.lm_loss = lm_loss(logits, labels, num_items_in_batch)
            result.loss = result.lm_loss
            for term in (result.image_keep_loss, result.text_keep_loss):
                if term is not None:
                    result.loss = result.loss + self.config.sparsity.keep_loss_weight * term
        return result

    def _add_keep_losses(self, result: DynamicLlavaOutput, masks: TrainingMasks) -> None:
        sparsity = self.config.sparsity
        if masks.image is not None:
            values, valid = masks.image
            result.image_keep = values.detach() > 0.5
            result.image_keep_loss = keep_loss(values, valid, valid.any(1), sparsity.vision_keep_rate)
        if masks.text is not None:
            values, valid = masks.text
            result.text_keep = values.detach() > 0.5
            result.text_keep_loss = keep_loss(values, valid, masks.text_counted, sparsity.text_keep_rate)


def _labels_at(labels: torch.Tensor, token_index: torch.Tensor) -> torch.Tensor:
    """[B, L] labels -> [B, L'] labels of the tokens that are still there."""
    return labels.gather(1, token_index.clamp(min=0)).masked_fill(token_index < 0, IGNORE_INDEX)


def _image_seed(features: torch.Tensor, seed: int) -> int:
    """A seed from an image's features [N, d], rounded so that an image has the same one in every batch."""
    summary = (features.detach().float().mean(0)[:4] * 512).round().to(torch.int32).cpu()
    return zlib.crc32(summary.numpy().tobytes(), seed & 0xFFFFFFFF)


AutoModelForImageTextToText.register(DynamicLlavaConfig, DynamicLlavaForConditionalGeneration)
