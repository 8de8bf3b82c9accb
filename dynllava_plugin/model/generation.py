"""`generate()`: transformers' loop over a cache of ours, and the decoding step of one shape."""

from __future__ import annotations

import copy
import sys
from typing import Any, ClassVar

import torch
from torch import nn

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.outputs import DynamicLlavaOutput
from dynllava_plugin.model.static_decoding import StaticCache, captures, static_step
from dynllava_plugin.model.static_prefill import StaticPrefill
from dynllava_plugin.model.token_layout import VISUALS, token_positions
from dynllava_plugin.policies import Policy
from dynllava_plugin.policies.base import OUTPUT
from dynllava_plugin.sparsity.cache import CACHE_NAME, SparseContextCache

_SAID: set[str] = set()  # policies whose steps can't be captured, of which that was said
_ASSISTED = "guessed tokens are taken back, but what they let the cache drop can't be"
REFUSED = {
    "prefill_chunk_size": "which image tokens stay is decided over the whole prompt",
    "assistant_model": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
}


class SparseGeneration(nn.Module):
    """Of `SparseVLM`: the loop and the caches it runs on."""

    model: Any
    static_prefill: StaticPrefill
    image_inputs: ClassVar[tuple[str, ...]]
    video_inputs: ClassVar[tuple[str, ...]]

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """Return what transformers' `generate` does; all behind the given prompt is output text that the text predictor may drop.

        Greedy search, sampling, beam search, several return sequences and streaming work, with and without `use_cache`.
        `policy="fastv,k=3"` is this call's policy, whatever the model's is or becomes meanwhile.
        `cache_implementation="static"` decodes with steps of one shape, as CUDA graphs where there is CUDA, which is the
        default there, and compiled with `compile_config` (transformers' `CompileConfig`); "dynamic" doesn't.

        Raises `UserError` for assisted decoding or prefill in chunks, which drop other tokens than the method does.
        """
        policy, training = kwargs.pop("policy", None), self.training
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        self.eval()  # `forward` of a model in training is section 3.3.3's
        try:
            with self.policy_in_force(policy):
                return self._generate(inputs, **kwargs)
        finally:
            self.train(training)

    def _generate(self, inputs: torch.Tensor | None, **kwargs: Any) -> Any:
        prompt = next(
            (x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
        )
        if prompt is not None:
            kwargs.setdefault("prompt_length", prompt.shape[1])
        generation_config = kwargs.get("generation_config") or self.generation_config
        for name, reason in REFUSED.items():
            if kwargs.get(name) or getattr(generation_config, name, None):
                raise UserError(f"{name}: {reason}; leave it out")
        use_cache = kwargs.get("use_cache", generation_config.use_cache)
        llm = self.model.language_model
        guided = kwargs.get("guidance_scale", generation_config.guidance_scale) not in (None, 1)
        if guided and use_cache is False and OUTPUT in llm.policy.decides:
            raise UserError(
                "guidance_scale: its second pass can't tell output text without a cache; leave use_cache out"
            )
        implementation = kwargs.pop("cache_implementation", None)
        if implementation is None and generation_config.cache_implementation is not None:
            implementation = generation_config.cache_implementation
            generation_config = copy.deepcopy(generation_config)
            generation_config.cache_implementation = None  # the cache is made here, not by transformers
            kwargs["generation_config"] = generation_config
        given = kwargs.pop("past_key_values", None)
        given = kwargs.pop("cache", given)
        if implementation is not None and given is not None:
            raise UserError(
                "cache_implementation: past_key_values is given, whose kind is settled; leave one out"
            )
        if given is not None:  # before a family's positions look into it
            llm.check_cache(given, llm.policy)
        elif use_cache is not False:
            compiling = kwargs.pop("compile_config", None)
            given = self.new_cache(implementation, compiling.to_dict() if compiling is not None else None)
        if given is not None:
            kwargs[CACHE_NAME] = given
        return super().generate(inputs, **kwargs)  # type: ignore[misc]

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> Any:
        """As `generate` does before its first step, through `encode`."""
        given = model_kwargs.get("mm_encoder_outputs") or {}
        names = {*self.image_inputs, *self.video_inputs}
        visuals = {name: model_kwargs.pop(name) for name in names & {*model_kwargs}}
        for kind, pixels in VISUALS.items():
            if visuals.get(pixels) is not None and given.get(kind) is not None:
                raise UserError(
                    f"{pixels}: mm_encoder_outputs has these {kind}s' features already; pass one of both"
                )
        if found := self.encoded(visuals, given):
            model_kwargs["mm_encoder_outputs"] = found
        return model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return a call's arguments. The cache's name is always `past_key_values`: peft's prompt tuning looks for no other."""
        call = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]
        return {"past_key_values" if name == CACHE_NAME else name: value for name, value in call.items()}

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """None: `forward` counts real tokens by the attention mask, at whichever end the padding is."""

    def new_cache(
        self, implementation: str | None = None, compile_options: dict[str, Any] | None = None
    ) -> SparseContextCache:
        """Return an empty KV cache, to hand to `forward` or `generate`.

        A "static" one, the default on CUDA unless the policy lets tokens go later, decodes in steps of one shape, replayed as CUDA
        graphs where there is CUDA; `compile_options` are arguments of `torch.compile` for its steps. The other is "dynamic".

        Raises `UserError` for another implementation.
        """
        llm = self.model.language_model
        if implementation is None:
            implementation = default_cache(self.device, llm.policy)
        layers = self.config.text_config.num_hidden_layers
        if implementation == "static":
            if llm.policy.sequential:
                raise UserError(
                    f"cache_implementation: {llm.policy.name} lets tokens go, which a static cache can't; use dynamic"
                )
            return StaticCache(layers, llm.policy.splits, compile_options=compile_options)
        if implementation != "dynamic":
            raise UserError(f"cache_implementation: {implementation!r} is not one of dynamic, static")
        return llm.policy.new_cache(layers)

    def _static_step(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: StaticCache,
        policy: Policy,
    ) -> DynamicLlavaOutput:
        """One output token a sample through the cache's captured or compiled step."""
        valid = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            valid = attention_mask[:, -1:].bool()
        llm = self.model.language_model
        text, turned = token_positions(None, position_ids, valid, cache)
        if cache.moved_up is not None:
            text = turned = text - cache.moved_up

        def step(  # the cache is an argument: one that its cache holds on to would keep it alive
            cache: StaticCache,
            input_ids: torch.Tensor,
            valid: torch.Tensor,
            position_ids: torch.Tensor,
            text: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            embeds = self.get_input_embeddings()(input_ids)
            hidden, keep = static_step(llm, embeds, valid, position_ids, text, cache, policy)
            return self._logits(hidden), keep

        batch = input_ids.shape
        turned = turned.expand(*turned.shape[:-2], *batch)
        inputs = input_ids, valid, turned.contiguous(), text.expand(batch).contiguous()
        logits, keep = cache.run(step, policy, *inputs)
        return DynamicLlavaOutput(logits=logits, text_keep=keep, **{CACHE_NAME: cache})


def default_cache(device: torch.device, policy: Policy) -> str:
    """Return which cache a policy's decoding is fastest with: captured steps where there is CUDA and the policy allows them."""
    if captures(device) and policy.sequential and policy.name not in _SAID:
        _SAID.add(policy.name)
        print(f"{policy.name}: lets tokens go later, its steps run uncaptured", file=sys.stderr)
    return "static" if captures(device) and not policy.sequential else "dynamic"
