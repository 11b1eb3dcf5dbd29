"""A run as data: frozen dataclasses, read strictly from YAML with dotted overrides.

    config = load_config("configs/runs/minilm-superglue.yaml", ["teacher=PATH", "pretraining.max_steps=500"])

Names of training settings are those of `transformers.TrainingArguments`. Nothing here imports torch, so a
wrong key is answered at once.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glmd.errors import RENAMED, suggestion
from glmd.stage_config import StageConfig, require
from glmd.strict_yaml import build
from glmd.task_files import TASK_FILES, task_files

# Stages whose settings are keys of the config; a method may have others on tasks, whose settings stand in `stages`.
STAGES = ("pretraining", "task_lm", "task_soft_labels")
GridPoint = dict[str, Any]  # a point of a sweep: "task_soft_labels.learning_rate" -> value
NEVER_SWEPT = ("pretraining", "task_teacher")  # the teachers and the pretrained student are shared by all grid points
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


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher: a masked or causal LM, and classifiers already fine-tuned on tasks, if there are any."""

    model: str | None = None  # local folder or hub id
    revision: str | None = None  # branch, tag or commit of a hub id
    trust_remote_code: bool = False  # run Python code of the model's repository
    # Further language models with the same tokenizer. The student learns from all of them, as `teachers` of each term
    # of the method says (mean where it says nothing); on a task each is fine-tuned, unless `tasks` names them
    ensemble: list[str] = field(default_factory=list)
    # Of the frozen weights; losses are float32 anyway. auto: bfloat16 on a GPU that has it, else float32, or what the
    # run in output_dir was begun with
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # 8 or 4 bits a weight in the layers of all teachers while they teach, by bitsandbytes (pip install
    # 'glmd[quantization]'): about a half or a third of what 16 bits take, for an error that the run says. Embeddings
    # and heads keep `dtype`; students begin with the whole weights
    quantization: Literal["8bit", "4bit"] | None = None
    # Under FSDP2 share out the layers of the teachers over the ranks too. None: there, unless they are quantized
    sharded: bool | None = None
    # A folder for the teachers' outputs of the corpus and of tasks, made once and read by every epoch, student and seed
    cache: str | None = None
    # Stages that read from the cache; None: all that need a teacher, but for those of layers, which it does not keep
    cached_stages: list[str] | None = None
    # task -> fine-tuned classifier, else it is fine-tuned here; or a list, of each of several teachers
    tasks: dict[str, str | list[str]] = field(default_factory=dict)
    scratch: dict[str, Any] | None = None  # BertConfig fields: train a teacher on the corpus first
    pretraining: StageConfig | None = None  # how `scratch` is trained

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    def __post_init__(self) -> None:
        require(
            (self.scratch is None) == (self.pretraining is None),
            "scratch and pretraining belong together: give both or neither",
        )
        layers = (self.scratch or {}).get("num_hidden_layers", 1)
        require(
            isinstance(layers, int) and 1 <= layers <= MOST_LAYERS,
            f"scratch.num_hidden_layers must be in [1, {MOST_LAYERS}], got {layers!r}",
        )
        require(self.model is None or self.scratch is None, "model and scratch are both given; keep one")
        require(not self.ensemble or self.scratch is None, "ensemble needs trained teachers; give model, not scratch")
        named = [self.model, *self.ensemble]
        require(len(set(named)) == len(named) and "" not in named, f"ensemble names a model twice or none: {named}")
        for task in self.tasks:
            models = self.of_task(task)
            require(
                "" not in models and len(set(models)) == len(models) > 0,
                f"tasks.{task} names a model twice or none: {self.tasks[task]}",
            )
            require(
                isinstance(self.tasks[task], str) or not self.ensemble or len(models) == len(named),
                f"tasks.{task} names {len(models)} models for {len(named)} teachers; give one for each, in their order",
            )
        require(self.cache is None or bool(self.cache.strip()), "cache is empty; give a folder, or remove it")
        stages = self.cached_stages
        given = stages is not None
        require(not given or self.cache is not None, "cached_stages has no effect without cache; give a folder there")
        require(
            not (self.quantization and self.sharded),
            "quantization and sharded are both given; quantized weights cannot be shared out: keep one",
        )
        require(stages != [], "cached_stages names no stage; name one, or remove cache")
        require(len(set(stages or ())) == len(stages or ()), f"cached_stages has a stage twice: {stages}")

    def of_task(self, task: str) -> list[str]:
        """The fine-tuned classifiers that are named for a task, the first teacher's first; empty where none is."""
        named = self.tasks.get(task, [])
        return [named] if isinstance(named, str) else named


