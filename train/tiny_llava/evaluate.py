"""Accuracy of a tiny LLaVA on test questions, each answered alone, greedily."""

import re
from collections import defaultdict
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynllava_plugin.easy_vqa.facts import COLORS, SHAPES
from dynllava_plugin.images import open_image
from train.tiny_llava.batches import Encoder, collate
from train.tiny_llava.language import answer_logits


def question_type(question: str) -> str:
    """The question's template: colours, shapes and places replaced by their kinds."""
    for values, kind in (
        (COLORS, "COLOR"),
        (SHAPES, "SHAPE"),
        (("top", "bottom"), ""),
        (("left", "right"), "PLACE"),
    ):
        question = re.sub(rf"\b({'|'.join(values)})\b", kind, question)
    return question


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, str]],
    folder: Path | str,
    per_batch: int = 24,
) -> dict[str, float]:
    """Share of rows whose whole answer is the greedy choice, token by token; "all" and per question type.

    An answer is what greedy decoding gives exactly if each of its tokens (and `</s>`) is the most likely one
    after those before it, so one forward pass judges all questions about an image (a block each).
    """
    side = model.config.vision_config.image_size
    encoder = Encoder(tokenizer, image_tokens=model.config.image_seq_length)
    images = CLIPImageProcessor(size={"height": side, "width": side}, do_center_crop=False)
    grouped: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        grouped[row["image"]].append((row["question"], row["answer"]))
    names = sorted(grouped)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(names), per_batch):
        chosen = names[start : start + per_batch]
        pictures = [open_image(Path(folder) / name) for name in chosen]
        pixels = images(pictures, return_tensors="pt")["pixel_values"]
        batch = collate(encoder, [(grouped[name], True) for name in chosen], pixels)
        logits, labels = answer_logits(model, batch)
        wrong = torch.zeros_like(batch.labels[:, 1:], dtype=torch.bool)
        wrong[batch.labels[:, 1:] != -100] = logits.argmax(-1) != labels
        for k, name in enumerate(chosen):
            for number, (question, _) in enumerate(grouped[name]):
                correct = not wrong[k][batch.block[k, 1:] == number + 1].any().item()
                right["all"].append(correct)
                right[question_type(question)].append(correct)
    return {kind: sum(flags) / len(flags) for kind, flags in right.items()}
