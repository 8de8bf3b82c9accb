"""Generated answers of a batch, each with its token counts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dynllava_plugin.evaluation.engine.answers import Answer
from dynllava_plugin.evaluation.engine.encoding import Encoder, Prepared
from dynllava_plugin.evaluation.engine.requests import Generation
from dynllava_plugin.flops import CachedDecoder, OutputCost, output_cost
from dynllava_plugin.model.shared_prefill import share_prefill
from dynllava_plugin.policies import Policy
from dynllava_plugin.sparsity.cache import CACHE_NAME


class Calls:
    """What a batch's calls of the model have in common: its inputs, its images, the clock.

    Parameters
    ----------
    model, processor
        As `load_model` gives them.
    encoder : Encoder
        Theirs.

    Attributes
    ----------
    seconds : float
        Inside the model so far.
    shared_prompts : int
        Prompts so far of batches that prefilled what they begin with alike once.
    eos_ids : int64 [E]
        Tokens that end an answer.
    """

    def __init__(self, model: Any, processor: Any, encoder: Encoder) -> None:
        self.model, self.processor, self.encoder = model, processor, encoder
        self.seconds, self.shared_prompts = 0.0, 0
        self._decoder = CachedDecoder.of(model)
        eos = model.generation_config.eos_token_id
        eos = processor.tokenizer.eos_token_id if eos is None else eos
        self.eos_ids = torch.tensor(eos if isinstance(eos, list) else [eos])

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count what happens inside as the model's seconds."""
        started = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.seconds += time.perf_counter() - started

    def inputs(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        """Return the batch as arguments of the model, its images encoded where that is done apart."""
        with self.clock():
            return self.encoder.batch(batch)

    @property
    def policy(self) -> Policy:
        """Return who decides what stays, by the settings in force."""
        return self.model.model.language_model.policy

    def columns(self, text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return character spans as token spans, counted from the end (negative; 0 is the end itself).

        Counted from the end because images, which stand before them, become many tokens, and padding is left.
        """
        count = self.encoder.token_count
        total = count(text)
        return [(count(text[:start]) - total, count(text[:end]) - total) for start, end in spans]

    def cost(self, dense: int, sparse: int, keep: list[bool]) -> OutputCost | None:
        """Return `output_cost`; None under a policy whose cache isn't split at one layer for good."""
        if self.policy.sequential or self.policy.at_input or len(self.policy.splits) > 1:
            return None
        return output_cost(replace(self._decoder, sparse_layer=self.policy.gate_layer), dense, sparse, keep)


def answer_batch(calls: Calls, batch: list[Prepared], generation: Generation) -> list[Answer]:
    """Return answers in the batch's order; what its prompts begin with alike is prefilled once."""
    inputs = calls.inputs(batch)
    earlier = _earlier_answers(calls, inputs["input_ids"], batch)
    one_history = _setting(calls, generation, "num_beams") in (None, 1)
    prompt_tokens = inputs["attention_mask"].sum(1).tolist()
    image_tokens = calls.model.visual_places(inputs["input_ids"]).sum(1).tolist()
    with calls.clock():
        shared = None
        if earlier is None and _can_share(calls, generation):
            shared = _shared(calls, batch, inputs)
        inputs = shared or {**inputs, "output_mask": earlier}
        output = calls.model.generate(
            **{name: value for name, value in inputs.items() if value is not None},
            **generation.kwargs,
            pad_token_id=calls.processor.tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :].cpu()  # [B, T]
    ended = torch.isin(tokens, calls.eos_ids)
    # Tokens up to and with the first end token; all of them where none came.
    counts = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1]).tolist()
    texts = calls.processor.tokenizer.batch_decode(
        [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)], skip_special_tokens=True
    )
    steps = tokens.shape[1] - 1  # the last token is never fed back
    histories = read_histories(getattr(output, CACHE_NAME), steps, earlier) if one_history else None
    answers = []
    for row, text in enumerate(texts):
        counts_of = {
            "prompt_tokens": prompt_tokens[row],
            "image_tokens": image_tokens[row],
            "generated_tokens": counts[row],
        }
        if histories is None:  # beams share no one history
            kept = _UNKNOWN
        elif calls.policy.sequential:
            # Its cache lets tokens go, prompt and output alike: lengths don't tell what came in.
            noted = getattr(output, CACHE_NAME).images_kept
            kept = {**_UNKNOWN, "kept_image_tokens": image_tokens[row] if noted is None else int(noted[row])}
        else:
            kept = _kept(calls, histories[row], **counts_of)
        answers.append(Answer(text=_truncate(text, generation.until), **counts_of, **kept))
    return answers