@dataclass(frozen=True)
class StudentConfig:
    """The student's shape and where its first weights come from."""

    num_hidden_layers: int | None = None  # None: as many as the teacher; of an encoder-decoder those of its encoder
    # Which teacher layers are copied; "scratch" copies nothing, embeddings included.
    initialization: Literal["uniform", "first", "last", "even", "scratch"] | list[int] = "uniform"
    config: dict[str, Any] = field(default_factory=dict)  # other fields of the config to change, else the teacher's
    # For embeddings narrower than the hidden states (config.embedding_size, 128): electra factorizes them, the
    # paper's +al; mobilebert reads each beside its neighbors', +mo. None: the teacher's own architecture.
    architecture: Literal["electra", "mobilebert"] | None = None
    # Of an encoder-decoder's decoder. None: num_hidden_layers if that is given, else as many as the teacher
    num_decoder_layers: int | None = None
    # Which of its layers are copied. None: those that `initialization` says
    decoder_initialization: Literal["uniform", "first", "last", "even"] | list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("num_hidden_layers", "num_decoder_layers"):
            n = getattr(self, name)
            require(n is None or 1 <= n <= MOST_LAYERS, f"{name} must be in [1, {MOST_LAYERS}], got {n}")
        require(
            self.decoder_initialization is None or self.initialization != "scratch",
            "decoder_initialization has no effect beside initialization scratch; remove it",
        )
        for name in ("vocab_size", "num_hidden_layers", "architectures", "model_type"):
            require(name not in self.config, f"config.{name} is set by glmd; remove it")


@dataclass(frozen=True)
class AssistantConfig(StudentConfig):
    """A model between teacher and student: it learns as the student does, and teaches it (TAKD, arXiv:1902.03393)."""

    # Its tokens: all of the teacher's, or those that the student keeps
    vocabulary: Literal["full", "student"] = "full"


@dataclass(frozen=True)
class VocabularyConfig:
    """Which tokens the student keeps, and where the others go (arXiv:2306.06625, section 3.3)."""

    keep_ratio: float | None = None  # share of the teacher's tokens, in (0, 1]
    size: int | None = None  # or their number
    # Round the number up to a multiple. None: that of keep_ratio to 64 where the teacher has 4,096 tokens or more, as
    # GPUs multiply by other numbers of tokens several times slower
    multiple_of: int | None = None
    selection: Literal["closed", "free"] = "closed"  # of merged tokens (BPE): with what they are merged from, or alone
    mapping: Literal["inner_product", "cosine", "euclidean", "unk"] = "inner_product"  # where dropped tokens go
    within_class: bool = False  # beginnings of words only onto such, and what goes on within a word likewise
    similarity: Literal["input", "output"] = "input"  # whose embeddings `mapping` compares, where they are not tied
    # What becomes of the teacher's probability of dropped tokens: spread over the kept ones in their proportion (the
    # paper), or given to the tokens that they are mapped onto
    teacher_mass: Literal["renormalize", "merge"] = "renormalize"
    # What the teacher reads: all tokens, or as the student does in the place of dropped ones those that they are mapped
    # onto (an ablation of the paper)
    teacher_reads: Literal["all", "mapped"] = "all"
    keep_words: list[str] = field(default_factory=list)  # every piece of these words is kept; or a file, one on a line
    corpus_weights: list[float] = field(default_factory=list)  # shares of data.corpus in the count, in its order

    def __post_init__(self) -> None:
        require(
            self.keep_ratio is None or self.size is None,
            "keep_ratio and size are both given; keep one (keep_ratio= removes it)",
        )
        r = self.keep_ratio
        require(r is None or 0 < r <= 1, f"keep_ratio must be in (0, 1], got {r}")
        for name in ("size", "multiple_of"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        if self.mapping == "unk":
            for name in ("within_class", "similarity"):
                given = getattr(self, name) != getattr(type(self), name)
                require(not given, f"{name} has no effect beside mapping unk, which compares nothing; remove it")
        weights = self.corpus_weights
        require(all(0 < w < float("inf") for w in weights), f"corpus_weights must be above 0, got {weights}")

    @property
    def choice(self) -> dict[str, Any]:
        """What `build_vocabulary` takes: the settings that choose tokens and map them."""
        others = ("similarity", "teacher_mass", "teacher_reads", "corpus_weights")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in others}


