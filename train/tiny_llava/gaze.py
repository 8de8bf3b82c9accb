"""The gaze loss: where an answer starts, four heads of layers 2 and 3 should look at the object it is about.

Answer tokens alone teach a small model to name *some* object of a scene long before they teach it which one, and to
answer yes/no questions by their frequency. Two heads learn to look at what is at the place, or has the colour or shape, that
the question names; two more look there only if everything fits, and at the first token otherwise, so that "is there"
has a yes and a no. The layers lie behind Dynamic-LLaVA's gate (l = 2): they look among the kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dynllava_plugin.easy_vqa.facts import COLORS, SHAPES
from dynllava_plugin.easy_vqa.scenes import PLACES, Fact

LAYERS = (2, 3)
FIND, MATCH = slice(0, 2), slice(2, 4)  # heads
IMAGE_TOKENS = 64


@dataclass
class Gaze:
    """Where `heads` should look: from position `columns[i]` of sequence `rows[i]` (int64 [n]) at `goals[i]`.

    `goals` float [n, 1 + N] sums to 1 over the first token of the sequence (not used by `FIND`) and the image's patches.
    """

    heads: slice
    rows: Tensor
    columns: Tensor
    goals: Tensor


def found(question: str, facts: list[Fact]) -> set[int]:
    """The objects at the place a question names, or else of the colour and shape it names."""
    for k, place in enumerate(PLACES):
        if place in question and len(facts) > 1:
            return {k}
    return matching(question, facts)


def matching(question: str, facts: list[Fact]) -> set[int]:
    """The objects for which everything that a question names (place, colour, shape) is true; negations don't count."""
    words = question.rstrip("?").split()
    color = next((word for word in words if word in COLORS), None)
    shape = next((word for word in words if word in SHAPES), None)
    at = next((k for k, place in enumerate(PLACES) if place in question), None)
    return {
        k for k, (c, s) in enumerate(facts) if color in (None, c) and shape in (None, s) and at in (None, k)
    }


def find_gaze(
    labels: Tensor, asked: list[list[str | None]], shown: list[list[Fact]], patches: Tensor
) -> list[Gaze]:
    """The goals of a batch.

    Parameters
    ----------
    labels : int64 [B, T]
        -100 outside answers.
    asked : for each sequence the question before each answer, None for descriptions
    shown : for each sequence the facts of its objects
    patches : int64 [B, 64]
        Each patch's object within its image, negative on background.
    """
    before = torch.nn.functional.pad(labels, (1, 0), value=-100)[:, :-1]
    starts = (labels != -100) & (before == -100)
    gazes = []
    for heads, wanted in ((FIND, found), (MATCH, matching)):
        rows, columns, goals = [], [], []
        for row, questions in enumerate(asked):
            places = starts[row].nonzero()[:, 0].tolist()
            for column, question in zip(places, questions, strict=True):
                if question is None:
                    continue
                objects = wanted(question, shown[row])
                goal = torch.zeros(1 + IMAGE_TOKENS)
                for k in objects:
                    goal[1:] += patches[row] == k
                if not objects and heads is MATCH:
                    goal[0] = 1.0
                if goal.sum() > 0 and (heads is MATCH or len(shown[row]) > 1):
                    rows.append(row)
                    columns.append(column - 1)  # the token that predicts the answer's first
                    goals.append(goal / goal.sum())
        if rows:
            gazes.append(Gaze(heads, torch.tensor(rows), torch.tensor(columns), torch.stack(goals)))
    return gazes


def gaze_loss(
    llm: LlamaModel, inputs: dict[int, Tensor], positions: Tensor, image_start: int, gazes: list[Gaze]
) -> Tensor:
    """Cross entropy between the goals and the heads' attention, summed over gazes, mean over answers, heads, layers.

    `inputs` are the hidden states [B, T, width] that enter each of `LAYERS`; `positions` int64 [B, T].
    """
    total = positions.new_zeros((), dtype=torch.float32)
    image_tokens = gazes[0].goals.shape[1] - 1
    for number in LAYERS:
        layer = llm.layers[number]
        attention = layer.self_attn
        hidden = layer.input_layernorm(inputs[number])
        per_head = (*hidden.shape[:2], -1, attention.head_dim)
        query = attention.q_proj(hidden).view(per_head).transpose(1, 2)
        key = attention.k_proj(hidden).view(per_head).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *llm.rotary_emb(hidden, positions))
        targets = torch.cat([key[:, :, :1], key[:, :, image_start : image_start + image_tokens]], dim=2)
        for gaze in gazes:
            seen, goals = targets[:, gaze.heads], gaze.goals
            if gaze.heads.stop <= FIND.stop:
                seen, goals = seen[:, :, 1:], goals[:, 1:]
            scores = torch.einsum(
                "nhd,nhpd->nhp", query[gaze.rows, gaze.heads, gaze.columns], seen[gaze.rows]
            )
            total = total - (goals[:, None] * (scores * attention.scaling).log_softmax(-1)).sum(-1).mean()
    return total / len(LAYERS)
