"""Dynamic-LLaVA on transformers' LLaVA: the published model's training, prefill, decoding and scoring."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.configuration import DynamicLlavaConfig
from dynllava_plugin.model.decoder import DynamicLlamaModel
from dynllava_plugin.model.embedding import mark_output, place_images
from dynllava_plugin.model.generation import SparseGeneration
from dynllava_plugin.model.losses import labels_at, training_output
from dynllava_plugin.model.outputs import DynamicLlavaOutput
from dynllava_plugin.model.scoring import SparseScoring
from dynllava_plugin.model.static_decoding import StaticCache
from dynllava_plugin.model.vision import DynamicLlavaModel
from dynllava_plugin.policies import TokenLayout
from dynllava_plugin.policies.registry import check_policy, policy_changes
from dynllava_plugin.sparsity.cache import SparseContextCache
from dynllava_plugin.sparsity.config import SparsityConfig
from dynllava_plugin.sparsity.objective import lm_loss
from dynllava_plugin.sparsity.selection import last_answer

FEW_TOKENS = 64


class DynamicLlavaForConditionalGeneration(SparseGeneration, SparseScoring, LlavaForConditionalGeneration):
    """LLaVA-1.5 with dynamic vision-language context sparsification (arXiv 2412.00876).

    `model.train()` runs the masked-softmax training of section 3.3.3; `model.eval()` the three inference modes of section
    3.3.2, of which decoding with a KV cache, without one (`use_cache=False`) and `score` give the same distribution.
    """

    config: DynamicLlavaConfig
    config_class = DynamicLlavaConfig
    _no_split_modules = ["DynamicLlamaDecoderLayer", "CLIPEncoderLayer"]
    _supports_flex_attn = False

    def __init__(self, config: DynamicLlavaConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = DynamicLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
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
            The batch's images in the order of their places. In training a batch without images may come with one
            that no place refers to: it changes nothing, and gives every parameter a gradient (of 0).
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
        if past_key_values is not None:
            self._llm.check_cache(past_key_values)
            if past_key_values.get_seq_length() > 0 and input_ids is not None and input_ids.shape[1] == 1:
                mm_encoder_outputs = None  # generate() may hand the prompt's images to every step
        if isinstance(past_key_values, StaticCache) and past_key_values.is_step(input_ids, prompt_length):
            return self._static_step(input_ids, attention_mask, position_ids, past_key_values)
        layout = TokenLayout()
        if labels is not None:
            given = None if self.training else output_mask
            layout.output_mask = last_answer(labels) if given is None else given.bool()
        elif not self.training:
            mark_output(layout, input_ids, inputs_embeds, past_key_values, prompt_length, output_mask)
        self._check_policy(labels)
        embeds = self._embed(
            layout, input_ids, inputs_embeds, attention_mask, pixel_values, mm_encoder_outputs
        )
        if self.training:
            outputs = self._llm.forward_training(
                embeds, attention_mask, position_ids, layout, self.gumbel_tau, gumbel_noise or (None, None)
            )
            logits = self._logits(outputs.last_hidden_state)
            return training_output(logits, outputs, self.config.sparsity, labels, num_items_in_batch)

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
            loss = lm_loss(logits, labels_at(labels, outputs.token_index), num_items_in_batch)
        return DynamicLlavaOutput(
            loss=loss,
            lm_loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            token_index=outputs.token_index,
            image_keep=outputs.decision.image_keep,
            text_keep=outputs.decision.text_keep,
            image_score=outputs.decision.image_score,
            text_score=outputs.decision.text_score,
        )

    def set_sparsity(self, **changes: Any) -> SparsityConfig:
        """Change the policy, the mode, a keep rate or l of the loaded model: `set_sparsity(policy="fastv", k=3, r=0.75)`.

        Raises
        ------
        UserError
            An unknown setting or policy, a value out of range, or a predictor size, which the weights fix.
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
        settings = current.replace(**policy_changes(changes))
        check_policy(settings, self.config.text_config.num_hidden_layers)
        self.config.text_config.sparsity = settings
        return settings

    @property
    def _llm(self) -> DynamicLlamaModel:
        return self.model.language_model

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._project(hidden)
        if self.config.placeholder_tokens:
            logits[..., -self.config.placeholder_tokens :] = torch.finfo(logits.dtype).min
        return logits

    def _check_policy(self, labels: torch.Tensor | None) -> None:
        policy = self._llm.policy
        if self.training and self.config.sparsity.image_policy != "learned":
            raise UserError("image_policy: chance can't be trained; choose image_policy='learned'")
        if self.training and self.config.sparsity.policy is not None:
            raise UserError(f"policy: {policy.name} is for inference; choose what to train by mode")
        if not self.training and labels is not None and policy.sequential:
            raise UserError(
                f"labels: {policy.name} decides step by step, a loss in one pass would be another's; use score"
            )

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """`lm_head`; for a few tokens on a CPU as matrix times tokens, which reads the large matrix at nearly twice the speed."""
        tokens = hidden.numel() // hidden.shape[-1]
        plain = type(self.lm_head) is torch.nn.Linear and not torch.is_grad_enabled()  # no adapter around it
        if hidden.device.type != "cpu" or not plain or not 2 < tokens <= FEW_TOKENS:
            return self.lm_head(hidden)
        columns = hidden.reshape(tokens, -1).t().contiguous()
        return torch.mm(self.lm_head.weight, columns).t().contiguous().view(*hidden.shape[:-1], -1)

    def _embed(
        self,
        layout: TokenLayout,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        encoded: dict[str, Any] | None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        images = (encoded or {}).get("image")
        if images is None and pixel_values is not None:
            images = self.model.get_image_features(pixel_values=pixel_values, return_dict=True)
        if images is None:
            return inputs_embeds
        return place_images(
            inputs_embeds, images.pooler_output, input_ids, self.config.image_token_id, layout, self._llm.policy,
            attention_mask, self.training,
        )  # fmt: skip


AutoModelForImageTextToText.register(DynamicLlavaConfig, DynamicLlavaForConditionalGeneration)