_UNKNOWN: dict[str, Any] = {
    "kept_image_tokens": None,
    "cached_tokens": None,
    "kept_tokens": None,
    "cost": None,
}


def _kept(
    calls: Calls, history: History, prompt_tokens: int, image_tokens: int, generated_tokens: int
) -> dict[str, Any]:
    """What an answer's history tells of the tokens that stay."""
    cached = generated_tokens - 1
    keep = history.keep[:cached]  # the rest is padding of the batch behind the sample's end
    dropped_image = prompt_tokens - history.context - history.dropped_answers
    return {
        "kept_image_tokens": image_tokens - dropped_image,
        "cached_tokens": cached,
        "kept_tokens": sum(keep),
        "cost": calls.cost(prompt_tokens, history.context, keep),
    }


def _setting(calls: Calls, generation: Generation, name: str) -> Any:
    """Of this call, or else the checkpoint's own."""
    return generation.kwargs.get(name, getattr(calls.model.generation_config, name, None))


def _can_share(calls: Calls, generation: Generation) -> bool:
    """One plain cache a sample, and nothing that reads the prompt's columns, where padding may stand inside."""
    neutral: dict[str, tuple[Any, ...]] = {
        "num_beams": (None, 1),
        "num_return_sequences": (None, 1),
        "use_cache": (None, True),
        "cache_implementation": (None,),
        "repetition_penalty": (None, 1),
        "no_repeat_ngram_size": (None, 0),
    }
    return all(_setting(calls, generation, name) in values for name, values in neutral.items())


def _shared(calls: Calls, batch: list[Prepared], inputs: dict[str, Any]) -> dict[str, Any] | None:
    features = inputs.get("mm_encoder_outputs")
    if len(batch) < 2 or not features:
        return None
    images = [tuple(image.key for image in item.images) for item in batch]
    shared = share_prefill(
        calls.model,
        inputs["input_ids"],
        inputs["attention_mask"],
        images=images,
        encode=lambda rows: calls.encoder.images([batch[row] for row in rows]),
        tokens_per_image=features["image"].pooler_output.shape[1],
        pad_token_id=calls.processor.tokenizer.pad_token_id,
    )
    calls.shared_prompts += len(batch) if shared is not None else 0
    return shared


def _earlier_answers(calls: Calls, ids: torch.Tensor, batch: list[Prepared]) -> torch.Tensor | None:
    """bool [B, L] of the prompts' own output text; None where no prompt has any."""
    if not any(item.request.output_spans for item in batch):
        return None
    mask, width = torch.zeros_like(ids, dtype=torch.bool), ids.shape[1]
    for row, item in enumerate(batch):
        for start, end in calls.columns(item.request.prompt, item.request.output_spans):
            mask[row, width + start : width + end] = True
    return mask


def _truncate(text: str, until: tuple[str, ...]) -> str:
    text = text.strip()
    ends = [position for position in (text.find(stop) for stop in until) if position >= 0]
    return text[: min(ends)].strip() if ends else text


@dataclass(frozen=True)
class History:
    """What a sample's KV cache says about a finished `generate` call.

    Attributes
    ----------
    context : int
        Tokens of the prompt that layers >= l hold.
    dropped_answers : int
        Tokens of earlier answers in the prompt that they don't.
    keep : list of bool
        For each token that was fed back, whether they hold it; goes on behind the sample's end token.
    """

    context: int
    dropped_answers: int
    keep: list[bool]


def read_histories(cache: Any, steps: int, earlier: torch.Tensor | None) -> list[History] | None:
    """Return one history a sample; None without a cache of ours.

    Parameters
    ----------
    steps : int
        Decoding steps after the prompt.
    earlier : bool [B, prompt], optional
        The prompt's own output text.
    """
    if cache is None or not hasattr(cache, "kept_lengths"):
        return None
    held = cache.kept_lengths()[-1].tolist()
    decisions = cache.output_keep()
    if decisions is None:
        return [History(length, 0, []) for length in held]
    decisions = decisions.cpu()
    columns = decisions.shape[1] - steps  # of the prompt, where it has output text
    dropped = [0] * len(held)
    if columns and earlier is not None:
        dropped = (earlier.cpu() & ~decisions[:, :columns]).sum(1).tolist()
    generated = decisions[:, columns:]
    kept = generated.sum(1).tolist()
    return [
        History(length - count, lost, keep)
        for length, count, lost, keep in zip(held, kept, dropped, generated.tolist(), strict=True)
    ]
