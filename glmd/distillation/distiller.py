"""The one module that is wrapped for training: student and objective, from a batch to loss sums.

The loss is computed inside this forward, and inside the call of the final linear map, or of the head that reads its
weights: reading the LM head's weight outside trains wrongly under DDP, FSDP2 and ZeRO-3.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glmd.distillation.objective import LM_SIGNALS, Objective, Term, token_mask
from glmd.distillation.teacher import Said, TeacherOutputs, of_each
from glmd.losses.head import Head
from glmd.losses.labels import LABEL_LOSSES
from glmd.losses.linear import linear_cross_entropy, linear_distillation_loss
from glmd.losses.logits import LOGIT_LOSSES
from glmd.models.heads import Split, share_backbone
from glmd.tasks.heads import run_task_head


class Distiller(nn.Module):
    """A student, as stock Hugging Face models that share one backbone, under an objective.

    language_model: the student with its LM head; needed by word signals.
    classifier: the student with its task head; needed by task signals. A task of words in a blank has none of its
        own: then it is the language model.
    token_map: (V,) source id -> student id.
    """

    def __init__(
        self,
        objective: Objective,
        token_map: np.ndarray,
        *,
        language_model: nn.Module | None = None,
        classifier: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.language_model = language_model if objective.uses(*LM_SIGNALS) else None
        self.classifier = classifier if objective.uses("task_logits", "task_labels") else None
        if self.language_model is not None and self.classifier not in (None, self.language_model):
            share_backbone(self.classifier, self.language_model)
        # The model whose backbone runs comes first; another one shares it.
        models = {id(each): each for each in (self.classifier, self.language_model) if each is not None}
        assert models, "an objective has at least one term"
        self.splits = [Split(model) for model in models.values()]
        self.token_map: Tensor
        self.register_buffer("token_map", torch.from_numpy(token_map), persistent=False)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Class and config of each student model by attribute name, so that a checkpoint can become a folder."""
        models: dict[str, Any] = {"language_model": self.language_model, "classifier": self.classifier}
        return {
            name: {"class": type(model).__name__, "config": model.config.to_dict()}
            for name, model in models.items()
            if model is not None and (name == "language_model" or model is not self.language_model)
        }

    def recompute_activations(self) -> None:
        """In training, keep each layer's input alone, and run the layer again in the backward."""
        body: Any = self.splits[0].backbone
        # transformers 5.23 has another name for it and warns of the first one.
        enable = getattr(body, "activation_checkpointing_enable", None) or body.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def forward(self, batch: Mapping[str, Tensor], said: Said) -> Tensor:
        """Sum of each term over this batch's tokens or examples: (terms,), in the objective's order."""
        student = self.splits[0]
        inputs = student.inputs(batch) | {"input_ids": self.token_map[batch["input_ids"]]}
        outputs = student.run_backbone(inputs)
        sums: dict[str, Tensor] = {}
        if self.language_model is not None:
            words = [term for term in self.objective.terms if term.signal in LM_SIGNALS]

            def word_sums(hidden: Tensor, head: Head) -> dict[str, Tensor]:
                return {term.name: self._word_sum(term, batch, of_each(said), hidden, head) for term in words}

            sums |= self.splits[-1].run_head(outputs, final_linear=word_sums)
        if self.classifier is not None:
            logits = run_task_head(student, outputs, inputs, batch, self.token_map)
            tasks = [term for term in self.objective.terms if term.signal not in LM_SIGNALS]
            sums |= {term.name: _task_sum(term, batch, of_each(said)[0], logits) for term in tasks}
        return torch.stack([sums[term.name] for term in self.objective.terms])

    def _word_sum(
        self,
        term: Term,
        batch: Mapping[str, Tensor],
        teachers: Sequence[TeacherOutputs],
        hidden: Tensor,
        head: Head,
    ) -> Tensor:
        """A word term's sum from (B, S, H) hidden states before the student's final linear map."""
        if term.signal == "lm_labels":
            assert term.loss == "hard_cross_entropy" and not term.options, "the one loss on labels"
            chosen = token_mask(term, batch)
            labels = self.token_map[batch["lm_labels"][chosen]]
            return linear_cross_entropy(hidden[chosen], head, labels)
        valid = batch["predicts"]
        weights = token_mask(term, batch)[valid].float() if term.tokens == "masked" else None
        sums = []
        for each in teachers:
            assert each.hidden_states is not None and each.head is not None, "the teacher has an LM head"
            sums.append(
                linear_distillation_loss(
                    hidden[valid],
                    head,
                    each.hidden_states,
                    each.head,
                    loss=term.loss,
                    token_weights=weights,
                    **term.options,
                )
            )
        # For the forward KL this has the gradient of the KL to the teachers' mean probability.
        return torch.stack(sums).mean() if len(sums) > 1 else sums[0]


def _task_sum(term: Term, batch: Mapping[str, Tensor], teacher: TeacherOutputs, logits: Tensor) -> Tensor:
    """A task term's sum from the student's (B, C) logits."""
    if term.signal == "task_labels":
        return LABEL_LOSSES[term.loss](logits, batch["labels"], **term.options).sum()
    assert teacher.task_logits is not None, "the teacher has a task head"
    return LOGIT_LOSSES[term.loss](logits, teacher.task_logits, **term.options).sum()
