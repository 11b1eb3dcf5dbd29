"""A run of flags in place of a YAML: a fine-tuned model and a file of texts and labels in, a student out.

values, said = run_of_flags(Flags(data="reviews.csv", text="body", label="stars", teacher="MODEL"))
config = load_config(values)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmd.commands.init_task import chosen, guesses, looked_at, text_guesses
from glmd.config import RunConfig
from glmd.data.tables import Place, open_split
from glmd.errors import ConfigError
from glmd.tasks.columns import MAX_LENGTH

KEEP_RATIO = 0.5
CORPUS_LENGTH = 512  # tokens of a block of the corpus, where nothing is said


@dataclass(frozen=True)
class Flags:
    """What `glmd run --data ...` and `glmd check --data ...` are given. Names are those of the options."""

    data: str | None = None  # a file of rows, or a data set of the hub
    teacher: str | None = None  # a model that was fine-tuned on the task; without one --base is, by the rows of data
    base: str | None = None  # the language model that it was made from
    text: str | None = None
    text_pair: str | None = None
    label: Sequence[str] = ()  # of several labels a column of 0 and 1 for each
    problem_type: str | None = None  # as `tasks` has it
    val: str | None = None
    corpus: Sequence[str] = ()  # text of any kind, for the stage on a corpus
    layers: int | None = None  # of the student; None: half of the teacher's
    keep_ratio: float | None = None
    output: str | None = None  # the run folder; None: runs/NAME, by the name of the data

    @property
    def given(self) -> list[str]:
        """The options that are given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value not in (None, ())]


def run_of_flags(flags: Flags) -> tuple[dict[str, Any], list[str]]:
    """The values of a run's config, and what was decided for the user, a line each.

    The method has the stages that the models allow: all of GLMD's with a language model and a corpus, those on the task
    with a language model alone, and with a fine-tuned model alone the last one, which learns its answers.
    Raises ConfigError naming the option.
    """
    from glmd.models.heads import is_encoder, task_class
    from glmd.models.loading import load_model_config, require_model

    teacher, base = flags.teacher, flags.base
    if flags.data is None:
        raise ConfigError("--data is missing: a csv, tsv, jsonl or Parquet file, or a data set of the hub")
    if teacher is None and base is None:
        raise ConfigError("--teacher is missing: a model fine-tuned on the task, or give a language model as --base")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(flags.data).stem).strip("._-") or "task"
    if teacher is not None:
        require_model(teacher, field="--teacher")
        if is_encoder(load_model_config(teacher)):
            return _run_of_sentences(flags, teacher, name)
    columns, said = _columns(flags, name)
    if teacher is not None and task_class(load_model_config(teacher)) is None:
        if base is not None:
            raise ConfigError(
                f"--teacher {teacher}: is no model of a task, as is needed beside --base; give one, or one of both"
            )
        teacher, base = None, teacher
    if base is not None:
        require_model(base, field="--base")
        found = task_class(load_model_config(base))
        if found is not None:
            raise ConfigError(
                f"--base {base}: holds a {found}, which predicts no words; give the language model that --teacher was "
                "made from, or leave it out"
            )
    model = base or teacher
    assert model is not None, "checked above"
    if base is None:
        if flags.corpus:
            raise ConfigError("--corpus has no effect without --base, the language model that --teacher was made from")
        said.append(
            f"{teacher} predicts no words, so the stages of word prediction are left out; with --base MODEL, the "
            "language model that it was made from, the student learns from these too"
        )
    elif teacher is None:
        said.append(f"{base} is fine-tuned on {flags.data} first; --teacher names a model that has learned it already")
    else:
        said.append(f"task_lm: the words are predicted by the LM head of {base} on the layers of {teacher}")
    if base is not None and not flags.corpus:
        said.append("there is no --corpus of text, so the stage on a corpus is left out")
    method = "soft-labels" if base is None else "glmd" if flags.corpus else "glmd-no-pretraining"
    values, of_model = _values(flags, model, name, method, {**columns, "problem_type": flags.problem_type})
    if base and teacher:
        values["teacher"]["tasks"] = {name: teacher}
    if flags.corpus:
        values["data"] = {"corpus": list(flags.corpus)}
    return values, said + of_model


