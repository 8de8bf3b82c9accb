"""Generated answers of a batch, each with its token counts."""

from __future__ import annotations

from typing import Any

import torch

from dynllava_plugin.evaluation.engine.answers import Answer
from dynllava_plugin.evaluation.engine.calls import Calls
from dynllava_plugin.evaluation.engine.histories import History, read_histories
from dynllava_plugin.evaluation.engine.prefetch import Prepared
from dynllava_plugin.evaluation.engine.requests import Generation
from dynllava_plugin.model.shared_prefill import share_prefill


def answer_batch(calls: Calls, batch: list[Prepared], generation: Generation) -> list[Answer]:
    """Answers in the batch's order; what its prompts begin with alike is prefilled once."""
    inputs = calls.inputs(batch)
    earlier = _earlier_answers(calls, inputs["input_ids"], batch)
    one_history = _setting(calls, generation, "num_beams") in (None, 1)
    prompt_tokens = inputs["attention_mask"].sum(1).tolist()
    image_tokens = (inputs["input_ids"] == calls.model.config.image_token_id).sum(1).tolist()
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
    histories = read_histories(output.past_key_values, steps, earlier) if one_history else None
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
            noted = output.past_key_values.images_kept
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
