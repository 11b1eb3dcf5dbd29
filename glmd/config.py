"""A run as data: frozen dataclasses, read strictly from YAML with dotted overrides.

    config = load_config("configs/runs/minilm-superglue.yaml", ["teacher=PATH", "pretraining.max_steps=500"])

Names of training settings are those of `transformers.TrainingArguments`. Nothing here imports torch, so a
wrong key is answered at once.
"""

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from glmd.errors import ConfigError, suggestion
from glmd.strict_yaml import build, coerce

STAGES = ("pretraining", "task_lm", "task_soft_labels")
GridPoint = dict[str, Any]  # a point of a sweep: "task_soft_labels.learning_rate" -> value
SWEPT_STAGES = ("task_lm", "task_soft_labels")
# Settings that train nothing otherwise, and those that the data of all grid points are checked and scored by.
NOT_SWEPT = (
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "per_device_eval_batch_size",
    "skip_nonfinite",
    "gradient_checkpointing",
    "max_length",
    "mlm_probability",
    "num_maskings",
)
# What `check` and a run say of mixed_precision fp16.
FLOAT16_HEADS = "products with LM heads run in float32, as fp16 cannot hold their gradients; bf16 is faster"
MOST_LAYERS = 1000
GROWING = ("seeds", "sweep", "controls")  # keys that add stages to a run and change none
TASK_FILES = ("definition", "train", "val", "inputs")  # the keys of a task that are no stage settings


class Range(NamedTuple):
    """The numbers that a setting may have: from `least` to `most`; `opens` and `closes` as mathematicians write it."""

    least: float
    most: float
    opens: str = "["
    closes: str = "]"

    def __contains__(self, value: Any) -> bool:
        above = self.least < value if self.opens == "(" else self.least <= value
        return above and (value < self.most if self.closes == ")" else value <= self.most)

    def __str__(self) -> str:
        return f"{self.opens}{self.least:,}, {self.most:,}{self.closes}"


