"""What the stages of a run share, on every rank: plan, run folder, corpus, vocabularies, and what is known of models.

    context = Context(plan, run_folder, accelerator)
    for stage in context.stages: ...

Stages are named by their paths, so that one may begin from any other, and learn from any other.
"""

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from glmd.config import StudentConfig, TeacherConfig
from glmd.data.batches import Collate
from glmd.data.token_store import TokenStore
from glmd.distillation.cached_teacher import CachedOutputs
from glmd.distillation.teacher_cache import STORED
from glmd.errors import ConfigError
from glmd.pipeline.elastic import require_shareable
from glmd.pipeline.run_folder import RunFolder, begun_with
from glmd.planning.plan import Plan
from glmd.planning.stages import TEACHER, Stage, named_language_models, stages, teacher_path
from glmd.runtime.processes import on_main
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.forms import TaskForm, task_form
from glmd.training.fsdp import is_sharded
from glmd.training.log import RunLog
from glmd.vocabulary.tokenizer import compress_tokenizer, tokenizer_fingerprint
from glmd.vocabulary.vocabulary import Vocabulary


class Context:
    """A checked plan in its folder, with the stages that come of it. Raises ConfigError where processes do not fit."""

    def __init__(self, plan: Plan, run_folder: RunFolder, accelerator: Accelerator) -> None:
        assert plan.config.teacher.dtype != "auto", "decided by the plan"
        self.plan, self.config, self.run_folder, self.accelerator = plan, plan.config, run_folder, accelerator
        # Pads are masked out; a decoder's tokenizer may have no id for them.
        self.collate = Collate(plan.tokenizer.pad_token_id or 0)
        self.log = RunLog(run_folder.path / "log.jsonl", accelerator)
        self.store: TokenStore | None = None  # the corpus as ids
        self.opened: dict[Path, CachedOutputs] = {}  # caches of teachers' outputs: stages share them
        self.task_data: dict[tuple[str, int, int], TaskDataset] = {}  # a task's examples in ids, by which and length
        self.answers: dict[str, np.ndarray] = {}  # of teachers, on val
        self.at_hand: tuple[TeacherConfig, Any] | None = (
            None  # a language model that is in memory, for who wants it next
        )
        self.whole_answers: torch.Tensor | None = None  # of the teacher before it was quantized
        self.said: set[str] = set()  # what is said once
        # Batch sizes and accumulation speak of so many processes, and the last bits of sums depend on who shares what.
        self.is_sharded, teacher = is_sharded(accelerator), plan.config.teacher
        if teacher.sharded and not self.is_sharded:
            raise ConfigError(
                "teacher.sharded has no effect without FSDP; launch with configs/accelerate/fsdp2.yaml, or remove it"
            )
        if self.is_sharded and plan.config.analysis != "none":
            raise ConfigError(
                f"analysis: {plan.config.analysis} looks at whole layers, which FSDP shares out; launch without it"
            )
        self.shards_teachers = self.is_sharded and teacher.sharded is not False and not teacher.quantization
        self.processes, self.sharding = accelerator.num_processes, "FSDP2" if self.is_sharded else None
        if self.config.elastic:
            begun = on_main(lambda: begun_with(run_folder.path))
            self.processes, self.sharding = begun or (self.processes, self.sharding)
        on_main(lambda: require_shareable(plan, self.processes, accelerator.num_processes))
        self.stages = list(stages(plan, self.processes))
        self.language_models = named_language_models(plan.config.teacher)

    def folder(self, stage: Stage) -> Path:
        return self.run_folder.path / stage.path

    def is_complete(self, stage: Stage) -> bool:
        """Whether a stage will be skipped, or refused."""
        return self.run_folder.is_complete(self.folder(stage))

    # Models, by the path of the stage that leaves them

    def stage(self, path: str) -> Stage:
        return next(stage for stage in self.stages if stage.path == path)

    def model(self, path: str) -> str:
        """The folder of the model that a stage leaves; the name of one that is given in its place."""
        named = self.language_models.get(path)
        if named is not None:
            return named
        stage = self.stage(path)
        if stage.named is not None:
            return stage.named
        return str(self.folder(stage) / ("model" if stage.trains_teacher else "student"))

    def language_model(self, path: str) -> TeacherConfig:
        """How a language model is loaded to teach: that of a stage, or of the last one before it that has such."""
        if path == TEACHER:
            return replace(self.config.teacher, model=self.model(path), scratch=None, pretraining=None)
        if path in self.language_models:
            return replace(self.config.teacher, model=self.model(path), revision=None, ensemble=[], tasks={})
        stage = self.stage(path)
        if stage.leaves_language_model:
            teacher = self.config.teacher
            return TeacherConfig(self.model(path), dtype=teacher.dtype, quantization=teacher.quantization)
        assert stage.start is not None, "a model of a task begins from a language model"
        return self.language_model(stage.start)

    def classifier(self, stage: Stage) -> str:
        """Path of the fine-tuned teacher that a pass over a task is compared with; of a teacher, its own."""
        assert stage.task is not None, "a stage of a task"
        return stage.path if stage.kind == "task_teacher" else teacher_path(0, stage.task.task.name)

    def fingerprint(self, path: str) -> str:
        """Of the model that a stage leaves."""
        return self.run_folder.fingerprint(self.model(path), self.config.teacher.revision if path == TEACHER else None)

    def form(self, stage: Stage) -> TaskForm:
        """How the task of a stage is asked."""
        assert stage.task is not None, "a stage of a task"
        return task_form(stage.task.task, kind=self.plan.kind)

    # Vocabularies

    @cached_property
    def _kept(self) -> tuple[Vocabulary, Any]:
        vocabulary = Vocabulary.load(self.run_folder.path / "vocabulary")
        return vocabulary, compress_tokenizer(self.plan.tokenizer, vocabulary)

    def vocabulary(self, stage: Stage) -> Vocabulary:
        """That of the stage's model; all tokens but for a student."""
        return self._kept[0] if stage.variant == "student" else Vocabulary.identity(len(self.plan.tokenizer))

    def tokenizer(self, stage: Stage) -> Any:
        """That of the stage's model."""
        return self._kept[1] if stage.variant == "student" else self.plan.tokenizer

    # What a stage is made from

    def inputs(self, stage: Stage) -> dict[str, Any]:
        """Everything that the result of a stage depends on."""
        config, plan = self.config, self.plan
        if stage.kind == "vocabulary":
            settings = asdict(replace(config.vocabulary, teacher_mass="renormalize"))  # does not depend on it
            del settings["teacher_reads"]  # nor on this, which came later
            return {
                "vocabulary": settings,
                "teacher": self.fingerprint(TEACHER),
                "corpus": plan.corpus,
                "tokens": self.tokens,
                "tasks": {name: task.fingerprint() for name, task in (plan.tasks | plan.untrained).items()},
            }
        task, is_student = stage.task, not stage.trains_teacher
        teacher = stage.teacher if task is None and stage.teacher is not None else TEACHER
        learned = stage.teacher or (self.classifier(stage) if task is not None else TEACHER)
        intervention = stage.objective.intervention if stage.objective is not None else None
        # Keys that came later stand there where they are not as they were before.
        inputs: dict[str, Any] = {} if config.deterministic else {"deterministic": False}
        given = {name: getattr(config, name) for name in ("torch_compile", "tf32", "attn_implementation")}
        inputs |= {name: value for name, value in given.items() if value}
        if stage.objective is not None and stage.objective.changes:
            inputs["changes"] = True
        if config.vocabulary.teacher_reads != "all" and stage.variant == "student":
            inputs["teacher_reads"] = config.vocabulary.teacher_reads
        inputs |= {"teacher.quantization": config.teacher.quantization} if config.teacher.quantization else {}
        inputs |= {
            "stage": asdict(stage.settings) if stage.settings is not None else None,
            "seed": stage.seed,
            "terms": [term.record() for term in stage.objective.terms] if stage.objective is not None else [],
            "intervention": asdict(intervention) if intervention is not None else None,
            "mixed_precision": config.mixed_precision,
            "selection": config.selection if task is not None else "last",
            "teacher": "" if stage.kind == "teacher" else self.fingerprint(teacher),
            "teacher_dtype": config.teacher.dtype,
            "tokenizer": self._source_tokenizer,
            "vocabulary": self.vocabulary(stage).fingerprint() if is_student else None,
            "teacher_mass": config.vocabulary.teacher_mass if is_student else None,
            "data": task.fingerprint() if task is not None else plan.corpus,
            "tokens": self.tokens if task is None else None,
            "classifier": self.fingerprint(learned) if task is not None and is_student else None,
            "eval_blocks": config.data.eval_blocks if task is None else None,
            "teacher.cache": self._kept_in(stage) if stage.cached else None,
            "start": self._start(stage),
            "processes": self.processes,
            "sharding": self.sharding,
        }
        if task is None and plan.conversations is not None and self.store is not None:
            said = {"loss_on": plan.conversations.loss_on, "packing": config.data.packing}
            inputs["conversations"] = said | {"marks": self.store.manifest["conversations"]["sha256"]}
        if stage.kind == "pretraining":
            inputs |= {"analysis": config.analysis} if config.analysis != "none" else {}
            inputs["ensemble"] = [self.fingerprint(path) for path in stage.further] or None
        elif stage.further:
            inputs["ensemble"] = [self.fingerprint(path) for path in stage.further]
            if "head" in stage.teacher_needs_of(1):
                models = [str(self.language_model(path).model) for path in stage.further]
                inputs["ensemble"] += [self.run_folder.fingerprint(model) for model in models]
        if stage.start is None and stage.teacher not in (None, TEACHER):  # of whose layers it is made all the same
            inputs["layers of"] = self.fingerprint(TEACHER)
        return inputs

    @cached_property
    def _source_tokenizer(self) -> str:
        """Fingerprint of the teacher's tokenizer."""
        return tokenizer_fingerprint(self.plan.tokenizer)

    @property
    def tokens(self) -> str | None:
        """sha256 of the corpus as tokenized: a data set of the hub may be another one when it is read again."""
        return self.store.manifest["sha256"] if self.store is not None else None

    def _start(self, stage: Stage) -> Any:
        """What a stage begins from, for its record."""
        if stage.kind == "task_teacher" and stage.settings is None:
            return self.fingerprint(stage.path)
        if stage.start is not None:
            return self.fingerprint(stage.start)
        if stage.kind == "teacher":
            return self.config.teacher.scratch
        later = ("num_decoder_layers", "decoder_initialization")  # keys that came later
        return {name: value for name, value in asdict(self.student(stage)).items() if name not in later or value}

    def student(self, stage: Stage) -> StudentConfig:
        """The shape of a stage's student, or of its assistant."""
        return self.config.assistants[stage.assistant - 1] if stage.assistant else self.config.student

    def _kept_in(self, stage: Stage) -> str:
        """The precision of what a stage reads from the cache."""
        return str(STORED[self.config.teacher.dtype] if stage.asks_lm_logits else torch.float32).removeprefix("torch.")
