"""What every family's model is here: a stock shell whose LLM has gates, in training, prefill, decoding and scoring."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.model.decoder import SparseDecoder
from dynllava_plugin.model.gate import Tokens
from dynllava_plugin.model.generation import SparseGeneration
from dynllava_plugin.model.outputs import DynamicLlavaOutput
from dynllava_plugin.model.scoring import SparseScoring
from dynllava_plugin.model.settings import SparseSettings
from dynllava_plugin.model.static_decoding import StaticCache
from dynllava_plugin.model.static_prefill import StaticPrefill
from dynllava_plugin.model.token_layout import (
    output_columns,
    place_images,
    question_mask,
    read_layout,
    split_features,
    valid_columns,
    with_checksum,
)
from dynllava_plugin.model.training import SparseTraining, labels_at
from dynllava_plugin.policies import Policy, TokenLayout
from dynllava_plugin.policies.base import IMAGE
from dynllava_plugin.sparsity.cache import CACHE_NAME, SparseContextCache
from dynllava_plugin.sparsity.objective import lm_loss
from dynllava_plugin.sparsity.selection import last_answer

FEW_TOKENS = 64


class SparseVLM(SparseSettings, SparseTraining, SparseGeneration, SparseScoring):
    """To stand before a family's stock class in a class's bases (arXiv 2412.00876).

    `model.train()` runs the masked-softmax training of section 3.3.3; `model.eval()` the three inference modes of section
    3.3.2, of which decoding with a KV cache, without one (`use_cache=False`) and `score` give the same distribution.
    """

    model_class: ClassVar[Any]  # the family's model around vision tower, projector and LLM
    # What `get_image_features` takes of forward's arguments, and can't do without; what says how large images are comes second.
    image_inputs: ClassVar[tuple[str, ...]]
    image_needs: ClassVar[tuple[str, ...]]
    fresh_predictors = False  # whether `load_model` found none in the checkpoint
    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "model_class"):
            _, *taken = inspect.signature(cls.model_class.get_image_features).parameters.values()  # less self
            taken = [one for one in taken if one.kind is not inspect.Parameter.VAR_KEYWORD]
            cls.image_inputs = tuple(one.name for one in taken)
            if not hasattr(cls, "image_needs"):
                cls.image_needs = tuple(one.name for one in taken if one.default is inspect.Parameter.empty)

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]  # the stock shell's parts, with our LLM
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()  # type: ignore[operator]
        self.static_prefill = StaticPrefill()
        self.placeholders: slice = config.placeholders

    @can_return_tuple
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
        gumbel_noise: tuple[torch.Tensor | None, ...] | None = None,
        keep_rates: torch.Tensor | None = None,
        prompt_length: int | None = None,
        output_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        image_sizes: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        cache: SparseContextCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return one call's logits, losses and decisions: training in `train()` mode, prefill or decoding in `eval()` mode.

        In `input_ids` int64 [B, L] each image is `config.image_token_id`, repeated once per image token; `attention_mask` int
        [B, L], or [B, cached + L] behind a cache, is 0 on padding, at either end. `pixel_values`, `image_sizes`, `image_grid_thw` and
        `batch_num_images` are the batch's images in the order of their places, as the family's processor gives them, or
        `mm_encoder_outputs` ``{"image": ...}`` is what `get_image_features` returned. In training a batch without images may come
        with one that no place refers to: it changes nothing, and gives every parameter a gradient (of 0). Image tokens are
        known by their id, not by `mm_token_type_ids`.

        `labels` int64 [B, L] are ignored where they are -100. The last answer (the last run of labels) is the output text, whose
        tokens may be dropped; so is what stands from column `prompt_length` on, which `generate` sets, what is True in
        `output_mask` bool [B, prompt] (at inference: earlier answers of a conversation, no context for later rounds where
        they are dropped; in place of the labels' last run), and a single token behind a cache.

        `gumbel_noise` is training noise of images [B, N_img, 2] (of several gates [B, N_img, 2 * gates]), text [B, longest answer, 2]
        and, where prompt text may be dropped, the last question [B, longest, 2], right padded, drawn where None. `keep_rates`
        float [B] is the share of each sample's image tokens that is to stay behind the first gate, drawn from `vision_keep_range`
        where that is set. `num_items_in_batch` is the divisor of lm_loss, the labels of the whole accumulated batch.

        Raises `UserError` for image places and images that don't match; a cache of another kind; an attention mask of
        another length; a video; hidden states or attentions asked for; labels on image tokens or padding.
        """
        self._refuse(kwargs)
        images = {
            "pixel_values": pixel_values, "image_sizes": image_sizes, "image_grid_thw": image_grid_thw,
            "batch_num_images": batch_num_images, "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            **{name: kwargs[name] for name in self.image_inputs if name in kwargs},
        }  # fmt: skip
        llm = self._llm
        policy = llm.policy
        cache = past_key_values if cache is None else cache
        if cache is not None:
            llm.check_cache(cache, policy)
            if isinstance(cache, StaticCache) and cache.is_step(input_ids, prompt_length):
                return self._static_step(input_ids, attention_mask, position_ids, cache, policy)
        if self.training:
            self._check_trainable(policy)
        elif labels is not None and policy.sequential:
            raise UserError(
                f"labels: {policy.name} decides step by step, a loss in one pass would be another's; use score"
            )
        self.check_family(policy)
        output = None
        if labels is not None:
            given = None if self.training else output_mask
            output = (last_answer(labels) if given is None else given.bool()), 0
        tokens, features = self._embed(
            policy, images, input_ids, attention_mask, inputs_embeds, position_ids, cache, mm_encoder_outputs, output,
            prompt_length, output_mask,
        )  # fmt: skip
        if self.training:
            return self._forward_training(tokens, labels, gumbel_noise, keep_rates, num_items_in_batch)

        only_last = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
        captured = None
        if only_last and isinstance(cache, StaticCache) and not cache.seen and not torch.is_grad_enabled():
            captured = self.static_prefill.run(llm, policy, tokens, cache)
        outputs = captured or llm(cache=cache, use_cache=use_cache, tokens=tokens, last_only=only_last)
        hidden, decided = outputs.last_hidden_state, outputs.decision
        assert hidden is not None and decided is not None
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep and labels is None:
            hidden = hidden[:, -logits_to_keep:]
        logits = self._logits(hidden)
        if prompt_length is not None and tokens.counts is not None:  # a prompt that `generate` begins with
            self.refuse_not_finite(logits)
        loss = None
        if labels is not None:
            loss = lm_loss(logits, labels_at(labels, outputs.token_index), num_items_in_batch)
        return DynamicLlavaOutput(
            loss=loss, lm_loss=loss, logits=logits, **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            image_hidden_states=features, token_index=outputs.token_index, image_keep=decided.image_keep,
            text_keep=decided.text_keep, image_score=decided.image_score, text_score=decided.text_score,
        )  # fmt: skip

    @classmethod
    def check_family(cls, policy: Policy) -> None:
        """Raise `UserError` for a policy that needs what this family hasn't got."""
        missing = policy.needs - cls.gives
        if missing:
            family = cls.__name__.removeprefix("Dynamic").removesuffix("ForConditionalGeneration")
            raise UserError(
                f"policy: {policy.name} needs {' and '.join(sorted(missing))}, which {family} doesn't give; "
                "choose another policy"
            )

    def positions(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: SparseContextCache | None,
        images: dict[str, Any],
    ) -> torch.Tensor | None:
        """Return the position ids of a call with images that turn on several axes; None where real tokens are counted."""
        return None

    def deepstack(self, encoded: Any, embeds: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, ...]:
        """Return what is added behind the first layers, [B, L, d] each; nothing where a family has no such thing."""
        return ()

    @property
    def _llm(self) -> SparseDecoder:
        return self.model.language_model

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._project(hidden)
        if self.placeholders.start < self.placeholders.stop:
            logits[..., self.placeholders] = torch.finfo(logits.dtype).min
        return logits

    def refuse_not_finite(self, values: torch.Tensor) -> None:
        """Raise `UserError` for logits, or what was made of them, that no weights in order can give; waits for the device."""
        if not bool(values.isfinite().all()):
            raise UserError(
                f"{self.config.name_or_path or 'the model'}: its logits are not finite; weights that are NaN or infinite, "
                "or out of the data type's range, answer nothing"
            )

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        """Raise `UserError` for what the stock classes obey, as an argument or in a config, and this one doesn't."""
        for name in ("pixel_values_videos", "video_grid_thw", "image_sizes_videos"):
            if kwargs.get(name) is not None:
                raise UserError(f"{name}: videos are not supported, images are")
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name, getattr(self.config, name)):
                raise UserError(
                    f"{name}: layers hold different tokens here, so there is no such tensor; leave it out"
                )

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """`lm_head`; for a few tokens on a CPU as matrix times tokens, which reads the large matrix at nearly twice the speed."""
        head, tokens = self.lm_head, hidden.numel() // hidden.shape[-1]
        # Nothing around it: no adapter, no hook, no offloading.
        plain = type(head) is nn.Linear and not torch.is_grad_enabled() and not head._forward_hooks
        plain = plain and not head._forward_pre_hooks and not hasattr(head, "_hf_hook")
        if hidden.device.type != "cpu" or not plain or not 2 < tokens <= FEW_TOKENS:
            return head(hidden)
        columns = hidden.reshape(tokens, -1).t().contiguous()
        return torch.mm(head.weight, columns).t().contiguous().view(*hidden.shape[:-1], -1)

    def _embed(
        self,
        policy: Policy,
        images: dict[str, Any],
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: SparseContextCache | None = None,
        encoded: dict[str, Any] | None = None,
        output: tuple[torch.Tensor | None, int] | None = None,
        prompt_length: int | None = None,
        output_mask: torch.Tensor | None = None,
    ) -> tuple[Tokens, Sequence[torch.Tensor] | None]:
        """Return a call's tokens, with images in their places, and the images' features."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[operator]
        batch, length, _ = inputs_embeds.shape
        seen = 0 if cache is None else cache.seen
        valid = valid_columns(attention_mask, batch, length, seen, inputs_embeds.device)
        if output is None:
            output = output_columns(valid, seen, prompt_length, output_mask)
        if seen and length == 1:  # `generate` may hand the prompt's images to every step
            layout = TokenLayout(output_mask=output[0])
            return Tokens.of(inputs_embeds, attention_mask, position_ids, valid, cache, layout), None
        found = (encoded or {}).get("image")
        if found is None and images.get("pixel_values") is not None:
            found = self.encode_images(images)
        features, marks, image_mask = None, None, None
        if found is not None:
            features, marks = split_features(found.pooler_output, inputs_embeds.shape[-1], policy)
        if input_ids is not None:
            image_mask = input_ids == self.config.image_token_id
        elif found is not None:  # as the stock classes find places among embeddings
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            image_mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)  # type: ignore[operator]
        elif IMAGE in policy.decides and not self.training:
            raise UserError(
                f"inputs_embeds: {policy.name} would not find image tokens among them; pass input_ids and pixel_values, "
                "or keep everything by mode='full'"
            )
        if image_mask is not None and output[0] is not None and not self.training:
            image_mask = image_mask & ~output[0]  # a model may name the placeholder in its answer
        layout = read_layout(valid, image_mask, features, output, policy, self.training, marks)
        if policy.prompt is not None:
            layout = replace(layout, question=self._question(input_ids, valid, seen, output))
        deepstack: tuple[torch.Tensor, ...] = ()
        if features is not None:
            inputs_embeds = place_images(inputs_embeds, features, layout)
            deepstack = self.deepstack(found, inputs_embeds, layout)
        if position_ids is None and layout.image_lengths:
            position_ids = self.positions(input_ids, attention_mask, cache, images)
        return Tokens.of(
            inputs_embeds, attention_mask, position_ids, valid, cache, layout, deepstack
        ), features

    def _question(
        self,
        input_ids: torch.Tensor | None,
        valid: torch.Tensor,
        seen: int,
        output: tuple[torch.Tensor | None, int],
    ) -> torch.Tensor | None:
        """Return bool [B, L], the last question's text; None where a call has output text alone."""
        if seen and output[1] == 0:
            return None
        if seen or input_ids is None:
            why = "a prompt that goes on behind a cache" if seen else "inputs_embeds"
            raise UserError(
                f"prompt_keep_rate: the last question can't be found in {why}; pass the whole prompt's input_ids, or set "
                "prompt_keep_rate=1"
            )
        settings = self.config.sparsity
        images = input_ids == self.config.image_token_id
        return question_mask(input_ids, valid, images, output[0], settings.question_marks)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Return what the family's method does, each image's features with the channels that the policy needs behind them."""
        found = self.model.get_image_features(pixel_values, **kwargs)
        if self._llm.policy.image_seed is not None:
            found.pooler_output = with_checksum(
                found.pooler_output, self.pixels_of_images(pixel_values, kwargs)
            )
        return found

    def pixels_of_images(self, pixel_values: torch.Tensor, images: dict[str, Any]) -> Sequence[torch.Tensor]:
        """Return each image's part of `pixel_values`."""
        return pixel_values  # type: ignore[return-value]

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> Any:
        """As `generate` does before its first step, through `encode_images`."""
        images = {name: model_kwargs.pop(name) for name in self.image_inputs if name in model_kwargs}
        if images.get("pixel_values") is not None:
            if (model_kwargs.get("mm_encoder_outputs") or {}).get("image") is not None:
                raise UserError(
                    "pixel_values: mm_encoder_outputs has these images' features already; pass one of both"
                )
            model_kwargs["mm_encoder_outputs"] = {"image": self.encode_images(images)}
        return model_kwargs

    def encode_images(self, images: dict[str, Any]) -> Any:
        """Return what the family's `get_image_features` makes of forward's arguments for images.

        Raises `UserError` for an argument that is missing, or pixels that don't fit the others.
        """
        given = {name: images[name] for name in self.image_inputs if images.get(name) is not None}
        for name in self.image_needs:
            if name not in given:
                raise UserError(f"{name}: missing; pass everything that the checkpoint's processor returns")
        try:
            return self.get_image_features(**given, return_dict=True)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:
            others = [name for name in given if name != "pixel_values"]
            if not others:  # nothing that pixels could disagree with
                raise
            raise UserError(
                f"pixel_values: do not fit {' or '.join(others)} ({one_line(error)}); pass them as the checkpoint's processor "
                "returns them"
            ) from error
