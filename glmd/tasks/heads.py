"""From a backbone's output to the logits of a task."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glmd.losses.head import Head
from glmd.models.heads import Split
from glmd.models.probes import one_choice_each


def run_task_head(
    split: Split,
    outputs: Any,
    inputs: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    token_map: Tensor | None = None,
) -> Tensor:
    """(B, C) logits of a task on its backbone's `outputs`, by the head that the batch's columns ask for.

    batch: with `num_choices` (B,) the rows of inputs (R, S) are the choices of all examples one after another; choices
        that an example has not get -inf: they do not exist for the losses. With `blank_ids` (R, S) the model is a
        masked LM, and a row's score is what it says of the words in its blank: the sum over them, or their mean where
        there is a column `mean_over_tokens`.
    token_map: (V,) source id -> the model's own, for words in a blank.
    """
    num_choices = batch.get("num_choices")
    if "blank_ids" in batch:
        logits = split.run_head(
            outputs, final_linear=lambda hidden, head: _blank_scores(batch, token_map, hidden, head)
        )
    else:
        logits = split.run_head(outputs, inputs=inputs if num_choices is None else one_choice_each(inputs))
    scores: Tensor = logits if num_choices is None else choice_logits(logits, num_choices)
    return scores


def _blank_scores(batch: Mapping[str, Tensor], token_map: Tensor | None, hidden: Tensor, head: Head) -> Tensor:
    """From hidden states (R, S, H): (B, C) logits of the verbalizers, or (R, 1) log-probabilities of the candidates."""
    is_blank = batch["blank_ids"] >= 0
    in_blank = hidden[is_blank]
    if "verbalizers" in batch:
        words = batch["verbalizers"] if token_map is None else token_map[batch["verbalizers"]]
        logits = (in_blank[:, None] * head.weight[words]).sum(-1)
        return head.scaling(logits if head.bias is None else logits + head.bias[words])
    ids = batch["blank_ids"][is_blank]
    words = ids if token_map is None else token_map[ids]
    logits = head.logits(in_blank)
    of_tokens = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(1, words[:, None])
    rows = is_blank.nonzero()[:, 0]
    sums = of_tokens.new_zeros(len(hidden), 1).index_add(0, rows, of_tokens)
    return sums / is_blank.sum(1, keepdim=True) if "mean_over_tokens" in batch else sums


def choice_logits(scores: Tensor, num_choices: Tensor) -> Tensor:
    """(R, 1) scores of rows and (B,) how many of them are each example's -> (B, C), -inf for what is not there."""
    exists = torch.arange(int(num_choices.max()), device=scores.device) < num_choices[:, None]
    return scores.new_full(exists.shape, -torch.inf).masked_scatter(exists, scores)
