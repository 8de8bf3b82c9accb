"""`score()`: an answer's log-probabilities under the sparsified decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dynllava_plugin.errors import UserError
from dynllava_plugin.model.losses import scored
from dynllava_plugin.model.outputs import ScoreDetails
from dynllava_plugin.model.stepwise import score_step_by_step
from dynllava_plugin.sparsity.selection import last_answer


class SparseScoring(nn.Module):
    """Of `SparseVLM`: scores of given answers."""

    model: Any

    def score(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **images: Any,
    ) -> torch.Tensor:
        """Teacher-forced log-probabilities under the sparsified decode, in one pass (equal to step by step).

        Parameters
        ----------
        input_ids, attention_mask, pixel_values, **images
            As in `forward`.
        labels : int64 [B, L]
            -100 is ignored. The last run of labels is the output text; earlier labels are scored as prompt text.
        mm_encoder_outputs : dict
            ``{"image": ...}`` with the images' features instead of `pixel_values`.

        Returns
        -------
        float32 [B, L], 0 where the label is -100.
        """
        return self.score_details(
            input_ids, attention_mask, pixel_values, labels, mm_encoder_outputs=mm_encoder_outputs, **images
        ).log_probs

    @torch.no_grad()
    def score_details(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **images: Any,
    ) -> ScoreDetails:
        """As `score`, with the decisions behind it.

        Parameters
        ----------
        output_mask : bool [B, L]
            Output text in place of the last run of labels, e.g. every answer of a conversation.
        mm_encoder_outputs : dict
            ``{"image": ...}`` with the images' features instead of `pixel_values`.
        """
        if labels is None or labels.shape != input_ids.shape:
            raise UserError("labels: score needs labels of the shape of input_ids")
        llm, was_training = self.model.language_model, self.training
        self.eval()
        try:
            policy = llm.policy
            self.check_family(policy)
            output = last_answer(labels) if output_mask is None else output_mask.bool()
            images["pixel_values"] = pixel_values
            if policy.sequential:
                if not torch.equal(output, last_answer(labels)):
                    raise UserError(
                        f"output_mask: {policy.name} is scored token by token, one answer at a time"
                    )
                scores, greedy = score_step_by_step(
                    self,
                    input_ids,
                    attention_mask,
                    labels,
                    {**images, "mm_encoder_outputs": mm_encoder_outputs},
                )
                self.refuse_not_finite(scores)
                return ScoreDetails(scores, greedy, None, output)
            embeds, layout, added, _ = self._embed(
                policy, input_ids, None, attention_mask, None, images, mm_encoder_outputs, (output, 0)
            )
            positions = self.positions(input_ids, attention_mask, None, images, bool(layout.image_lengths))
            outputs = llm(
                inputs_embeds=embeds, attention_mask=attention_mask, position_ids=positions, use_cache=False,
                layout=layout, deepstack=added,
            )  # fmt: skip
        finally:
            self.train(was_training)
        found = scored(outputs, labels, self._logits)
        self.refuse_not_finite(found.log_probs)
        return found
