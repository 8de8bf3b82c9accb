"""Teacher-forced scores of a batch in one parallel pass."""

from __future__ import annotations

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.answering import Calls
from dynllava_plugin.evaluation.engine.answers import Score
from dynllava_plugin.evaluation.engine.encoding import Prepared


def score_batch(calls: Calls, batch: list[Prepared]) -> list[Score]:
    """Return scores of the batch's continuations, and of the earlier answers in its prompts.

    Raises
    ------
    UserError
        For an empty continuation.
    """
    spans = []
    for item in batch:
        request = item.request
        text = request.prompt + request.continuation
        spans.append(calls.columns(text, (*request.output_spans, (len(request.prompt), len(text)))))
        if any(start == end for start, end in spans[-1]):
            raise UserError(f"{request.name}: the text to score is empty")
    inputs = calls.inputs(batch)
    ids, width = inputs["input_ids"], inputs["input_ids"].shape[1]
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for row, columns in enumerate(spans):
        for start, end in columns:
            wanted[row, width + start : width + end] = True
    labels = ids.masked_fill(~wanted, -100)
    with calls.clock():
        found = calls.model.score_details(**inputs, labels=labels, output_mask=wanted)
    logprobs, greedy = found.log_probs.double().cpu(), (found.greedy | ~wanted).cpu()
    keep, wanted = found.text_keep.cpu(), wanted.cpu()
    prompt = inputs["attention_mask"].cpu()
    image = calls.model.visual_places(ids).cpu()
    kept_images = found.image_keep.sum(1).tolist() if found.image_keep is not None else None
    scores = []
    for row, columns in enumerate(spans):
        dropped = int(image[row].sum()) - kept_images[row] if kept_images is not None else 0
        rounds = []
        for start, end in columns:
            place = slice(width + start, width + end)
            before = slice(0, width + start)
            dense = int(prompt[row, before].sum())
            lost = int((wanted[row, before] & ~keep[row, before]).sum())
            stays = keep[row, place].tolist()
            rounds.append(
                Score(
                    logprob=float(logprobs[row, place].sum()),
                    tokens=end - start,
                    is_greedy=bool(greedy[row, place].all()),
                    kept_tokens=sum(stays),
                    cost=calls.cost(dense, dense - dropped - lost, stays),
                )
            )
        scores.append(rounds[0] if len(rounds) == 1 else _joined(rounds))
    return scores


def _joined(rounds: list[Score]) -> Score:
    """Return a conversation's score from its rounds'."""
    costs = [score.cost for score in rounds if score.cost is not None]
    return Score(
        logprob=sum(score.logprob for score in rounds),
        tokens=sum(score.tokens for score in rounds),
        is_greedy=all(score.is_greedy for score in rounds),
        kept_tokens=sum(score.kept_tokens for score in rounds),
        cost=sum(costs[1:], costs[0]) if costs else None,
        rounds=tuple(rounds),
    )
