"""The one module that is wrapped for training: student and objective, from a batch to loss sums.

The loss is computed inside this forward, and inside the call of the final linear map, or of the head that reads its
weights: reading the LM head's weight outside trains wrongly under DDP, FSDP2 and ZeRO-3.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glmd.data.batches import is_full
from glmd.distillation.embedding_gradient import first_layer
from glmd.distillation.interventions import INTERVENTIONS
from glmd.distillation.layer_losses import layer_sum, make_projections, turn
from glmd.distillation.objective import Objective, Term, positions_of
from glmd.distillation.signals import SIGNALS, pairs_of
from glmd.distillation.teacher import AllOutputs, Ensemble, OnlineTeacher, TeacherOutputs, of_each, run_and_read
from glmd.distillation.teacher_policy import TeacherPolicy, chosen_by, draws, policy_loss
from glmd.errors import ConfigError
from glmd.losses.head import Head
from glmd.losses.linear import linear_cross_entropy, linear_distillation_loss
from glmd.losses.numbers import NUMBER_LOSSES
from glmd.losses.positions import rows_at
from glmd.losses.teacher_weights import label_losses, linear_weights
from glmd.models.attention_calls import prove_attention
from glmd.models.heads import Split, share_backbone
from glmd.models.layers import LayerChoice, Place
from glmd.models.module_outputs import hear_last
from glmd.tasks.forms import TaskLogits, class_logits


class Distiller(nn.Module):
    """A student, as stock Hugging Face models that share one backbone, under an objective.

    language_model: the student with its LM head; needed by LM signals.
    classifier: the student with its task head; needed by task signals. A task that is a cloze has none of its
        own: then it is the language model.
    task_logits: of the classifier, by the task's form. num_classes: K of each decision; 0 where it differs by example,
        1 where the answer is a number.
    token_map: (V,) source id -> student id.

    Where only layers are compared one of the models is there for its backbone.
    """

    def __init__(
        self,
        objective: Objective,
        token_map: np.ndarray,
        *,
        language_model: nn.Module | None = None,
        classifier: nn.Module | None = None,
        task_logits: TaskLogits = class_logits,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.task_logits, self.num_classes = task_logits, num_classes
        self.objective, needs = objective, objective.needs
        asks_task = "task_head" in needs or (language_model is None and "head" not in needs)
        self.language_model = language_model if "head" in needs or not asks_task else None
        self.classifier = classifier if asks_task else None
        if self.language_model is not None and self.classifier not in (None, self.language_model):
            share_backbone(self.classifier, self.language_model)
        # The model whose backbone runs comes first; another one shares it.
        models = {id(each): each for each in (self.classifier, self.language_model) if each is not None}
        assert models, "an objective has at least one term"
        self.splits = [Split(model) for model in models.values()]
        self.projections, self.policies = nn.ModuleDict(), nn.ModuleDict()
        self.teachers: list[OnlineTeacher] = []  # live ones
        self.seed = 0
        # Of terms on layers, and of the teacher's number: what is compared, by progress.
        self.pairs: dict[tuple[str, int], Callable[[float], list[tuple[Place, Place]]]] = {}
        self.token_map: Tensor
        self.register_buffer("token_map", torch.from_numpy(token_map), persistent=False)

    def learn_from(self, teacher: Any, *, seed: int = 0, is_proved: bool = False) -> None:
        """Take up the teacher of a stage, or several, before its first step: ask for layers, and make the projections.

        A teacher that is not live has no layers. seed: of projections' first weights, and of what a policy draws.
        is_proved: leave out the proof that attentions are what they should be. Raises ConfigError or ModelError where
        both do not fit.
        """
        found, self.seed = teacher.teachers if isinstance(teacher, Ensemble) else [teacher], seed
        self.teachers = [each for each in found if isinstance(each, OnlineTeacher)]
        terms = self.objective.layer_terms
        if not self.teachers and self.objective.reads_layers:
            what = f"{terms[0].signal} are" if terms else "layers are"
            raise ConfigError(f"{what} compared with those of a live teacher; remove teacher.cache")
        if self.teachers:
            self.teachers[0].is_silent = self.objective.teacher_needs == {"layers"}
        for number, each in enumerate(self.teachers):
            asked = [(i, term) for i, term in enumerate(terms) if number == 0 or term.asks_all_teachers]
            if asked:
                self._ask_for_layers(each, number, asked, seed=seed, is_proved=is_proved)
        for i, term in enumerate(self.objective.terms):
            if term.weighting.is_learned and len(found) > 1:  # of one there is nothing to choose
                self._make_policy(term, len(found), seed + i)

    def _make_policy(self, term: Term, teachers: int, seed: int) -> None:
        """What chooses among teachers. Raises ConfigError where choices have no place of their own in its input."""
        if not self.num_classes:
            raise ConfigError(f"{term.name}: teachers policy needs a task with classes, not with choices")
        base: Any = self.teachers[0].base
        config = base.config.get_text_config()
        last, like = config.num_hidden_layers - 1, next(self.splits[0].model.parameters())
        asked = self.teachers[0].layers.get("hidden_states", ())
        self.teachers[0].layers["hidden_states"] = [*dict.fromkeys([*asked, last])]
        sizes = {"width": config.hidden_size, "teachers": teachers, "classes": self.num_classes}
        self.policies[_key(term, 0)] = TeacherPolicy(**sizes, like=like, seed=seed)

    def _ask_for_layers(
        self,
        teacher: OnlineTeacher,
        number: int,
        terms: Sequence[tuple[int, Term]],
        *,
        seed: int,
        is_proved: bool,
    ) -> None:
        """Of one of the teachers: for terms and their places in the objective."""
        student, live = self.splits[0], teacher.splits[0]
        inside = "attention_inputs" in self.objective.needs
        if not is_proved and (inside or "attentions" in self.objective.needs):
            for split, training in ((student, True), (live, False)):
                prove_attention(split.model, inside=inside, training=training)
        configs: list[Any] = [split.model.config for split in (student, live)]
        widths = [config.get_text_config().hidden_size for config in configs]
        like = next(student.model.parameters())
        for i, term in terms:
            drawing = f"{seed}-{i}" if number == 0 else f"{seed}-{i}-{number}"
            self.pairs[term.name, number] = partial(_pairs_at, term, configs[0], configs[1], drawing)
            pairs = self.pairs[term.name, number](0.0)
            drawn = isinstance(term.layers, LayerChoice) and term.layers.map == "random"
            numbers = range(configs[1].get_text_config().num_hidden_layers) if drawn else [layer for _, layer in pairs]
            asked = [*teacher.layers.get(term.signal, ()), *numbers, *(layer for _, layer in pairs)]
            teacher.layers[term.signal] = [*dict.fromkeys(asked)]
            made = make_projections(term, student=widths[0], teacher=widths[1], pairs=pairs, like=like, seed=seed + i)
            if made is not None:
                self.projections[_key(term, number)] = made

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

    def forward(
        self,
        batch: Mapping[str, Tensor],
        teacher_outputs: AllOutputs,
        progress: float = 0.0,
        factors: Tensor | None = None,
    ) -> Tensor:
        """Sum of each term over this batch's tokens or examples: (terms,), in the objective's order.

        progress: of the stage, in [0, 1]; interventions look at it. factors: (terms,) of the sums, 1 where not given.
        Of the sums over words the factor is a part of the loss, and costs nothing.
        """
        terms, intervention = self.objective.terms, self.objective.intervention
        factors = torch.ones(len(terms)) if factors is None else factors
        factor_of = dict(zip((term.name for term in terms), factors.unbind(), strict=True))
        compute = partial(self._sums, batch, of_each(teacher_outputs), progress, factor_of)
        second = [term for term in terms if term.intervened]
        if second:
            first = [term for term in terms if not term.intervened]
            sums = (compute(first) if first else {}) | compute(second, self._intervention(batch, progress))
        elif intervention is not None and intervention.kind.takes_gradient:
            gradient = self._embedding_gradient(compute, progress)
            sums = compute(terms, self._intervention(batch, progress, gradient))
        else:
            sums = compute(terms, self._intervention(batch, progress))
        return self._stacked(sums)

    def _embedding_gradient(self, compute: Callable[..., dict[str, Tensor]], progress: float) -> Tensor:
        """(R, S, H) of the loss of a pass without intervention, by what goes into the student's first layer.

        No weight is given a gradient, so that no data-parallel rank hears of it.
        """
        kept: list[Tensor] = []

        def see(states: Tensor) -> Tensor:
            kept.append(states)
            return states

        with torch.enable_grad(), first_layer(self.splits[0].model, see):
            total = self.objective.total(self._stacked(compute(self.objective.terms)), progress)
        (gradient,) = torch.autograd.grad(total, kept)
        return gradient

    def _stacked(self, sums: Mapping[str, Tensor]) -> Tensor:
        """(terms,) in the objective's order, from sums by name; "" is what every weight has a gradient by."""
        total = torch.stack([sums[term.name] for term in self.objective.terms])
        return total + sums[""] if "" in sums else total

    def _sums(
        self,
        batch: Mapping[str, Tensor],
        teachers: Sequence[TeacherOutputs],
        progress: float,
        factor_of: Mapping[str, Tensor],
        terms: Sequence[Term],
        intervention: AbstractContextManager[None] | None = None,
    ) -> dict[str, Tensor]:
        """The sums of some terms, by name, from one pass of the student."""
        student, needs = self.splits[0], self.objective.needs
        inputs = student.inputs(batch, self.token_map)
        places: dict[str, list[Place]] = {}
        for term in (each for each in terms if each.of_layers):
            for number in self._asked(term, len(teachers)):
                places.setdefault(term.signal, []).extend(layer for layer, _ in self.pairs[term.name, number](progress))
        with intervention or nullcontext():
            if self.objective.intervention is not None:
                hear_last(student.backbone)
            if any(term.intervened for term in terms):
                teachers = self._changed_answers(batch, teachers)
            outputs, read = run_and_read(student, inputs, places, is_full=is_full(batch))
        sums: dict[str, Tensor] = {}
        if self.language_model is not None:

            def lm_sums(hidden: Tensor, head: Head) -> dict[str, Tensor]:
                words = [term for term in terms if "head" in SIGNALS[term.signal].needs]
                if not words:  # so that all weights of the head have a gradient on every rank
                    none = batch["example_id"][:0]
                    return {"": linear_cross_entropy(hidden[:0, 0], head, none)}
                return {
                    term.name: self._lm_sum(term, batch, teachers, hidden, head, factor_of[term.name], progress)
                    for term in words
                }

            sums |= self.splits[-1].run_head(outputs, final_linear=lm_sums)
        logits = None
        if self.classifier is not None:
            logits = self.task_logits(student, outputs, inputs, batch, self.token_map)
            sums |= {} if "task_head" in needs else {"": logits[:0].sum()}
        for term in terms:
            if term.of_layers:
                sums[term.name] = self._layer_sum(term, batch, teachers, read, progress) * factor_of[term.name]
            elif term.name not in sums:
                sums[term.name] = self._task_sum(term, batch, teachers, logits, progress) * factor_of[term.name]
        for term in terms:
            if term.in_turn and not term.of_layers and not self._is_last_turn(progress):
                sums[term.name] = sums[term.name] * 0
        return sums

    def _intervention(
        self, batch: Mapping[str, Tensor], progress: float, *gradient: Tensor
    ) -> AbstractContextManager[None]:
        intervention = self.objective.intervention
        if intervention is None:
            return nullcontext()
        teacher = self.teachers[0].splits if self.teachers else None
        # The seed of the micro-step, with which the trainer began it; dropout draws from another stream.
        generator = torch.Generator().manual_seed(torch.initial_seed() ^ 1)
        function = INTERVENTIONS[intervention.name]
        return function(self.splits[0], teacher, batch, progress, generator, *gradient, **intervention.options)

    def _changed_answers(
        self, batch: Mapping[str, Tensor], teachers: Sequence[TeacherOutputs]
    ) -> Sequence[TeacherOutputs]:
        """What the teacher says under an intervention that changes it too; else what it has said."""
        intervention = self.objective.intervention
        if intervention is None or not self.teachers or not intervention.kind.changes_teacher:
            return teachers
        with torch.autocast(batch["input_ids"].device.type, enabled=False):  # as it is asked outside of the student
            return [self.teachers[0](batch), *teachers[1:]]

    def _lm_sum(
        self,
        term: Term,
        batch: Mapping[str, Tensor],
        teachers: Sequence[TeacherOutputs],
        hidden: Tensor,
        head: Head,
        factor: Tensor,
        progress: float,
    ) -> Tensor:
        """A word term's sum, times the factor, from (B, S, H) hidden states before the student's final linear map."""
        positions = positions_of(term, batch)
        ours = rows_at(hidden, positions)
        if term.signal == "lm_labels":
            assert term.loss == "hard_cross_entropy" and not term.options, "the one loss on labels"
            labels = self.token_map[rows_at(batch["lm_labels"], positions)]
            return linear_cross_entropy(ours, head, labels, factor=factor)
        among = None if term.tokens == "all" else torch.searchsorted(batch["positions"], positions)
        compared, sums, options = [], [], term.options_at(progress)
        temperature = options.pop("temperature", 1.0)
        for number in self._asked(term, len(teachers)):
            states, theirs = teachers[number].hidden_states, teachers[number].head
            assert states is not None and theirs is not None, "the teacher has an LM head"
            compared.append((states if among is None else states[among], theirs))
        weights = None if term.weighting.constant else linear_weights(term.weighting, ours, head, compared)
        for i, (states, theirs) in enumerate(compared):
            scaled = factor / len(compared) if term.takes_mean and len(compared) > 1 else factor
            sums.append(
                linear_distillation_loss(
                    ours,
                    head,
                    states,
                    theirs,
                    loss=term.loss,
                    temperature=temperature,
                    options=options,
                    token_weights=None if weights is None else weights[i],
                    factor=scaled,
                )
            )
        return torch.stack(sums).sum() if len(sums) > 1 else sums[0]

    def _asked(self, term: Term, count: int) -> range:
        """The numbers of the teachers that a term compares with."""
        return range(count if term.asks_all_teachers else min(1, count))

    def _layer_sum(
        self,
        term: Term,
        batch: Mapping[str, Tensor],
        teachers: Sequence[TeacherOutputs],
        read: Callable[[str, Place], Tensor],
        progress: float,
    ) -> Tensor:
        """A term's sum over tokens, rows or texts, of the student's layers."""
        sums = []
        for number in self._asked(term, len(teachers)):
            pairs, theirs = self.pairs[term.name, number](progress), teachers[number].layers[term.signal]
            ours = {layer: read(term.signal, layer) for layer, _ in pairs}
            made = dict(self.projections.items()).get(_key(term, number))
            sums.append(layer_sum(term, pairs, ours, theirs, batch, made, progress))
        total = torch.stack(sums).sum() if len(sums) > 1 else sums[0]
        return total / len(sums) if term.takes_mean and len(sums) > 1 else total

    def _is_last_turn(self, progress: float) -> bool:
        """Whether the layers that are in turn have had theirs."""
        counts = [len(self.pairs[term.name, 0](progress)) for term in self.objective.layer_terms if term.in_turn]
        return turn(progress, max(counts)) == max(counts)

    def _task_sum(
        self,
        term: Term,
        batch: Mapping[str, Tensor],
        teachers: Sequence[TeacherOutputs],
        logits: Tensor | None,
        progress: float,
    ) -> Tensor:
        """A term's sum over examples, or decisions, of (N, K) logits of the student."""
        signal = SIGNALS[term.signal]
        assert logits is not None, "the student has a task head"
        if signal.labels is not None:
            return self._task_values(term, logits, batch[signal.labels], batch, progress).sum()
        theirs = [teachers[number].task_logits for number in self._asked(term, len(teachers))]
        assert all(each is not None for each in theirs), "the teachers have a task head"
        values = torch.stack([self._task_values(term, logits, each, batch, progress) for each in theirs])
        if len(theirs) == 1 and term.weighting.function is None:
            return values.sum()
        answers = torch.stack(theirs).to(values.dtype)  # type: ignore[arg-type]
        if term.weighting.survival is not None:
            drawn = draws(self.seed, progress, batch["example_id"], len(answers)).to(values.device)
            return ((drawn < term.weighting.survival) * values).sum()
        if term.weighting.function is None:
            return self._policy_sum(term, batch, teachers[0], answers, logits, values, progress)
        return (term.weighting.function(answers, logits.detach(), batch.get("labels")) * values).sum()

    def _policy_sum(
        self,
        term: Term,
        batch: Mapping[str, Tensor],
        first: TeacherOutputs,
        answers: Tensor,
        logits: Tensor,
        values: Tensor,
        progress: float,
    ) -> Tensor:
        """The sum over examples of the mean loss to the teachers that the policy draws, 0 where it draws none.

        values: (T, B). The reward of a draw is minus the student's loss, of labels and teachers. The policy's own loss
        adds its gradient, and nothing to the value.
        """
        states = first.layers["hidden_states"]
        seen = states[max(number for number in states if isinstance(number, int))][:, 0].float()
        policy, labels = dict(self.policies.items())[_key(term, 0)], batch["labels"]
        with torch.autocast(logits.device.type, enabled=False):
            odds = policy(seen, label_losses(answers, labels), answers.softmax(-1)).float()
        chosen = chosen_by(odds, draws(self.seed, progress, batch["example_id"], len(answers)))
        losses = (values * chosen).sum(0) / chosen.sum(0).clamp(min=1)
        own = policy_loss(odds, chosen, -(losses + label_losses(logits.float(), labels))).sum()
        return losses.sum() + own - own.detach()

    def _task_values(
        self, term: Term, logits: Tensor, target: Any, batch: Mapping[str, Tensor], progress: float
    ) -> Tensor:
        """(N,) of a loss on logits, or of one on labels."""
        function = NUMBER_LOSSES.get(term.loss, term.function) if self.num_classes == 1 else term.function
        values: Tensor = function(logits, target, **term.options_at(progress, labels=batch.get("labels")))
        if values.shape != logits.shape[:1]:
            raise ConfigError(f"{term.name} gives {tuple(values.shape)} for {tuple(logits.shape)} logits")
        return values


def _key(term: Term, number: int) -> str:
    """A term's name, and the number of a teacher, as the name of a module, in which no dot may stand."""
    return term.name.replace(".", "_") + (f"__{number + 1}" if number else "")


def _pairs_at(term: Term, student: Any, teacher: Any, seed: str, progress: float) -> list[tuple[Place, Place]]:
    """The layers that a term compares now; drawn ones are the same on every rank, and when a stage is resumed."""
    redraws = term.layers.redraws if isinstance(term.layers, LayerChoice) else 1
    return pairs_of(term, student, teacher, f"{seed}-{min(int(progress * redraws), redraws - 1)}")