# What a setting of a stage may be. Upper ends are beyond reason whatever the data and the machine; batches are compared
# with both (glmd.planning.limits).
RANGES = {
    "max_steps": Range(1, 10**9),
    "num_train_epochs": Range(0, 10**6, "("),
    "per_device_train_batch_size": Range(1, math.inf, "[", ")"),
    "gradient_accumulation_steps": Range(1, math.inf, "[", ")"),
    "learning_rate": Range(0, 10, "("),
    "warmup_ratio": Range(0, 1),
    "min_lr_ratio": Range(0, 1),
    "weight_decay": Range(0, math.inf, "[", ")"),
    "adam_beta1": Range(0, 1, "[", ")"),
    "adam_beta2": Range(0, 1, "[", ")"),
    "adam_epsilon": Range(0, math.inf, "(", ")"),
    "max_grad_norm": Range(0, math.inf, "(", ")"),
    "skip_nonfinite": Range(0, 10**9),
    "max_length": Range(8, 10**6),
    "mlm_probability": Range(0, 1, "[", ")"),
    "num_maskings": Range(1, 10**4),
    "logging_steps": Range(1, 10**9),
    "save_steps": Range(1, 10**9),
    "save_total_limit": Range(1, 10**6),
    "per_device_eval_batch_size": Range(1, math.inf, "[", ")"),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class StageConfig:
    """How one stage trains. Exactly one of `max_steps` and `num_train_epochs` says how long."""

    max_steps: int | None = None
    num_train_epochs: float | None = None
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    # group_by_length: each step's texts are of like length, for fewer pads
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    gradient_checkpointing: bool = False  # run each layer again in the backward: less memory, more time, the same bits
    learning_rate: float = 2e-5
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.1  # the schedule ends at this share of learning_rate
    weight_decay: float = 0.1  # not applied to biases and normalization weights
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    skip_nonfinite: int = 0  # so many steps may have a loss or gradient that is not finite: they are left out
    max_length: int | None = None  # tokens; a task's own value if not given
    mlm_probability: float | None = None  # share of masked tokens; None: 0.15 where the method needs it
    num_maskings: int | None = None  # masked copies of each text, taken in turn by the epochs; None: one an epoch
    logging_steps: int = 50
    save_steps: int = 500
    save_total_limit: int = 2
    per_device_eval_batch_size: int = 64

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            _require(value is None or value in allowed, f"{name} must be in {allowed}, got {value}")
        _require(
            self.max_steps is None or self.num_train_epochs is None,
            "max_steps and num_train_epochs are both given; keep one (num_train_epochs= removes the other)",
        )

    def global_batch_size(self, world_size: int) -> int:
        """Examples of one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size

    def spread(self, begun_with: int, processes: int) -> "StageConfig":
        """The same micro-batches in the same global batches for another number of processes, by accumulation."""
        total = self.gradient_accumulation_steps * begun_with
        _require(
            total % processes == 0,
            f"elastic: the {total} micro-batches of a step cannot be shared by {processes} processes; "
            f"launch a number that divides {total}",
        )
        return dataclasses.replace(self, gradient_accumulation_steps=total // processes)

    def steps(self, num_examples: int, world_size: int) -> int:
        """Optimizer steps of the stage: max_steps, or enough for num_train_epochs."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_train_epochs is not None, "checked by RunConfig.stage"
        return max(1, math.ceil(self.num_train_epochs * num_examples / self.global_batch_size(world_size)))


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher: a masked or causal LM, and classifiers already fine-tuned on tasks, if there are any."""

    model: str | None = None  # local folder or hub id
    revision: str | None = None  # branch, tag or commit of a hub id
    trust_remote_code: bool = False  # run Python code of the model's repository
    # Further language models with the same tokenizer: on the corpus the student learns from all of them alike
    ensemble: list[str] = field(default_factory=list)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen weights; losses are float32 anyway
    # A folder for the teachers' outputs of the corpus and of tasks, made once and read by every epoch, student and seed
    cache: str | None = None
    # Stages that read from the cache; None: all that need a teacher
    cached_stages: list[Literal["pretraining", "task_lm", "task_soft_labels"]] | None = None
    tasks: dict[str, str] = field(default_factory=dict)  # task -> fine-tuned classifier; else it is fine-tuned here
    scratch: dict[str, Any] | None = None  # BertConfig fields: train a teacher on the corpus first
    pretraining: StageConfig | None = None  # how `scratch` is trained

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    def __post_init__(self) -> None:
        _require(
            (self.scratch is None) == (self.pretraining is None),
            "scratch and pretraining belong together: give both or neither",
        )
        layers = (self.scratch or {}).get("num_hidden_layers", 1)
        _require(
            isinstance(layers, int) and 1 <= layers <= MOST_LAYERS,
            f"scratch.num_hidden_layers must be in [1, {MOST_LAYERS}], got {layers!r}",
        )
        _require(self.model is None or self.scratch is None, "model and scratch are both given; keep one")
        _require(not self.ensemble or self.scratch is None, "ensemble needs trained teachers; give model, not scratch")
        named = [self.model, *self.ensemble]
        _require(len(set(named)) == len(named) and "" not in named, f"ensemble names a model twice or none: {named}")
        _require(self.cache is None or bool(self.cache.strip()), "cache is empty; give a folder, or remove it")
        stages = self.cached_stages
        given = stages is not None
        _require(not given or self.cache is not None, "cached_stages has no effect without cache; give a folder there")
        _require(stages != [], "cached_stages names no stage; name one, or remove cache")
        _require(len(set(stages or ())) == len(stages or ()), f"cached_stages has a stage twice: {stages}")


@dataclass(frozen=True)
class StudentConfig:
    """The student's shape and where its first weights come from."""

    num_hidden_layers: int | None = None  # None: as many as the teacher
    # Which teacher layers are copied; "scratch" copies nothing, embeddings included.
    initialization: Literal["uniform", "first", "last", "even", "scratch"] | list[int] = "uniform"
    config: dict[str, Any] = field(default_factory=dict)  # other fields of the config to change, else the teacher's
    # For embeddings narrower than the hidden states (config.embedding_size, 128): electra factorizes them, the
    # paper's +al; mobilebert reads each beside its neighbors', +mo. None: the teacher's own architecture.
    architecture: Literal["electra", "mobilebert"] | None = None

    def __post_init__(self) -> None:
        n = self.num_hidden_layers
        _require(n is None or 1 <= n <= MOST_LAYERS, f"num_hidden_layers must be in [1, {MOST_LAYERS}], got {n}")
        for name in ("vocab_size", "num_hidden_layers", "architectures", "model_type"):
            _require(name not in self.config, f"config.{name} is set by glmd; remove it")


@dataclass(frozen=True)
class VocabularyConfig:
    """Which tokens the student keeps, and where the others go (arXiv:2306.06625, section 3.3)."""

    keep_ratio: float | None = None  # share of the teacher's tokens, in (0, 1]
    size: int | None = None  # or their number
    multiple_of: int | None = None  # round the number up to a multiple
    selection: Literal["closed", "free"] = "closed"  # of merged tokens (BPE): with what they are merged from, or alone
    mapping: Literal["inner_product", "cosine", "euclidean", "unk"] = "inner_product"  # where dropped tokens go
    within_class: bool = False  # beginnings of words only onto such, and what goes on within a word likewise
    similarity: Literal["input", "output"] = "input"  # whose embeddings `mapping` compares, where they are not tied
    # What becomes of the teacher's probability of dropped tokens: spread over the kept ones in their proportion (the
    # paper), or given to the tokens that they are mapped onto
    teacher_mass: Literal["renormalize", "merge"] = "renormalize"
    keep_words: list[str] = field(default_factory=list)  # every piece of these words is kept; or a file, one on a line
    corpus_weights: list[float] = field(default_factory=list)  # shares of data.corpus in the count, in its order

    def __post_init__(self) -> None:
        _require(
            self.keep_ratio is None or self.size is None,
            "keep_ratio and size are both given; keep one (keep_ratio= removes it)",
        )
        r = self.keep_ratio
        _require(r is None or 0 < r <= 1, f"keep_ratio must be in (0, 1], got {r}")
        for name in ("size", "multiple_of"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        if self.mapping == "unk":
            for name in ("within_class", "similarity"):
                given = getattr(self, name) != getattr(type(self), name)
                _require(not given, f"{name} has no effect beside mapping unk, which compares nothing; remove it")
        weights = self.corpus_weights
        _require(all(0 < w < float("inf") for w in weights), f"corpus_weights must be above 0, got {weights}")

    @property
    def choice(self) -> dict[str, Any]:
        """What `build_vocabulary` takes: the settings that choose tokens and map them."""
        others = ("similarity", "teacher_mass", "corpus_weights")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in others}


@dataclass(frozen=True)
class DataConfig:
    """Where text and tasks come from."""

    corpus: list[str] = field(default_factory=list)  # text, jsonl, folders, or a `datasets` id
    text_field: str = "text"  # which field of a jsonl or hub row is the document
    superglue: str | None = None  # SuperGLUE as the official zip or the hub lays it out, or aps/super_glue
    synthetic: bool = False  # make a small world of facts instead: corpus, tasks and tokenizer
    eval_blocks: int = 64  # corpus blocks held out to measure word prediction

    def __post_init__(self) -> None:
        _require(
            not (self.synthetic and (self.corpus or self.superglue)),
            "synthetic makes its own corpus and tasks; remove corpus and superglue, or synthetic",
        )
        _require(self.eval_blocks >= 1, f"eval_blocks must be at least 1, got {self.eval_blocks}")
        _require(all(each.strip() for each in self.corpus), f"corpus has an empty entry: {self.corpus}")
        _require(len(set(self.corpus)) == len(self.corpus), f"corpus names a source twice: {self.corpus}")


@dataclass(frozen=True)
class ControlsConfig:
    """What the student is compared with in the results table."""

    hard_labels: bool = True  # same student and start, labels alone, as many updates as its task passes
    full_vocabulary: bool = False  # the whole method again with the teacher's full vocabulary


def _pretraining_defaults() -> StageConfig:
    """The paper's pretraining optimizer (design of GLMD: AdamW, cosine to 5 % of the peak)."""
    return StageConfig(
        max_steps=150_000,
        learning_rate=4e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.05,
        min_lr_ratio=0.05,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        max_length=512,
    )


def _task_defaults() -> StageConfig:
    """The paper's task optimizer: AdamW, 10 % warm-up, linear to a tenth of the peak."""
    return StageConfig(num_train_epochs=10.0)


@dataclass(frozen=True)
class RunConfig:
    """One run: teacher, student, vocabulary, data, stages, controls."""

    output_dir: str  # the run folder; the same command continues the run that is in it
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: str = "glmd"  # configs/methods/NAME.yaml, or the path of a YAML of your own
    # task -> stage settings that differ for it; `definition` is its own YAML, `train` and `val` its own jsonl files,
    # `inputs` a jsonl, labeled or not, that the student learns from in place of train
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretraining: StageConfig = field(default_factory=_pretraining_defaults)
    task_teacher: StageConfig = field(default_factory=_task_defaults)
    task_lm: StageConfig = field(default_factory=_task_defaults)
    task_soft_labels: StageConfig = field(default_factory=_task_defaults)
    # How tasks are put to a model: head, to a task head; cloze, to a language model that fills it in (the paper's form)
    casting: str = "head"
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    # stage -> setting -> values: every combination is trained from one pretrained student, with every seed
    sweep: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])  # of the task stages; the first also pretrains
    # Which checkpoint of a task stage is kept: best looks at the labels of val; agreement only at how often the student
    # answers like the teacher there, and keeps the last one of the teacher and of the control.
    selection: Literal["last", "best", "agreement"] = "last"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # of matrix products in training
    # On CUDA: the same bits from equal runs, and from one that was killed and started again. False is faster and
    # promises neither. Without effect on a CPU, where it is always so, but allowed: one config serves both.
    deterministic: bool = True
    dataloader_num_workers: int = 0  # no number of workers changes a batch
    # Continue with another number of processes than the run was begun with: the same global batches in the same order,
    # by another gradient_accumulation_steps. Only the last bits of the weights differ.
    elastic: bool = False
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)  # beside log.jsonl

    def __post_init__(self) -> None:
        _require(bool(self.output_dir.strip()), "output_dir must not be empty")
        _require(len(self.seeds) > 0, "seeds must name at least one seed")
        _require(len(set(self.seeds)) == len(self.seeds), f"seeds has a value twice: {self.seeds}")
        _require(len(set(self.report_to)) == len(self.report_to), f"report_to has a value twice: {self.report_to}")
        _require(all(0 <= seed < 2**32 for seed in self.seeds), f"seeds must be in [0, 2**32), got {self.seeds}")
        _require(
            self.dataloader_num_workers >= 0,
            f"dataloader_num_workers must be at least 0, got {self.dataloader_num_workers}",
        )
        for task in self.tasks:
            _require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", task) is not None,
                f"tasks.{task}: letters, digits, - and _ only",
            )
            known = [each.name for each in dataclasses.fields(StageConfig)] + list(TASK_FILES)
            for key in self.tasks[task]:
                _require(key in known, f"tasks.{task}.{key} is unknown{suggestion(str(key), known)}")
            for stage in ("task_teacher", "task_lm", "task_soft_labels"):
                self.stage(stage, task)
            for name in TASK_FILES:
                value = coerce(str | None, self.tasks[task].get(name), f"tasks.{task}.{name}")
                _require(
                    value is None or bool(value.strip()), f"tasks.{task}.{name} is empty; give a path, or remove it"
                )
        for task in self.teacher.tasks:
            _require(task in self.tasks, f"teacher.tasks.{task} is not among tasks{suggestion(task, self.tasks)}")
        for key in ("mlm_probability", "num_maskings"):
            _require(
                getattr(self.task_teacher, key) is None,
                f"task_teacher.{key} has no effect: a teacher is fine-tuned on clean inputs",
            )

        weights, sources = self.vocabulary.corpus_weights, self.data.corpus
        _require(
            not weights or len(weights) == len(sources) > 1,
            f"vocabulary.corpus_weights has {len(weights)} numbers, data.corpus {len(sources)} sources; "
            "give one number for each of two or more, or none",
        )
        self._check_sweep()
        for name, corpus_stage in (
            ("pretraining", self.pretraining),
            ("teacher.pretraining", self.teacher.pretraining),
        ):
            _require(
                corpus_stage is None or corpus_stage.train_sampling_strategy == "random",
                f"{name}.train_sampling_strategy has no effect: the blocks of a corpus are of one length; remove it",
            )
            for key in ("max_steps", "max_length"):
                # Epochs would have to wait for the corpus to be counted; a plan is wanted before.
                given = corpus_stage is None or getattr(corpus_stage, key) is not None
                _require(given, f"{name}.{key} is missing; a stage on the corpus needs it")

    @property
    def grid_points(self) -> list[GridPoint]:
        """Every combination of the sweep's values, by the keys' names; one that changes nothing without a sweep."""
        axes = {
            f"{stage}.{key}": self._swept(stage, key)
            for stage in SWEPT_STAGES
            if stage in self.sweep
            for key in sorted(self.sweep[stage])
        }
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def stage(self, name: str, task: str | None = None, grid_point: GridPoint | None = None) -> StageConfig:
        """The settings of a stage, with what the task changes and then what the grid point of a sweep does."""
        stage: StageConfig = getattr(self, name)
        # A teacher is fine-tuned on clean inputs, whatever the passes of its task are given.
        others = (*TASK_FILES, *(("mlm_probability", "num_maskings") if name == "task_teacher" else ()))
        changes = {key: value for key, value in self.tasks.get(task or "", {}).items() if key not in others}
        swept = {
            key.partition(".")[2]: value for key, value in (grid_point or {}).items() if key.startswith(f"{name}.")
        }
        for each, where in ((changes, f"tasks.{task}" if task else name), (swept, f"sweep.{name}")):
            if "max_steps" in each and "num_train_epochs" not in each:
                each["num_train_epochs"] = None
            if "num_train_epochs" in each and "max_steps" not in each:
                each["max_steps"] = None
            stage = build(StageConfig, {**dataclasses.asdict(stage), **each}, where)
        _require(
            stage.max_steps is not None or stage.num_train_epochs is not None,
            f"{name} needs max_steps or num_train_epochs",
        )
        return stage

    def _swept(self, stage: str, key: str) -> list[Any]:
        """The values of one axis as the stage has them: 1 is 1.0 where a number is wanted."""
        return [getattr(self.stage(stage, None, {f"{stage}.{key}": v}), key) for v in self.sweep[stage][key]]

    def _check_sweep(self) -> None:
        known = [each.name for each in dataclasses.fields(StageConfig) if each.name not in NOT_SWEPT]
        for stage, keys in self.sweep.items():
            _require(
                stage in SWEPT_STAGES,
                f"sweep.{stage} is no stage that can be swept; {' and '.join(SWEPT_STAGES)} can: the teachers and the "
                "pretrained student are shared",
            )
            _require(len(keys) > 0, f"sweep.{stage} names no setting; name one, or remove it")
            for key, values in keys.items():
                where = f"sweep.{stage}.{key}"
                _require(key in known, f"{where} is no setting that can be swept{suggestion(str(key), known)}")
                _require(len(values) > 1, f"{where} must list two or more values, got {values}")
                _require(len(set(self._swept(stage, key))) == len(values), f"{where} has a value twice: {values}")
        _require(not self.sweep or bool(self.tasks), "sweep has no effect without tasks; remove it")
        longest = max(len(grid_point_name(grid_point)) for grid_point in self.grid_points)
        _require(
            longest <= 200,
            f"sweep: a grid point's folder would have a name of {longest} characters; sweep fewer settings",
        )
        for task, grid_point in itertools.product(self.tasks, self.grid_points):
            for stage in SWEPT_STAGES:
                self.stage(stage, task, grid_point)


def grid_point_name(grid_point: GridPoint) -> str:
    """A grid point as its folder is called."""
    return ",".join(f"{key}={value}" for key, value in grid_point.items())
