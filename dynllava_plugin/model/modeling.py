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
from dynllava_plugin.model.decoder import PREDICTORS, SparseDecoder
from dynllava_plugin.model.gate import Tokens
from dynllava_plugin.model.generation import SparseGeneration
from dynllava_plugin.model.outputs import DynamicLlavaOutput
from dynllava_plugin.model.scoring import SparseScoring
from dynllava_plugin.model.settings import SparseSettings
from dynllava_plugin.model.static_decoding import StaticCache
from dynllava_plugin.model.static_prefill import StaticPrefill
from dynllava_plugin.model.token_layout import (
    VISUALS,
    in_order_of_places,
    last_question,
    output_columns,
    place_images,
    place_level,
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
    # `get_video_features` likewise; empty where a family has no videos.
    video_inputs: ClassVar[tuple[str, ...]]
    video_needs: ClassVar[tuple[str, ...]]
    fresh_predictors = False  # whether the checkpoint it was loaded from has none
    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for kind in VISUALS if hasattr(cls, "model_class") else ():
            encode = getattr(cls.model_class, f"get_{kind}_features", None)
            taken = (
                () if encode is None else [*inspect.signature(encode).parameters.values()][1:]
            )  # less self
            taken = [one for one in taken if one.kind is not inspect.Parameter.VAR_KEYWORD]
            setattr(cls, f"{kind}_inputs", tuple(one.name for one in taken))
            if not hasattr(cls, f"{kind}_needs"):
                needs = tuple(one.name for one in taken if one.default is inspect.Parameter.empty)
                setattr(cls, f"{kind}_needs", needs)

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]  # the stock shell's parts, with our LLM
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()  # type: ignore[operator]
        self.static_prefill = StaticPrefill()
        self.placeholders: slice = config.placeholders

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Return what the stock class's does; `fresh_predictors` then tells whether the checkpoint had none."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        predictors = {name for name, _ in model.named_parameters() if PREDICTORS.match(name)}
        model.fresh_predictors = predictors <= info["missing_keys"]
        return (model, info) if output_loading_info else model

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
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        image_sizes_videos: torch.Tensor | None = None,
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

        A video is an image of many tokens: `config.video_token_id`, `pixel_values_videos`, `video_grid_thw` and
        `second_per_grid_ts` are as the processor gives them, or ``{"video": ...}`` is what `get_video_features` returned; what is
        said of image tokens here and by policies holds for a video's, over all its frames.

        `labels` int64 [B, L] are ignored where they are -100. The last answer (the last run of labels) is the output text, whose
        tokens may be dropped; so is what stands from column `prompt_length` on, which `generate` sets, what is True in
        `output_mask` bool [B, prompt] (at inference: earlier answers of a conversation, no context for later rounds where
        they are dropped; in place of the labels' last run), and a single token behind a cache.

        `gumbel_noise` is training noise of images [B, N_img, 2] (of several gates [B, N_img, 2 * gates]), text [B, longest answer, 2]
        and, where prompt text may be dropped, the last question [B, longest, 2], right padded, drawn where None. `keep_rates`
        float [B] is the share of each sample's image tokens that is to stay behind the first gate, drawn from `vision_keep_range`
        where that is set. `num_items_in_batch` is the divisor of lm_loss, the labels of the whole accumulated batch.

        Raises `UserError` for image places and images that don't match; a cache of another kind; an attention mask of
        another length; a video in a family without; hidden states or attentions asked for; labels on image tokens or padding.
        """
        images = {
            "pixel_values": pixel_values, "image_sizes": image_sizes, "image_grid_thw": image_grid_thw,
            "batch_num_images": batch_num_images, "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy, "video_grid_thw": video_grid_thw,
            "pixel_values_videos": pixel_values_videos, "second_per_grid_ts": second_per_grid_ts,
            **{name: kwargs[name] for name in self.image_inputs if name in kwargs},
        }  # fmt: skip
        self._refuse(images, kwargs)
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

    def visual_places(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return bool, of the shape of `input_ids`: where an image's or a video's tokens are."""
        places = input_ids == self.config.image_token_id
        return places | (input_ids == self.config.video_token_id) if self.video_inputs else places

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

    def _refuse(self, images: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Raise `UserError` for what the stock classes obey, as an argument or in a config, and this one doesn't."""
        if images["pixel_values_videos"] is not None and not self.video_inputs:
            raise UserError("pixel_values_videos: this family has no videos, images it has")
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if kwargs.get(name, getattr(self.config, name, False)):
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
        found, places = self.encoded(images, encoded), input_ids
        if places is None and found:
            places = self._placeholders_among(inputs_embeds)
        features, marks, image_mask = None, None, None
        levels: list[list[torch.Tensor]] = []
        if found:
            features, levels = in_order_of_places(found, lambda: self._of_videos(places))
            features, marks = split_features(features, inputs_embeds.shape[-1], policy)
        if places is not None:
            image_mask = self.visual_places(places)
        elif IMAGE in policy.decides and not self.training:
            raise UserError(
                f"inputs_embeds: {policy.name} would not find image tokens among them; pass input_ids and pixel_values, "
                "or keep everything by mode='full'"
            )
        if image_mask is not None and output[0] is not None and not self.training:
            image_mask = image_mask & ~output[0]  # a model may name the placeholder in its answer
        layout = read_layout(valid, image_mask, features, output, policy, self.training, marks)
        if policy.prompt is not None:
            image, words = self.config.image_token_id, self.config.sparsity.question_marks
            layout = replace(layout, question=last_question(input_ids, valid, seen, output, image, words))
        deepstack: tuple[torch.Tensor, ...] = ()
        if features is not None:
            inputs_embeds = place_images(inputs_embeds, features, layout)
            deepstack = tuple(place_level(inputs_embeds, level, layout) for level in levels)
        if position_ids is None and layout.image_lengths:
            position_ids = self.positions(input_ids, attention_mask, cache, images)
        return Tokens.of(
            inputs_embeds, attention_mask, position_ids, valid, cache, layout, deepstack
        ), features

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Return what the family's method does, each image's features with the channels that the policy needs behind them."""
        return self._marked(self.model.get_image_features(pixel_values, **kwargs), pixel_values, kwargs)

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs: Any) -> Any:
        """Return what the family's method does, each video's features with the channels that the policy needs behind them."""
        found = self.model.get_video_features(pixel_values_videos, **kwargs)
        return self._marked(found, pixel_values_videos, kwargs)

    def _marked(self, found: Any, pixels: torch.Tensor, visuals: dict[str, Any]) -> Any:
        if self._llm.policy.image_seed is not None:
            found.pooler_output = with_checksum(found.pooler_output, self.pixels_of_each(pixels, visuals))
        return found

    def pixels_of_each(self, pixels: torch.Tensor, visuals: dict[str, Any]) -> Sequence[torch.Tensor]:
        """Return each image's or each video's part of `pixels`; `visuals` are the other arguments that came with them."""
        return pixels  # type: ignore[return-value]

    def encoded(self, visuals: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any]:
        """Return what the vision tower made of images and of videos, by kind, as far as it isn't `given`; empty without any."""
        found = {kind: output for kind, output in (given or {}).items() if output is not None}
        for kind, pixels in VISUALS.items():
            if kind not in found and visuals.get(pixels) is not None:
                found[kind] = self.encode(kind, visuals)
        return found

    def encode(self, kind: str, visuals: dict[str, Any]) -> Any:
        """Return what the family's features method for a kind of `VISUALS` makes of forward's arguments for it.

        Raises `UserError` for an argument that is missing, or pixels that don't fit the others.
        """
        names = getattr(self, f"{kind}_inputs")
        given = {name: visuals[name] for name in names if visuals.get(name) is not None}
        for name in getattr(self, f"{kind}_needs"):
            if name not in given:
                raise UserError(f"{name}: missing; pass everything that the checkpoint's processor returns")
        try:
            return getattr(self, f"get_{kind}_features")(**given, return_dict=True)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:
            others = [name for name in given if name != VISUALS[kind]]
            if not others:  # nothing that pixels could disagree with
                raise
            raise UserError(
                f"{VISUALS[kind]}: do not fit {' or '.join(others)} ({one_line(error)}); pass them as the checkpoint's processor "
                "returns them"
            ) from error

    def _of_videos(self, input_ids: torch.Tensor) -> list[bool]:
        """Return for each image or video token of a call, in order, whether it is a video's."""
        return [
            token == self.config.video_token_id for token in input_ids[self.visual_places(input_ids)].tolist()
        ]

    def _placeholders_among(self, embeds: torch.Tensor) -> torch.Tensor:
        """Return int64 [B, L]: the id of the placeholder at embeddings that are one's, as the stock classes find them; else -1."""
        found = torch.full(embeds.shape[:2], -1, device=embeds.device)
        tokens = [self.config.image_token_id, *([self.config.video_token_id] if self.video_inputs else ())]
        for token in tokens:
            placeholder = self.get_input_embeddings()(torch.tensor(token, device=embeds.device))  # type: ignore[operator]
            found[(embeds == placeholder).all(-1)] = token
        return found
