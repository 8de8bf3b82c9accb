"""Evaluation during training: held-out samples through the engine that both harnesses use."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.answers import Answer, Score
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.engine.requests import Generation, Request
from dynllava_plugin.evaluation.llava_json import Sample
from train.agreement import from_the_first
from train.data import ConversationDataset
from train.mixture import Mixture
from train.skipped import UnusableSample

MAX_NEW_TOKENS = 64
SHORT_ANSWER = 3  # words: up to here an answer is right or wrong


class HeldOut:
    """Samples that are not trained on.

    Each sample's last question is answered greedily (at most 64 tokens), and its last answer scored.

    Parameters
    ----------
    dataset : ConversationDataset
        The samples, asked as its encoder would train on them.
    batch_size : int
        Samples in one forward pass.
    """

    def __init__(self, dataset: ConversationDataset, batch_size: int) -> None:
        self.mixture, self.image_folder = dataset.mixture, dataset.image_folder
        self.encoder, self.batch_size = dataset.encode, batch_size

    def measure(self, model: Any, processor: Any, accelerator: Any, sharded: bool) -> dict[str, float]:
        """Metrics over all samples, the same on every process.

        Parameters
        ----------
        model : SparseVLM
            Left in the mode (training or not) it came in.
        processor : ProcessorMixin
            The model's.
        accelerator : accelerate.Accelerator
        sharded : bool
            No process holds all weights, so that all must go through every sample together; otherwise each
            process takes its part.

        Returns
        -------
        `eval_accuracy`
            Share of the answers of up to three words that are met exactly (case and a final stop aside); absent
            where there is none.
        `eval_ppl`
            Mean over samples of exp(mean negative log-likelihood) of the last answer, under the sparsified decode.
        `eval_kept_image_share`, `eval_kept_output_share`
            Of image tokens, and of generated tokens that were fed back.
        `eval_samples`, `eval_seconds`
        """
        begin = time.monotonic()
        own = range(len(self.mixture))
        if not sharded:
            own = own[accelerator.process_index :: accelerator.num_processes]
        samples = [self.mixture[index] for index in own]
        was_training = model.training
        model.eval()
        try:
            with accelerator.autocast():
                engine = Engine(model, processor, self.batch_size)
                requests = [self._request(sample) for sample in samples]
                generation = Generation.from_task({"max_new_tokens": MAX_NEW_TOKENS})
                answers, scores = engine.generate(requests, generation), engine.score(requests)
        finally:
            model.train(was_training)
        sums = torch.tensor(_sums(samples, answers, scores), dtype=torch.float64, device=accelerator.device)
        if not sharded:
            sums = accelerator.reduce(sums, reduction="sum")
        short, right, count, ppl, image, kept_image, output, kept_output = sums.tolist()
        metrics = {"eval_accuracy": right / short} if short else {}
        metrics |= {"eval_ppl": ppl / count}
        metrics |= {"eval_kept_image_share": kept_image / image} if image else {}
        metrics |= {"eval_kept_output_share": kept_output / output} if output else {}
        return {**metrics, "eval_samples": count, "eval_seconds": time.monotonic() - begin}

    def _request(self, sample: Sample) -> Request:
        images = tuple(str(self.image_folder / image) for image in sample.images)
        prompt, answer = self.encoder.last_round(sample)
        return Request(prompt, images, sample.name, continuation=answer)


def usable(dataset: ConversationDataset) -> Mixture:
    """Return the samples that could be trained on, too; the others are named and counted as they would be in training.

    Called on every process before training, so that no evaluation ends a run of hours; process 0 looks at them.

    Raises
    ------
    UserError
        More samples of the run are bad than it may skip, or none can be used.
    """

    def look() -> list[int]:
        bad = []
        for index in range(len(dataset)):
            try:
                dataset.load(index)
            except UnusableSample as error:
                bad.append(index)
                dataset.skip(index, error)
        if dataset.skipped.too_many():
            raise dataset.skipped.refusal()
        if len(bad) == len(dataset):
            raise UserError(
                f"--held_out {len(bad)}: none of these samples can be used, see {dataset.skipped.path}"
            )
        return bad

    return dataset.mixture.take(np.setdiff1d(np.arange(len(dataset)), from_the_first(look)))


def _sums(samples: list[Sample], answers: list[Answer], scores: list[Score]) -> list[float]:
    totals = [0.0] * 8
    for sample, answer, score in zip(samples, answers, scores, strict=True):
        reference = sample.turns[-1][1]
        short = len(reference.split()) <= SHORT_ANSWER
        parts = [
            short,
            short and _plain(answer.text) == _plain(reference),
            1,
            math.exp(min(score.loss, 700.0)),
        ]
        parts += [answer.image_tokens, answer.kept_image_tokens or 0]
        parts += [answer.cached_tokens or 0, answer.kept_tokens or 0]
        totals = [total + float(part) for total, part in zip(totals, parts, strict=True)]
    return totals


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".")
