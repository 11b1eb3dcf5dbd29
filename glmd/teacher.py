"""What the teacher said, as one noun, and the live teacher that says it.

teacher = OnlineTeacher(language_model, classifier=None, kept_ids=vocabulary.kept_ids)
outputs = teacher(batch)      # TeacherOutputs
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from glmd.heads import final_linear, hidden_before_final_linear, run_backbone, run_task_head, share_backbone


@dataclass(frozen=True)
class TeacherOutputs:
    """What a batch's terms may ask of a teacher. N: non-pad tokens in row order, K: kept vocabulary, C: classes."""

    hidden_states: Tensor | None = None  # (N, H) just before the final linear map
    head_weight: Tensor | None = None  # (K, H) the rows of the kept tokens
    head_bias: Tensor | None = None  # (K,)
    task_logits: Tensor | None = None  # (B, C); -inf for a choice that an example has not


class OnlineTeacher:
    """A frozen language model, a frozen classifier, or both over the classifier's backbone, run batch by batch.

    With both, the fine-tuned backbone feeds the LM head it was pretrained with: one forward, two answers.
    """

    def __init__(self, language_model: nn.Module | None, classifier: nn.Module | None, kept_ids: np.ndarray) -> None:
        if language_model is not None and classifier not in (None, language_model):
            share_backbone(classifier, language_model)
        self.language_model, self.classifier = language_model, classifier
        models = [model for model in (classifier, language_model) if model is not None]
        for model in models:
            model.eval().requires_grad_(False)
        self.base = models[0]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if language_model is not None:
            linear = final_linear(language_model)
            kept = torch.from_numpy(kept_ids).to(linear.weight.device)
            # The teacher's probability is renormalised over the kept tokens (the paper); slicing its head does that.
            self.weight = linear.weight.detach()[kept]
            self.bias = linear.bias.detach()[kept] if linear.bias is not None else None

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherOutputs:
        """Run on source `input_ids` (B, S)."""
        inputs = model_inputs(batch)
        outputs = run_backbone(self.base, inputs)
        hidden = task_logits = None
        if self.language_model is not None:
            hidden = hidden_before_final_linear(self.language_model, outputs)[batch["attention_mask"].bool()]
        if self.classifier is not None:
            task_logits = run_task_head(self.classifier, outputs, inputs, batch).float()
        return TeacherOutputs(hidden, self.weight, self.bias, task_logits)


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that a model's forward takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