def _values(
    flags: Flags, model: str, name: str, method: str, columns: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What all runs of flags have, and what is said of the model's lengths."""
    from glmd.models.layers import depths
    from glmd.models.loading import load_model_config, model_positions
    from glmd.models.student import fitting_initialization

    model_config = load_model_config(model)
    layers = flags.layers or max(1, depths(model_config)[0] // 2)
    how = fitting_initialization(model_config, layers)
    ratio = KEEP_RATIO if flags.keep_ratio is None else flags.keep_ratio
    files: dict[str, Any] = {"train": flags.data, "text_pair": flags.text_pair, "val": flags.val, **columns}
    values: dict[str, Any] = {
        "output_dir": flags.output or f"runs/{name}",
        "method": method,
        "teacher": {"model": model},
        "student": {"num_hidden_layers": layers} | ({} if how == "uniform" else {"initialization": how}),
        "vocabulary": {"keep_ratio": ratio},
        "tasks": {name: {key: value for key, value in files.items() if value is not None}},
    }
    positions, said = model_positions(model_config), []
    if positions is not None and positions < MAX_LENGTH:
        values["tasks"][name]["max_length"] = positions
        said.append(f"texts are read up to {positions} tokens, for which {model} has positions")
    if positions is not None and positions < CORPUS_LENGTH and flags.corpus:
        values["pretraining"] = {"max_length": positions}
    return values, said


def _run_of_sentences(flags: Flags, teacher: str, name: str) -> tuple[dict[str, Any], list[str]]:
    """The same of a sentence encoder, which needs no labels: `--label` is that of val's similarities."""
    for option, given in (("--base", flags.base), ("--corpus", flags.corpus)):
        if given:
            raise ConfigError(f"{option} has no effect: {teacher} is a sentence encoder, which predicts no words")
    text, said = flags.text, []
    if text is None and Path(str(flags.data)).suffix.lower() == ".txt":
        text = "text"
    elif text is None:
        _, found = looked_at(open_split(str(flags.data), "train", Place(name)))
        texts = text_guesses(found, str(flags.data), others={flags.text_pair, *flags.label})
        text, said = texts[0], [chosen("text", texts, None)]
    label = next(iter(flags.label), None) if len(flags.label) < 2 else list(flags.label)
    columns = {"text": text, "label": label, "problem_type": flags.problem_type}
    values, of_model = _values(flags, teacher, name, "embeddings", columns)
    values["controls"] = {"hard_labels": False}
    return values, said + of_model


def student_of_flags(config: RunConfig) -> str:
    """The student of a run of flags, with what keys have changed, in a line."""
    kept = config.vocabulary.keep_ratio
    size = f"{config.vocabulary.size:,} tokens" if kept is None else f"{kept:.0%} of the tokens (--keep-ratio)"
    layers = config.student.num_hidden_layers
    return f"the student: {layers} layers (--layers), {size}; method {config.method}; in {config.output_dir}"


def _columns(flags: Flags, name: str) -> tuple[dict[str, Any], list[str]]:
    """The columns of text and label, guessed where they are not given, and what is said of a guess."""
    label = list(flags.label) if len(flags.label) > 1 else next(iter(flags.label), None)
    if flags.text is not None and label is not None:
        return {"text": flags.text, "label": label}, []
    if isinstance(label, list):
        raise ConfigError(f"--text is missing: the column that the model reads, beside those of {len(label)} labels")
    assert flags.data is not None, "checked before"
    _, found = looked_at(open_split(flags.data, "train", Place(name)))
    given: dict[str, Any] = {"text": flags.text, "text_pair": flags.text_pair, "label": label}
    texts, labels = guesses(found, flags.data, **given, problem_type=flags.problem_type)
    said = [chosen("text", texts, flags.text), chosen("label", labels, label)]
    return {"text": texts[0], "label": labels[0]}, [line for line in said if "a guess" in line]