@dataclass(frozen=True)
class DataConfig:
    """Where text and tasks come from."""

    corpus: list[str] = field(default_factory=list)  # text, jsonl, folders, or a `datasets` id
    text_field: str = "text"  # which field of a jsonl, Parquet or hub row is the document
    # Of a causal teacher: the field of a row that holds a conversation, [{role: user, content: ...}, ...], which the
    # tokenizer's chat template renders, instead of a text
    messages_field: str | None = None
    # Of conversations: at which tokens the student learns, those that an assistant says, or all. None: assistant
    loss_on: Literal["assistant", "all"] | None = None
    packing: bool = True  # conversations share blocks, without seeing each other; false: each is a block of its own
    superglue: str | None = None  # SuperGLUE as the official zip or the hub lays it out, or aps/super_glue
    synthetic: bool = False  # make a small world of facts instead: corpus, tasks and tokenizer
    eval_blocks: int = 64  # corpus blocks held out to measure word prediction

    def __post_init__(self) -> None:
        require(
            not (self.synthetic and (self.corpus or self.superglue)),
            "synthetic makes its own corpus and tasks; remove corpus and superglue, or synthetic",
        )
        if self.messages_field is None:
            for name in ("loss_on", "packing"):
                given = getattr(self, name) != getattr(type(self), name)
                require(not given, f"{name} has no effect without messages_field; give that, or remove it")
        else:
            require(bool(self.messages_field.strip()), "messages_field is empty; name a field, as messages")
            require(len(self.corpus) > 0, "messages_field has no effect without corpus; give conversations there")
            require(
                self.text_field == "text",
                f"text_field {self.text_field!r} has no effect beside messages_field; remove one of them",
            )
        require(self.eval_blocks >= 1, f"eval_blocks must be at least 1, got {self.eval_blocks}")
        require(all(each.strip() for each in self.corpus), f"corpus has an empty entry: {self.corpus}")
        require(len(set(self.corpus)) == len(self.corpus), f"corpus names a source twice: {self.corpus}")


