"""The outputs of a teacher as one noun, and the live teacher that gives them.

teacher = OnlineTeacher(language_model, classifier=None, vocabulary=vocabulary)
outputs = teacher(batch)      # TeacherOutputs
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glmd.data.batches import is_full
from glmd.errors import ModelError
from glmd.losses.finite import examples_of_tokens, spoiled
from glmd.losses.head import Head
from glmd.losses.positions import rows_at
from glmd.models.attention_calls import AttentionCalls, is_heard, key_value_heads, require_each_layer
from glmd.models.heads import Split, backbone, share_backbone
from glmd.models.layers import EMBEDDINGS, Place
from glmd.models.module_outputs import ModuleOutputs
from glmd.tasks.forms import TaskLogits, class_logits
from glmd.vocabulary.vocabulary import Vocabulary


@dataclass(frozen=True)
class TeacherOutputs:
    """What a batch's terms may ask of a teacher. N: positions that predict, row by row; K: kept tokens; C: classes.

    B of task logits: examples, or decisions where an example has several.
    """

    hidden_states: Tensor | None = None  # (N, H) just before the final linear map
    head: Head | None = None  # of K tokens: the teacher's, sliced to those that are kept
    task_logits: Tensor | None = None  # (B, C); -inf for a choice that an example has not
    layers: Mapping[str, Mapping[Place, Tensor]] = field(default_factory=dict)  # signal -> layer -> (R, S, ...)


# The outputs of one teacher, or of several whose predictions count alike.
AllOutputs = TeacherOutputs | tuple[TeacherOutputs, ...]


class OnlineTeacher:
    """A frozen language model, a frozen classifier, or both over the classifier's backbone, run batch by batch.

    With both, the fine-tuned backbone feeds the LM head it was pretrained with: one forward, two answers.

    merge_dropped: give the probability of a dropped token to the one it is mapped onto. Else it is spread over all kept
        words in their proportion, as in the paper.
    reads_mapped: it is given in the place of a dropped token the one that it is mapped onto, as the student is.
    token_map: (V,) source id -> its own, of a teacher whose tokens are not the source's.
    """

    def __init__(
        self,
        language_model: nn.Module | None,
        classifier: nn.Module | None,
        vocabulary: Vocabulary,
        *,
        merge_dropped: bool = False,
        reads_mapped: bool = False,
        token_map: np.ndarray | None = None,
        task_logits: TaskLogits = class_logits,
    ) -> None:
        self.task_logits = task_logits
        if (
            language_model is not None
            and classifier is not None
            and backbone(classifier) is not backbone(language_model)
        ):
            share_backbone(classifier, language_model)
        self.language_model, self.classifier = language_model, classifier
        models = [model for model in (classifier, language_model) if model is not None]
        for model in models:
            model.eval().requires_grad_(False)
        self.splits = [Split(model) for model in models]
        self.layers: dict[str, list[Place]] = {}  # which of its layers, or modules, it is asked for, by signal
        self.is_silent = False  # nothing is asked of it but to lend its layers
        # (V,) source id -> what it is given: its own id, or the source id of a kept token.
        self.source_map: Tensor | None = None if token_map is None else torch.from_numpy(token_map)
        if reads_mapped and not vocabulary.is_identity:
            self.source_map = torch.from_numpy(vocabulary.kept_ids[vocabulary.token_map])
        self.head: Head | None = None
        if language_model is not None:
            self.head = sliced_head(language_model, vocabulary, merge_dropped=merge_dropped)

    @property
    def name(self) -> str:
        """The folder or hub id that it was loaded from."""
        return getattr(self.base, "name_or_path", "") or type(self.base).__name__

    @property
    def base(self) -> nn.Module:
        """The model whose backbone runs."""
        return self.splits[0].model

    def __deepcopy__(self, memo: Any) -> "OnlineTeacher":
        """Itself: it never changes, and a copy of who learns from it learns from the same."""
        return self

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherOutputs:
        """Run on source `input_ids` (B, S), from whatever device they come."""
        if self.is_silent:
            return TeacherOutputs()
        device = next(self.base.parameters()).device
        batch = {name: each.to(device, non_blocking=True) for name, each in batch.items()}
        if self.source_map is not None:
            self.source_map = self.source_map.to(device)
        inputs = self.splits[0].inputs(batch, self.source_map)
        outputs, read = run_and_read(self.splits[0], inputs, self.layers, is_full=is_full(batch))
        hidden = task_logits = None
        if self.language_model is not None:
            hidden = rows_at(self.splits[-1].hidden_before_final(outputs), batch["positions"])
        if self.classifier is not None:
            task_logits = self.task_logits(self.splits[0], outputs, inputs, batch, self.source_map).float()
            task_logits = spoiled(task_logits, batch.get("num_choices"))
        layers = {signal: {number: read(signal, number) for number in self.layers[signal]} for signal in self.layers}
        return TeacherOutputs(hidden, self.head, task_logits, layers)


class Ensemble:
    """Several teachers of one batch, live ones or from caches. Students are scored against the first."""

    def __init__(self, teachers: Sequence[Callable[[Mapping[str, Tensor]], TeacherOutputs]]) -> None:
        self.teachers = teachers

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[TeacherOutputs, ...]:
        return tuple(teacher(batch) for teacher in self.teachers)


Read = Callable[[str, Place], Tensor]


def run_and_read(
    split: Split, inputs: Mapping[str, Tensor], signals: Mapping[str, Collection[Place]], *, is_full: bool
) -> tuple[Any, Read]:
    """A backbone's outputs, and what reads of one of the signals what a numbered layer gave: (R, S, ...).

    signals: what will be read of each. (R, S, H) of hidden_states, (R, S, A, S) of attentions and attention_scores,
    (R, S, A, D) of queries, keys and values. Layers are counted from 0, and what goes into the first is EMBEDDINGS. Of
    modules what a part of that name gave.
    """
    inside = set(signals) - {"hidden_states", "modules"}
    calls = AttentionCalls() if inside and is_heard(split.model) else None
    parts = ModuleOutputs(split.backbone, [str(name) for name in signals.get("modules", ())])
    asked = {f"output_{name}": True for name in ("hidden_states", "attentions") if name in signals}
    if calls is not None:
        asked.pop("output_attentions", None)
    with calls or nullcontext(), parts:
        outputs = split.run_backbone(inputs, is_full=is_full, **asked)
    if calls is not None:
        require_each_layer(calls, split.model, len(inputs["input_ids"]))

    def read(signal: str, number: Place) -> Tensor:
        found, tokens = _read(signal, number), tuple(inputs["input_ids"].shape)
        if found.shape[:2] != tokens:
            place = f"module {number}" if isinstance(number, str) else f"{signal} of layer {number}"
            name = type(split.model).__name__
            raise ModelError(f"{name}: {place} gives {tuple(found.shape)} for {tokens} rows and tokens")
        return found

    def _read(signal: str, number: Place) -> Tensor:
        if isinstance(number, str):
            return parts.read(number)
        if signal == "hidden_states":  # the first ones are the embeddings
            states: Tensor = outputs.hidden_states[number - EMBEDDINGS]
            return states
        if calls is None:
            attentions: Tensor = outputs.attentions[number].transpose(1, 2)
            return attentions
        return calls.layers[number].read(signal, key_value_heads(split.model.config))

    return outputs, read


def first_of(teacher: Any) -> Any:
    """The first of several teachers, by whom students are scored; a single one itself."""
    return teacher.teachers[0] if isinstance(teacher, Ensemble) else teacher


def of_each(outputs: AllOutputs) -> tuple[TeacherOutputs, ...]:
    """The outputs of each teacher; of one, a tuple of one."""
    return (outputs,) if isinstance(outputs, TeacherOutputs) else outputs


def sliced_head(language_model: nn.Module, vocabulary: Vocabulary, *, merge_dropped: bool) -> Head:
    """The head of a teacher for students with this vocabulary."""
    head, merged_into = Split(language_model).head, None
    # Slicing the head renormalizes the probability over the kept tokens.
    rows = vocabulary.kept_ids
    if merge_dropped and not vocabulary.is_identity:
        rows = np.concatenate([rows, vocabulary.dropped_ids])
        merged_into = torch.from_numpy(vocabulary.token_map[vocabulary.dropped_ids]).to(head.weight.device)
    chosen: Tensor | slice = torch.from_numpy(rows).to(head.weight.device)
    if vocabulary.is_identity:
        chosen = slice(vocabulary.size)  # no copy
    bias = head.bias.detach()[chosen] if head.bias is not None else None
    return Head(head.weight.detach()[chosen], bias, head.scaling, merged_into)


def unsound_examples(outputs: AllOutputs, batch: Mapping[str, Tensor]) -> list[int]:
    """The examples of a batch for which an output of a teacher is not finite. Reads all outputs."""
    found: set[int] = set()
    for one in of_each(outputs):
        of_layers = [rows_at(each, batch["positions"]) for layers in one.layers.values() for each in layers.values()]
        for states in [one.hidden_states, *of_layers]:
            if states is None:
                continue
            is_sound = torch.isfinite(states) | (states == -math.inf)  # scores, where a token may not look
            bad = (~is_sound.flatten(1).all(-1)).cpu()
            found |= set(examples_of_tokens({name: each.cpu() for name, each in batch.items()})[bad].tolist())
        if one.task_logits is not None:
            bad = torch.isnan(spoiled(one.task_logits, batch.get("num_choices"))).any(-1).cpu()
            examples = batch["example_id"].cpu()
            if "num_decisions" in batch:
                examples = examples.repeat_interleave(batch["num_decisions"].cpu())
            found |= set(examples[bad].tolist())
    return sorted(found)
