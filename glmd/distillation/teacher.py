"""What the teacher said, as one noun, and the live teacher that says it.

teacher = OnlineTeacher(language_model, classifier=None, vocabulary=vocabulary)
outputs = teacher(batch)      # TeacherOutputs
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from glmd.losses.finite import examples_of_tokens, spoiled
from glmd.losses.logits import NOT_SCALED, LogitScaling
from glmd.models.heads import final_linear, hidden_before_final_linear, logit_scaling, run_backbone, share_backbone
from glmd.tasks.forms import TaskLogits, class_logits
from glmd.vocabulary.vocabulary import Vocabulary


@dataclass(frozen=True)
class TeacherOutputs:
    """What a batch's terms may ask of a teacher. N: non-pad tokens in row order, K: kept vocabulary, C: classes."""

    hidden_states: Tensor | None = None  # (N, H) just before the final linear map
    head_weight: Tensor | None = None  # (K, H) the rows of the kept tokens; (K + D, H) with those to be merged
    head_bias: Tensor | None = None  # (K,) or (K + D,)
    merged_into: Tensor | None = None  # (D,) the student's word that each further row gives its probability to
    task_logits: Tensor | None = None  # (B, C); -inf for a choice that an example has not
    head_scaling: LogitScaling = NOT_SCALED  # what the teacher does to the product of hidden states and head
    others: tuple["TeacherOutputs", ...] = ()  # of further teachers, whose words count as much as this one's


class OnlineTeacher:
    """A frozen language model, a frozen classifier, or both over the classifier's backbone, run batch by batch.

    With both, the fine-tuned backbone feeds the LM head it was pretrained with: one forward, two answers.

    merge_dropped: give the probability of a dropped word to the one it is mapped onto. Else it is spread over all kept
        words in their proportion, as in the paper.
    """

    def __init__(
        self,
        language_model: nn.Module | None,
        classifier: nn.Module | None,
        vocabulary: Vocabulary,
        *,
        merge_dropped: bool = False,
        task_logits: TaskLogits = class_logits,
    ) -> None:
        self.task_logits = task_logits
        if language_model is not None and classifier not in (None, language_model):
            share_backbone(classifier, language_model)
        self.language_model, self.classifier = language_model, classifier
        models = [model for model in (classifier, language_model) if model is not None]
        for model in models:
            model.eval().requires_grad_(False)
        self.base = models[0]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.merged_into: Tensor | None = None
        self.scaling = NOT_SCALED if language_model is None else logit_scaling(language_model.config)
        if language_model is not None:
            self.weight, self.bias, self.merged_into = sliced_head(
                language_model, vocabulary, merge_dropped=merge_dropped
            )

    @property
    def name(self) -> str:
        """The folder or hub id that it was loaded from."""
        return getattr(self.base, "name_or_path", "") or type(self.base).__name__

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherOutputs:
        """Run on source `input_ids` (B, S), from whatever device they come."""
        device = next(self.base.parameters()).device
        batch = {name: each.to(device, non_blocking=True) for name, each in batch.items()}
        inputs = model_inputs(batch)
        outputs = run_backbone(self.base, inputs)
        hidden = task_logits = None
        if self.language_model is not None:
            hidden = hidden_before_final_linear(self.language_model, outputs)[batch["attention_mask"].bool()]
        if self.classifier is not None:
            task_logits = self.task_logits(self.classifier, outputs, inputs, batch).float()
            task_logits = spoiled(task_logits, batch.get("num_choices"))
        return TeacherOutputs(hidden, self.weight, self.bias, self.merged_into, task_logits, self.scaling)


class Ensemble:
    """Several teachers of one batch. The first is the one that students are compared with."""

    def __init__(self, teachers: Sequence[OnlineTeacher]) -> None:
        self.teachers = teachers

    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherOutputs:
        first, *others = (teacher(batch) for teacher in self.teachers)
        return replace(first, others=tuple(others))


def sliced_head(
    language_model: nn.Module, vocabulary: Vocabulary, *, merge_dropped: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`head_weight`, `head_bias` and `merged_into` of a teacher for students with this vocabulary."""
    linear, merged_into = final_linear(language_model), None
    # Slicing the head renormalizes the probability over the kept tokens.
    rows = vocabulary.kept_ids
    if merge_dropped and not vocabulary.is_identity:
        rows = np.concatenate([rows, vocabulary.dropped_ids])
        merged_into = torch.from_numpy(vocabulary.token_map[vocabulary.dropped_ids]).to(linear.weight.device)
    chosen: Tensor | slice = torch.from_numpy(rows).to(linear.weight.device)
    if vocabulary.is_identity:
        chosen = slice(vocabulary.size)  # no copy
    bias = linear.bias.detach()[chosen] if linear.bias is not None else None
    return linear.weight.detach()[chosen], bias, merged_into


def unsound_examples(outputs: TeacherOutputs, batch: Mapping[str, Tensor]) -> list[int]:
    """The examples of a batch of which a teacher said what is not finite. Reads all that it said."""
    found: set[int] = set()
    if outputs.hidden_states is not None:
        bad = (~torch.isfinite(outputs.hidden_states).all(-1)).cpu()
        found |= set(examples_of_tokens({name: each.cpu() for name, each in batch.items()})[bad].tolist())
    if outputs.task_logits is not None:
        bad = torch.isnan(spoiled(outputs.task_logits, batch.get("num_choices"))).any(-1).cpu()
        found |= set(batch["example_id"].cpu()[bad].tolist())
    return sorted(found)


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that a model's forward takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