@dataclass(frozen=True)
class ControlsConfig:
    """What the student is compared with in the results table."""

    hard_labels: bool = True  # same student and start, labels alone, as many updates as its task passes
    full_vocabulary: bool = False  # the whole method again with the teacher's full vocabulary
    trim_only: bool = False  # the fine-tuned teacher with the student's vocabulary, and nothing trained
    # The student of full_vocabulary, which gets the student's vocabulary after training, without more of it
    trim_after: bool = False


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
    # Models between them, from the largest, each with the keys of `student`: every one learns by the same stages from
    # the one before it, and the student from the last; a term of the method with `teachers` learns from all
    assistants: list[AssistantConfig] = field(default_factory=list)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: str = "glmd"  # configs/methods/NAME.yaml, or the path of a YAML of your own
    # task -> stage settings that differ for it; `definition` is its own YAML, `train` and `val` its own files
    # of rows (.jsonl, .csv, .tsv, .parquet), `inputs` one, labeled or not, that the student learns from in place of
    # train. Without a YAML: `text`, `text_pair` and `label` name columns, the last one or several of 0 and 1, and
    # `problem_type` what answers are. Where there is no val `val_fraction` of train is held out (of columns 0.1 by
    # itself). Of sentences, for a sentence encoder, `label` is that of val's similarities, `val_text` names its columns
    # where these are others, `prompt` what stands before each text, and `pooling` (mean, cls, last) how a vector is
    # made, where no file beside the encoder says so
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Of these, such whose texts count for the vocabulary, and on which nothing is trained
    untrained_tasks: list[str] = field(default_factory=list)
    pretraining: StageConfig = field(default_factory=_pretraining_defaults)
    task_teacher: StageConfig = field(default_factory=_task_defaults)
    task_lm: StageConfig = field(default_factory=_task_defaults)
    task_soft_labels: StageConfig = field(default_factory=_task_defaults)
    # stage of the method's own -> what its settings differ in from those of task_soft_labels
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    # How tasks are put to a model: head, to a task head; cloze, to a language model that fills it in (the paper's form)
    casting: str = "head"
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    # A method, by name or path: over each task the stages of `method` have together as many updates as those of this
    # one would have, in the proportion of their own. None: as many as the settings of each say
    updates_of: str | None = None
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
    # Backbones of student and teacher by torch.compile: pays on a GPU, after half a minute of compiling for each stage
    torch_compile: bool = False
    # On CUDA: steps on the corpus start all their kernels at once, which small models and batches are several times
    # faster by; the same bits. Not with several processes, fp16, gradient_checkpointing, an intervention, a weight
    # or loss that changes or terms on masked tokens, which the log says. Without effect elsewhere.
    cuda_graphs: bool = True
    # By which code student and teacher compute attention in training, as transformers calls it: sdpa, eager,
    # flex_attention, flash_attention_2, ... None: what transformers chooses, sdpa where the architecture has it. It is
    # tried by `check`. Models are scored and exported by transformers' choice.
    attn_implementation: str | None = None
    tf32: bool = False  # on GPUs that have it: products of float32 matrices are rounded to ten bits, and much faster
    # processes that make batches ahead; no number of them changes a batch. None: 0 where training runs on the CPU,
    # which needs its cores; else as many as a rank has cores to spare, at most 4
    dataloader_num_workers: int | None = None
    # Continue with another number of processes than the run was begun with: the same global batches in the same order,
    # by another gradient_accumulation_steps. Only the last bits of the weights differ.
    elastic: bool = False
    # layer_distances: at each logging step of pretraining, how far the student's layers are from the teacher's, on a
    # few held-out texts; nothing is trained on that. In log.jsonl, results.json, the report and a picture
    analysis: Literal["none", "layer_distances"] = "none"
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)  # beside log.jsonl

    def __post_init__(self) -> None:
        require(bool(self.output_dir.strip()), "output_dir must not be empty")
        require(len(self.seeds) > 0, "seeds must name at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds has a value twice: {self.seeds}")
        require(len(set(self.report_to)) == len(self.report_to), f"report_to has a value twice: {self.report_to}")
        require(all(0 <= seed < 2**32 for seed in self.seeds), f"seeds must be in [0, 2**32), got {self.seeds}")
        require(
            self.dataloader_num_workers is None or self.dataloader_num_workers >= 0,
            f"dataloader_num_workers must be at least 0, got {self.dataloader_num_workers}",
        )
        attention = self.attn_implementation
        require(
            attention is None or re.fullmatch("[a-z0-9_]+", attention) is not None,
            f"attn_implementation must be a name like sdpa or flash_attention_2, got {attention!r}; kernels of the "
            "hub, which are code that is downloaded, are not used",
        )
        for task in self.tasks:
            require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", task) is not None,
                f"tasks.{task}: letters, digits, - and _ only",
            )
            known = [each.name for each in dataclasses.fields(StageConfig)] + list(TASK_FILES)
            for key in self.tasks[task]:
                require(key in known, f"tasks.{task}.{key} is unknown{suggestion(str(key), known)}")
            for stage in ("task_teacher", "task_lm", "task_soft_labels", *self.stages):
                self.stage(stage, task)
            task_files(self.tasks[task], f"tasks.{task}")
        for task in self.untrained_tasks:
            require(task in self.tasks, f"untrained_tasks: {task} is not among tasks{suggestion(task, self.tasks)}")
        require(
            not self.tasks or len(self.trained_tasks) > 0,
            "untrained_tasks names all tasks; leave one, or give tasks={}",
        )
        for task in self.teacher.tasks:
            require(task in self.tasks, f"teacher.tasks.{task} is not among tasks{suggestion(task, self.tasks)}")
        for key in ("mlm_probability", "num_maskings"):
            require(
                getattr(self.task_teacher, key) is None,
                f"task_teacher.{key} has no effect: a teacher is fine-tuned on clean inputs",
            )

        weights, sources = self.vocabulary.corpus_weights, self.data.corpus
        require(
            not weights or len(weights) == len(sources) > 1,
            f"vocabulary.corpus_weights has {len(weights)} numbers, data.corpus {len(sources)} sources; "
            "give one number for each of two or more, or none",
        )
        self._check_sweep()
        for name, corpus_stage in (
            ("pretraining", self.pretraining),
            ("teacher.pretraining", self.teacher.pretraining),
        ):
            require(
                corpus_stage is None
                or corpus_stage.train_sampling_strategy != "group_by_length"
                or self.data.messages_field is not None,
                f"{name}.train_sampling_strategy has no effect: the blocks of a corpus are of one length; remove it",
            )
            for key in ("max_steps", "max_length"):
                # Epochs would have to wait for the corpus to be counted; a plan is wanted before.
                given = corpus_stage is None or getattr(corpus_stage, key) is not None
                require(given, f"{name}.{key} is missing; a stage on the corpus needs it")

    @property
    def grid_points(self) -> list[GridPoint]:
        """Every combination of the sweep's values, by the keys' names; one that changes nothing without a sweep."""
        axes = {
            f"{stage}.{key}": self._swept(stage, key)
            for stage in sorted(self.sweep)
            for key in sorted(self.sweep[stage])
        }
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    @property
    def trained_tasks(self) -> dict[str, dict[str, Any]]:
        """The tasks without the untrained ones."""
        return {task: changes for task, changes in self.tasks.items() if task not in self.untrained_tasks}

    def stage(self, name: str, task: str | None = None, grid_point: GridPoint | None = None) -> StageConfig:
        """The settings of a stage, with what the task changes and then what the grid point of a sweep does."""
        others_settings = replace(self.task_soft_labels, mlm_probability=None, num_maskings=None)
        stage: StageConfig = getattr(self, name, others_settings)
        own = self.stages.get(name, {})
        # A teacher is fine-tuned on clean inputs, whatever the passes of its task are given.
        others = (*TASK_FILES, *(("mlm_probability", "num_maskings") if name == "task_teacher" else ()))
        changes = {key: value for key, value in self.tasks.get(task or "", {}).items() if key not in others}
        swept = {
            key.partition(".")[2]: value for key, value in (grid_point or {}).items() if key.startswith(f"{name}.")
        }
        of_task = f"tasks.{task}" if task else name
        for given, where in ((own, f"stages.{name}"), (changes, of_task), (swept, f"sweep.{name}")):
            each = dict(given)
            if "max_steps" in each and "num_train_epochs" not in each:
                each["num_train_epochs"] = None
            if "num_train_epochs" in each and "max_steps" not in each:
                each["max_steps"] = None
            stage = build(StageConfig, {**dataclasses.asdict(stage), **each}, where)
        require(
            stage.max_steps is not None or stage.num_train_epochs is not None,
            f"{name} needs max_steps or num_train_epochs",
        )
        return stage

    def key_of(self, stage: str) -> str:
        """Under which key the settings of a stage stand."""
        return stage if hasattr(self, stage) else f"stages.{stage}"

    def with_stage(self, name: str, **changes: Any) -> "RunConfig":
        """The config with other settings of a stage."""
        if hasattr(self, name):
            return replace(self, **{name: replace(getattr(self, name), **changes)})
        return replace(self, stages={**self.stages, name: {**self.stages.get(name, {}), **changes}})

    def _swept(self, stage: str, key: str) -> list[Any]:
        """The values of one axis as the stage has them: 1 is 1.0 where a number is wanted."""
        return [getattr(self.stage(stage, None, {f"{stage}.{key}": v}), key) for v in self.sweep[stage][key]]

    def _check_sweep(self) -> None:
        known = [each.name for each in dataclasses.fields(StageConfig) if each.name not in NOT_SWEPT]
        for stage, keys in self.sweep.items():
            require(
                stage not in (*NEVER_SWEPT, *RENAMED),
                f"sweep.{stage} is no stage that can be swept; those of the method on a task can: the teachers and the "
                "pretrained student are shared",
            )
            require(len(keys) > 0, f"sweep.{stage} names no setting; name one, or remove it")
            for key, values in keys.items():
                where = f"sweep.{stage}.{key}"
                require(key in known, f"{where} is no setting that can be swept{suggestion(str(key), known)}")
                require(len(values) > 1, f"{where} must list two or more values, got {values}")
                require(len(set(self._swept(stage, key))) == len(values), f"{where} has a value twice: {values}")
        require(not self.sweep or bool(self.tasks), "sweep has no effect without tasks; remove it")
        longest = max(len(grid_point_name(grid_point)) for grid_point in self.grid_points)
        require(
            longest <= 200,
            f"sweep: a grid point's folder would have a name of {longest} characters; sweep fewer settings",
        )
        for task, grid_point in itertools.product(self.tasks, self.grid_points):
            for stage in self.sweep:
                self.stage(stage, task, grid_point)


def grid_point_name(grid_point: GridPoint) -> str:
    """A grid point as its folder is called."""
    return ",".join(f"{key}={value}" for key, value in grid_point.items())
