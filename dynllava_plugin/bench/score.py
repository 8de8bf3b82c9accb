"""Scoring a given answer: one parallel pass against feeding it token by token."""

from __future__ import annotations

from functools import partial

import torch

from dynllava_plugin.bench.run import Run, kind
from dynllava_plugin.bench.subject import Prompts
from dynllava_plugin.bench.timing import interleaved, release, summary

ANSWER = 160  # tokens


@torch.inference_mode()
def score(run: Run) -> None:
    """Time both ways for every mode and batch size, with the largest difference of a log-probability."""
    for batch in run.batches:
        if run.has("score", run.parallel_modes, batch=batch, length=ANSWER):
            continue
        prompts = run.subject.prompts(batch, ANSWER)
        prompts.calibrate()
        for mode in run.parallel_modes:
            run.subject.switch(mode)
            ways = {"parallel": partial(in_one_pass, prompts), "serial": partial(token_by_token, prompts)}
            difference = (ways["parallel"]() - ways["serial"]()).abs().max()
            times = interleaved(ways, run.subject.device, max(run.repeats // 2, 2), warmup=0)
            measured, serial = summary(times["parallel"]), summary(times["serial"])["median_s"]
            run.rows.add(
                phase="score", mode=mode, path="eager", prompts=kind(prompts), batch=batch, length=ANSWER,
                **measured, baseline_s=serial, speedup=serial / measured["median_s"], max_difference=float(difference),
            )  # fmt: skip
        release(run.subject.device)


def in_one_pass(prompts: Prompts) -> torch.Tensor:
    """Return float32 [B, T] log-probabilities of the answers by `model.score`."""
    inputs = prompts.inputs(prompts.answers.shape[1])
    labels = inputs["input_ids"].clone()
    labels[:, : prompts.width] = -100
    return prompts.subject.model.score(**inputs, labels=labels)[:, prompts.width :]


def token_by_token(prompts: Prompts) -> torch.Tensor:
    """Return the same by prefill and one decode step a token."""
    cache = prompts.subject.model.new_cache()
    logits = [prompts.prefill(cache).logits[:, -1]]
    for column in range(prompts.answers.shape[1] - 1):
        logits.append(prompts.step(cache, column).logits[:, -1])
    log_probs = torch.stack(logits, 1).float().log_softmax(-1)
    return log_probs.gather(-1, prompts.answers[..., None])[..., 0]
