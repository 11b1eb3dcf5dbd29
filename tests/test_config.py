"""A run's YAML, read strictly: what it says is what the run gets, or one line says why not."""

from dataclasses import asdict, replace

import pytest

from glmd.config import RunConfig
from glmd.config_file import differences, dump_config, load_config, to_dict
from glmd.errors import ConfigError
from glmd.stage_config import StageConfig
from glmd.strict_yaml import MAX_BYTES, parse_yaml

MINIMAL = "output_dir: out\nteacher: some/model\nvocabulary: {keep_ratio: 0.5}\n"


@pytest.fixture
def load(write):
    """`load("pretraining: {max_steps: 3}", "seeds=[1]")`: a minimal run with these lines and overrides."""

    def load_text(text: str = "", *overrides: str, base: str = MINIMAL) -> RunConfig:
        return load_config(write("run.yaml", base + text), overrides)

    return load_text


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- YAML ---------------------------------------------------------------------------------------------------------


def test_duplicate_key_is_refused_with_its_line(load):
    message = refusal(load, "pretraining:\n  max_steps: 3\n  max_steps: 4\n")
    assert message.endswith("run.yaml: line 6: key 'max_steps' stands twice; keep one")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temprature: 15", "run.yaml: temprature is unknown; known: "),
        ("methd: kd", "run.yaml: methd is unknown; did you mean method?"),
        ("pretraining: {learning_rte: 1}", "run.yaml: pretraining.learning_rte is unknown; did you mean learning_rate"),
        ("data: {corpora: [a]}", "run.yaml: data.corpora is unknown; did you mean corpus?"),
        ("student: {layers: 3}", "run.yaml: student.layers is unknown; "),
        ("tasks: {RTE: {epochs: 3}}", "run.yaml: tasks.RTE.epochs is unknown; "),
        ("tasks: {RTE: {num_epochs: 3}}", "run.yaml: tasks.RTE.num_epochs is unknown; did you mean num_train_epochs?"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(load, text, expected):
    assert expected in refusal(load, text + "\n")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+1e-4", "0.0001", ".0001", "1.0e-04"])
def test_every_spelling_of_a_float_is_a_float(load, text):
    assert load(f"pretraining: {{learning_rate: {text}}}\n").pretraining.learning_rate == 1e-4
    assert load("", f"pretraining.learning_rate={text}").pretraining.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["1e-4x", "1e", "e4", "1-4", "v1e-4"])
def test_what_only_looks_like_a_float_stays_text(text):
    assert parse_yaml(text, "here") == text


def test_no_and_yes_are_words_and_true_is_a_truth_value(load):
    """YAML 1.1 reads `no` as false: mixed_precision: no would be refused, and labels [no, yes] be truth values."""
    assert load("mixed_precision: no\n").mixed_precision == "no"
    assert load("", "mixed_precision=no").mixed_precision == "no"
    assert parse_yaml("[no, yes, on, off, y, n]", "here") == ["no", "yes", "on", "off", "y", "n"]
    assert parse_yaml("[true, True, false, FALSE]", "here") == [True, True, False, False]
    assert refusal(load, "elastic: no\n").endswith("elastic must be true or false, got 'no'")


def test_aliases_are_refused(load):
    assert "line 4: aliases (*name) are not supported" in refusal(
        load, "student: {config: &a {}}\nseeds: *a\n", base="\n\n"
    )
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\n"
    assert "aliases" in refusal(parse_yaml, bomb, "here")


def test_code_in_yaml_is_refused(load):
    assert "not valid YAML" in refusal(load, "method: !!python/object/apply:os.getcwd []\n")


def test_a_file_that_is_too_large_is_refused_unread(load):
    assert f"has at most {MAX_BYTES} bytes" in refusal(load, "#" * MAX_BYTES)


def test_no_more_of_a_huge_file_is_read_than_a_configuration_may_have(tmp_path):
    with (tmp_path / "run.yaml").open("wb") as file:
        file.truncate(10**12)  # a terabyte of nothing
    with pytest.raises(ConfigError, match="has at most"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- a list\n", "a mapping of keys to values is needed, got list"),
        (b"", "a mapping of keys to values is needed, got nothing"),
        (b"output_dir: [1\n", "not valid YAML"),
        (b"output_dir: \xff\n", "not UTF-8 at byte 12"),
        (b"1: a\n", "key 1 is not text; quote it"),
        (b"teacher: a\n", "output_dir is missing"),
        (b"a: " + b"[" * 5000, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, expected):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    message = refusal(load_config, path)
    assert message.startswith(str(path)) and expected in message


def test_a_missing_file_and_an_unknown_name_are_refused(tmp_path):
    assert "no such file" in refusal(load_config, tmp_path / "absent.yaml")
    assert "run 'minilm-superglu' is unknown; did you mean minilm-superglue?" in refusal(load_config, "minilm-superglu")


# --- Types and ranges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pretraining: {max_steps: 3.5}", "pretraining.max_steps must be a whole number, got 3.5"),
        ("pretraining: {max_steps: true}", "pretraining.max_steps must be a whole number, got True"),
        ("pretraining: {max_steps: '3'}", "pretraining.max_steps must be a whole number, got '3'"),
        ("pretraining: {max_steps: 0}", "pretraining.max_steps must be in [1, 1,000,000,000], got 0"),
        ("pretraining: {learning_rate: fast}", "pretraining.learning_rate must be a number, got 'fast'"),
        ("pretraining: {learning_rate: .inf}", "pretraining.learning_rate must be in (0, 10], got inf"),
        ("pretraining: {learning_rate: .nan}", "pretraining.learning_rate must be in (0, 10], got nan"),
        ("pretraining: {learning_rate: -1e-4}", "pretraining.learning_rate must be in (0, 10], got -0.0001"),
        ("pretraining: {warmup_ratio: 1.1}", "pretraining.warmup_ratio must be in [0, 1], got 1.1"),
        ("pretraining: {mlm_probability: 1}", "pretraining.mlm_probability must be in [0, 1), got 1.0"),
        ("pretraining: {max_length: 4}", "pretraining.max_length must be in [8, 1,000,000], got 4"),
        ("pretraining: {max_length: null}", "pretraining.max_length is missing"),
        ("pretraining: {num_train_epochs: 2}", "pretraining.max_steps is missing"),
        ("pretraining: 3", "pretraining: a mapping is needed, got 3"),
        ("task_soft_labels: {save_steps: 0}", "task_soft_labels.save_steps must be in [1, 1,000,000,000], got 0"),
        ("task_soft_labels: {lr_scheduler_type: cosin}", "lr_scheduler_type must be one of linear, cosine, constant"),
        ("task_soft_labels: {max_steps: 3, num_train_epochs: 1}", "max_steps and num_train_epochs are both given"),
        ("tasks: [RTE]\ntask_lm: {num_train_epochs: null}", "task_lm needs max_steps or num_train_epochs"),
        ("task_teacher: {mlm_probability: 0.15}", "task_teacher.mlm_probability has no effect"),
        ("task_teacher: {num_maskings: 2}", "task_teacher.num_maskings has no effect"),
        (
            "pretraining: {train_sampling_strategy: group_by_length}",
            "pretraining.train_sampling_strategy has no effect: the blocks of a corpus are of one length",
        ),
        ("task_lm: {train_sampling_strategy: sorted}", "must be one of random, group_by_length"),
        ("pretraining: {num_maskings: 0}", "pretraining.num_maskings must be in [1, 10,000], got 0"),
        ("tasks: {RTE: {learning_rate: fast}}", "tasks.RTE.learning_rate must be a number, got 'fast'"),
        ("tasks: {RTE: {train: 3}}", "tasks.RTE.train must be text, got 3"),
        ("tasks: {../RTE: {}}", "tasks.../RTE: letters, digits, - and _ only"),
        ("tasks: 3", "tasks must be a mapping, got 3"),
        ("seeds: []", "seeds must name at least one seed"),
        ("seeds: [1, 1]", "seeds has a value twice: [1, 1]"),
        ("seeds: [-1]", "seeds must be in [0, 2**32), got [-1]"),
        ("seeds: 3", "seeds must be a list, got 3"),
        ("seeds: [a]", "seeds[0] must be a whole number, got 'a'"),
        ("controls: {hard_labels: 1}", "controls.hard_labels must be true or false, got 1"),
        ("student: {initialization: lst}", "student.initialization must be one of uniform"),
        ("student: {initialization: [a]}", "student.initialization[0] must be a whole number, got 'a'"),
        ("student: {config: {vocab_size: 3}}", "student.config.vocab_size is set by glmd; remove it"),
        ("data: {synthetic: true, corpus: [a]}", "synthetic makes its own corpus and tasks"),
        ("selection: first", "selection must be one of last, best, agreement; got 'first'"),
        ("report_to: [csv]", "report_to[0] must be one of tensorboard, wandb, trackio; got 'csv'"),
        ("dataloader_num_workers: -1", "dataloader_num_workers must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_with_key_and_value(load, text, expected):
    message = refusal(load, text + "\n")
    assert "run.yaml: " in message and expected in message


@pytest.mark.parametrize("ratio", ["0", "-0.5", "1.5", ".nan", ".inf"])
def test_keep_ratio_is_in_zero_to_one(load, ratio):
    message = refusal(load, "", f"vocabulary.keep_ratio={ratio}")
    assert "vocabulary.keep_ratio must be in (0, 1], got" in message
    assert load("", "vocabulary.keep_ratio=1").vocabulary.keep_ratio == 1.0


def test_keep_ratio_and_size_exclude_each_other(load):
    assert "keep_ratio and size are both given; keep one" in refusal(load, "", "vocabulary.size=100")


def test_words_to_keep_may_stand_in_a_file(load, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("yes\n\n two words \nnaïve\n", encoding="utf-8")
    assert load("", f"vocabulary.keep_words={words}").vocabulary.keep_words == ["yes", "two words", "naïve"]
    words.write_bytes(b"\xff")
    assert "cannot be read (no UTF-8)" in refusal(load, "", f"vocabulary.keep_words={words}")
    words.write_text("\n")
    assert "holds no word" in refusal(load, "", f"vocabulary.keep_words={words}")


def test_a_fine_tuned_teacher_must_be_for_a_task_of_the_run(load):
    text = "tasks: [RTE, BoolQ]\n"
    message = refusal(load, text, "teacher.tasks.BolQ=some/classifier")
    assert "teacher.tasks.BolQ is not among tasks; did you mean BoolQ?" in message
    assert load(text, "teacher.tasks.BoolQ=some/classifier").teacher.tasks == {"BoolQ": "some/classifier"}


def test_scratch_and_its_training_belong_together(load):
    assert "scratch and pretraining belong together" in refusal(load, "", "teacher={scratch: {hidden_size: 8}}")


# --- Overrides, defaults, tasks -----------------------------------------------------------------------------------


def test_overrides_are_dotted_yaml_values_and_the_last_one_counts(load):
    config = load(
        "pretraining: {max_steps: 3}\n",
        "pretraining.max_steps=5",
        "pretraining.max_steps=7",
        "student.config={hidden_dropout_prob: 0.0}",
        "student.config.hidden_act=relu",
        "seeds=[3, 4]",
        "student.num_hidden_layers=",
        "data.corpus=one.txt",
    )
    assert config.pretraining.max_steps == 7
    assert config.student.config == {"hidden_dropout_prob": 0.0, "hidden_act": "relu"}
    assert config.seeds == [3, 4] and config.student.num_hidden_layers is None
    assert config.data.corpus == ["one.txt"]


def test_overrides_may_be_a_mapping(write):
    path = write("run.yaml", MINIMAL)
    assert load_config(path, {"pretraining.max_steps": 5, "seeds": [2]}) == load_config(
        path, ["pretraining.max_steps=5", "seeds=[2]"]
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretraining", "override 'pretraining': write key=value"),
        ("=3", "override '=3': write key=value"),
        ("a b=3", "override 'a b=3': write key=value"),
        ("seeds=[1", "override seeds:1: not valid YAML"),
        ("method.name=kd", "method.name"),
        ("pretraning.max_steps=3", "override pretraning is unknown; did you mean pretraining?"),
        ("student.confg.x=3", "override student.confg is unknown; did you mean config?"),
        ("output_dir=", "output_dir must be text, got None"),
        ("output_dir=' '", "output_dir must not be empty"),
    ],
)
def test_an_override_that_cannot_be_is_refused(load, override, expected):
    assert expected in refusal(load, "method: kd\n", override)


def test_teacher_override_replaces_the_model_and_keeps_how_it_is_loaded(load):
    base = "output_dir: out\nteacher: {model: a, dtype: bfloat16, tasks: {RTE: fine}}\ntasks: [RTE]\n"
    teacher = load("", "teacher=b", base=base).teacher
    assert (teacher.model, teacher.dtype, teacher.tasks) == ("b", "bfloat16", {"RTE": "fine"})
    scratch = "output_dir: out\nteacher: {scratch: {hidden_size: 8}, pretraining: {max_steps: 1, max_length: 8}}\n"
    teacher = load("", "teacher=b", base=scratch).teacher
    assert (teacher.model, teacher.scratch, teacher.pretraining) == ("b", None, None)
    assert load("", "teacher.dtype=float16").teacher == replace(load().teacher, dtype="float16")


def test_a_stage_changes_its_own_defaults(load):
    """`pretraining: {max_steps: 3}` keeps the cosine of pretraining, it does not fall back to those of tasks."""
    given, default = load("pretraining: {max_steps: 3}\n").pretraining, load().pretraining
    assert given == replace(default, max_steps=3)
    assert (default.lr_scheduler_type, default.learning_rate, default.adam_beta2) == ("cosine", 4e-4, 0.98)
    assert load().task_soft_labels == StageConfig(num_train_epochs=10.0)


def test_max_steps_replaces_the_default_epochs_and_the_other_way_round(load):
    config = load("task_soft_labels: {max_steps: 5}\ntasks: {RTE: {max_steps: 7}, CB: {num_train_epochs: 2}}\n")
    assert (config.task_soft_labels.max_steps, config.task_soft_labels.num_train_epochs) == (5, None)
    stage = config.stage("task_soft_labels", "RTE")
    assert (stage.max_steps, stage.num_train_epochs) == (7, None)
    stage = config.stage("task_soft_labels", "CB")
    assert (stage.max_steps, stage.num_train_epochs) == (None, 2.0)


def test_tasks_are_a_list_or_a_mapping(load):
    as_list = load("tasks: [RTE, CB]\n")
    assert as_list == load("tasks: {RTE: {}, CB: {}}\n") == load("tasks: {RTE: , CB: }\n")
    assert as_list.tasks == {"RTE": {}, "CB": {}}
    changed = load("tasks: [RTE, CB]\n", "tasks.CB.learning_rate=1e-3")
    assert changed.tasks == {"RTE": {}, "CB": {"learning_rate": 1e-3}}


def test_a_task_changes_every_task_stage_and_nothing_else(load):
    config = load("tasks: {RTE: {learning_rate: 1e-3, train: a.jsonl}, CB: {}}\n")
    for name in ("task_teacher", "task_lm", "task_soft_labels"):
        assert config.stage(name, "RTE") == replace(getattr(config, name), learning_rate=1e-3)
        assert config.stage(name, "CB") == config.stage(name) == getattr(config, name)


# --- Writing and comparing ----------------------------------------------------------------------------------------


def test_a_dumped_config_is_read_back_equal(load, write):
    text = """tasks: {RTE: {learning_rate: 1e-7, val: "a: b.jsonl"}, CB: {max_steps: 3}}
student: {initialization: [1, 2], num_hidden_layers: 2, config: {hidden_dropout_prob: 0}}
seeds: [0, 4294967295]
mixed_precision: no
report_to: [tensorboard]
data: {corpus: ["ä # not a comment", "1e5"], superglue: "yes"}
"""
    config = load(text, "vocabulary.keep_words=[no, '1', ä]", "teacher.tasks.RTE=fine")
    again = load_config(write("again.yaml", dump_config(config)))
    assert again == config
    assert dump_config(again) == dump_config(config)
    assert to_dict(config) == asdict(config)


def test_differences_name_every_leaf_old_and_new():
    old = {"a": 1, "b": {"c": [1, 2], "save_steps": 5, "gone": "x"}, "tasks": {"RTE": {}}}
    new = {"a": 2, "b": {"c": [1, 3], "save_steps": 6, "new": None}, "tasks": {}}
    assert differences(old, old) == []
    assert differences(old, new, ignore=("tasks", "*.save_steps")) == [
        "a: 1 -> 2",
        "b.c: [1, 2] -> [1, 3]",
        "b.gone: 'x' -> None",
    ]
    assert differences(old, new, ignore=("a", "b")) == ["tasks.RTE: {} -> None"]
    assert differences({"ab": 1}, {"ab": 2}, ignore=("a", "*.b")) == ["ab: 1 -> 2"]


def test_a_learning_rate_beyond_reason_is_refused():
    StageConfig(max_steps=1, learning_rate=10.0)
    with pytest.raises(ConfigError, match=r"learning_rate must be in \(0, 10\], got 11"):
        StageConfig(max_steps=1, learning_rate=11.0)


def test_a_folder_or_another_file_given_as_config_is_named_as_what_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for path, what in ((tmp_path, "a folder"), (tmp_path / "notes.txt", "a file of another name")):
        with pytest.raises(
            ConfigError, match=f"{path} is {what}; give a .yaml file, or the name of one in configs/runs"
        ):
            load_config(str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task_words: {max_steps: 1}", "task_words is unknown; it is called task_lm since 0.2"),
        ("task_labels: {max_steps: 1}", "task_labels is unknown; it is called task_soft_labels since 0.2"),
        ("student: {initialisation: first}", "student.initialisation is unknown; it is called initialization since"),
        ("data: {world: true}", "data.world is unknown; it is called synthetic since 0.2"),
        ("teacher: {cache: c, cache_bits: 8}", "cache_bits is unknown; it is gone since 0.2: a cache keeps"),
        ("gkd_compat: true", "gkd_compat is unknown; it is gone since 0.2: it is an option of a term"),
        ("vocabulary: {teacher_mass: renormalise}", "must be one of renormalize, merge; got 'renormalise'"),
        ("task_lm: {train_sampling_strategy: batch_rebalance}", "random, group_by_length; got 'batch_rebalance'"),
        (
            "sweep: {task_labels: {learning_rate: [1, 2]}}",
            "sweep.task_labels is no stage that can be swept; those of the method",
        ),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_the_name_of_today(write, text, says):
    message = refusal(load_config, write("run.yaml", f"output_dir: o\n{text}\n"))
    assert says in message and "\n" not in message


def test_a_value_that_an_override_gave_is_refused_as_the_overrides(load):
    message = refusal(load, "pretraining: {warmup_ratio: 0.1}\n", "pretraining.warmup_ratio=2")
    assert message == "override pretraining.warmup_ratio must be in [0, 1], got 2.0"
    assert "run.yaml: pretraining.warmup_ratio" in refusal(load, "pretraining: {warmup_ratio: 2}\n", "seeds=[1]")
