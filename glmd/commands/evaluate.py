"""Score a folder on a task or on text, and write its answers."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accelerate import Accelerator

from glmd.data.batches import Collate
from glmd.data.conversations import ConversationReader
from glmd.data.corpus import read_documents
from glmd.data.tables import READ_FROM, ROW_SUFFIXES, TEXT_SUFFIXES, Split
from glmd.errors import ConfigError, DataError, ModelError
from glmd.evaluation.answers import require_answerable, write_answers
from glmd.evaluation.bits_per_byte import _bytes, score_conversations, score_text
from glmd.evaluation.leaderboard import require_idx, with_idx, write_predictions
from glmd.evaluation.metrics import constant_answers, score
from glmd.evaluation.scoring import answers_of, predict
from glmd.models.card import told_by_card
from glmd.models.heads import lm_kind
from glmd.models.loading import load_model_as_saved, load_model_config, model_positions, require_model
from glmd.models.probes import prove_causal, require_length
from glmd.models.source_tokenizer import leave_out_tokens_without_rows
from glmd.public import public
from glmd.runtime.memory import USABLE, forward_bytes, memory_of_this_machine
from glmd.storage import write_problem
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import TaskExample, read_split
from glmd.tasks.forms import problem_of, task_form, warn_of_unnamed_classes
from glmd.tasks.loading import load_classifier
from glmd.tasks.tasks import Task, load_task
from glmd.tasks.told import task_of_classes, told_task
from glmd.vocabulary.tokenizer import load_tokenizer, require_fast, stock_tokenizer

logger = logging.getLogger(__name__)
LANGUAGE_MODELS = (
    "MaskedLM",
    "CausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForBlankInfilling",
)  # in names of architectures


@public
def evaluate_folder(
    model: str | Path,
    task_name: str | Path | None,
    data: str | Path,
    split: Split = "val",
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    stock: bool = False,
) -> dict[str, float | str]:
    """Casting, counts and metrics of a task model on a task's split, with the folder's own tokenizer.

    task_name: of a task that comes with glmd, or the YAML of one; None for what the model's card tells. max_length:
        None for the folder's own, by its card, else the task's, as far as the model's positions go.
    stock: read a compressed model's text as plain AutoTokenizer does without glmd.
    Raises GlmdError where task, data and model do not fit, or where a compressed model would be scored with a
    tokenizer that is not exact.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split must be one of {', '.join(get_args(Split))}; got {split!r}")
    task = _task_for(str(model), task_name)
    length = _length(str(model), task, max_length)
    examples = read_split(task, str(data), split, require_labels=True)
    score(task, constant_answers(task, examples)[0], examples)  # what cannot be scored is refused before it is run
    logits, truncated = _logits(str(model), task, examples, length, batch_size, stock=stock)
    return {
        "casting": task.casting,
        "examples": len(examples),
        "max_length": length,
        "truncated": truncated,
        **score(task, answers_of(task, logits), examples),
    }


def predicted_file(file: str | Path) -> Path:
    """Where the answers to the rows of a file go if nobody says so: new.predicted.csv for new.csv."""
    path = Path(file)
    if path.suffix.lower() not in TEXT_SUFFIXES:
        raise ConfigError(f"--output is missing, which only for a .csv or .tsv follows from --file {path}; give it")
    return path.with_name(f"{path.stem}.predicted{path.suffix}")


@public
def predict_file(
    model: str | Path,
    task_name: str | Path | None,
    file: str | Path,
    output: str | Path | None = None,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
) -> int:
    """Write the answers of a task model to the rows of a file, which need no labels. Returns their number.

    task_name: None for what the model's card tells. text, text_pair: in place of a task, the columns that it reads.
    output: .csv or .tsv, of a file of these, for its rows with a column `prediction` (a label of the task) and one
        `score` (its probability: the softmax of the model's logits); None for new.predicted.csv beside new.csv. Any
        other name for the leaderboard's form.
    Raises GlmdError as `evaluate_folder` does.
    """
    model, file = str(model), str(file)
    output = predicted_file(file) if output is None else Path(output)
    task = _task_for(model, task_name, text, text_pair)
    length = _length(model, task, max_length)
    if not file.lower().endswith(ROW_SUFFIXES):
        raise DataError(f"--file {file}: {READ_FROM}; convert it to one of them")
    problem = "exists already" if output.exists() else write_problem(output.parent)
    if problem is not None:
        raise DataError(f"--output {output}: {problem}; choose another")
    table = require_answerable(task, file, output) if output.suffix.lower() in TEXT_SUFFIXES else None
    is_plain = task.rows == "flat" and not task.is_choice  # then whatever labels the rows have are not looked at
    unlabeled = replace(task, label_field="", label_fields=()) if is_plain else task
    examples = read_split(unlabeled, file, "test", require_labels=False)
    if table is None:
        examples = with_idx(task, examples)
        require_idx(task, examples)
    logits, _ = _logits(model, task, examples, length, batch_size)
    if table is None:
        write_predictions(task, answers_of(task, logits), examples, output)
    else:
        write_answers(task, logits, examples, table, output)
    return len(examples)


def _length(model: str, task: Task, asked: int | None) -> int:
    """Tokens that a model reads of an example at most: as asked for, else as its card says, else the task's.

    Raises GlmdError for more than the model has positions for; what was not asked for follows them.
    """
    if asked is not None and asked < 8:
        raise ConfigError(f"--max-length {asked}: so few tokens leave no room for text; give at least 8")
    positions = model_positions(load_model_config(model))
    if asked is not None and positions is not None and asked > positions:
        raise ModelError(
            f"{model}: {asked} tokens are more than its {positions} positions; give --max-length {positions}"
        )
    if asked is not None:
        return asked
    told = told_by_card(Path(model))[1].get("max_length", "")
    length = int(told) if told.isascii() and told.isdigit() and int(told) >= 8 else task.max_length
    chosen = min(length, positions or length)
    if chosen != task.max_length:
        why = "its card says" if chosen == length else f"it has {positions} positions"
        logger.info("%s: reads %d tokens of an example, as %s; --max-length gives another", model, chosen, why)
    return chosen


def _require_batch(model: str, batch_size: int, examples: list[TaskExample], length: int) -> None:
    """Refuse a batch that the memory of this machine cannot take, by what a layer needs at least."""
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: give at least 1")
    choices = max((len(each.texts) for each in examples), default=1)
    fits = int(USABLE * memory_of_this_machine() // (choices * forward_bytes(load_model_config(model), length)))
    if min(batch_size, len(examples)) > max(1, fits):
        raise ConfigError(f"--batch-size {batch_size:,}: of {length} tokens about {fits:,} fit; give at most {fits:,}")


def _task_for(model: str, task_name: str | Path | None, text: str | None = None, text_pair: str | None = None) -> Task:
    """The task, where the model has its head: found out before any data is read."""
    named = load_task(task_name) if task_name is not None else None
    if text_pair is not None and text is None:
        raise ConfigError("--text-pair has no effect without --text, the column of the first text; give it")
    if text is not None and named is not None:
        raise ConfigError("--text and --task are both given; keep one")
    require_model(model, field="model")
    config = load_model_config(model)
    task = named or _told(model, config, text, text_pair)
    if any(head in architecture for architecture in config.architectures or () for head in LANGUAGE_MODELS):
        try:
            task = load_task(task_name or task.name, "cloze")
        except ConfigError as error:
            raise ModelError(f"{model}: is a language model without a task head ({error})") from None
    form = task_form(task, kind=lm_kind(config))
    form.require(config, model)
    warn_of_unnamed_classes(config, form, model)
    if named is None:
        logger.info("%s: is asked as its task %s, which reads %s", model, task.name, " and ".join(task.fields))
    return task


def _told(model: str, config: Any, text: str | None, text_pair: str | None) -> Task:
    """The task of a model that nobody names: by its card, or by its classes and the columns that it shall read."""
    classes = [str(config.id2label[i]) for i in sorted(config.id2label)]
    try:
        if text is not None:
            return task_of_classes(classes, text, text_pair, problem_of(config))
        task = told_task(told_by_card(Path(model))[1], classes)
    except ConfigError as error:
        raise ModelError(f"{model}: {error}") from None
    if task is None:
        raise ConfigError(f"--task is missing, and the card of {model} tells none that is known; give it")
    return task


def _logits(
    model: str, task: Task, examples: list[TaskExample], max_length: int, batch_size: int, *, stock: bool = False
) -> tuple[np.ndarray, int]:
    """(examples, C) scores of labels or choices, and how many inputs were cut."""
    _require_batch(model, batch_size, examples, max_length)
    tokenizer = load_tokenizer(model)
    leave_out_tokens_without_rows(tokenizer, model, load_model_config(model))
    if stock:
        if not getattr(tokenizer, "is_exact", False):
            raise ModelError(f"--tokenizer stock has no effect: {model} has no other tokenizer; remove it")
        tokenizer = stock_tokenizer(tokenizer)
    classifier = load_classifier(model, task)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    form = task_form(task, kind=lm_kind(classifier.config))
    dataset = TaskDataset(examples, form, tokenizer, max_length=max_length)
    collate = Collate(tokenizer.pad_token_id or 0)  # a decoder may have none; what stands there is masked
    classifier.to(accelerator.device)
    # The folder's tokenizer gives the model's own ids, so there is nothing to map.
    options: dict[str, Any] = {"accelerator": accelerator, "batch_size": batch_size, "name": model}
    return predict(classifier, dataset, collate, token_map=None, **options), dataset.truncated


MAX_LENGTH = 1024  # tokens that a model reads at once, if it can and nothing else is asked


@public
def evaluate_text(
    model: str | Path,
    sources: str | Path | Sequence[str | Path],
    *,
    max_length: int | None = None,
    messages_field: str | None = None,
) -> dict[str, float]:
    """Sizes and bits per byte of a causal LM, a folder or hub id, on text files; weights are read as float32.

    messages_field: the field of the files' rows that holds conversations, in place of texts. They are rendered by the
        folder's own chat template, and scored by role where that can be told.
    Raises GlmdError where the model is no causal LM, cannot read max_length tokens, or the files hold no text.
    """
    model = str(model)
    files = [str(each) for each in ([sources] if isinstance(sources, (str, Path)) else sources)]
    require_model(model, field="model")
    config = load_model_config(model)
    if lm_kind(config) != "causal":
        held = ", ".join(config.architectures or ()) or "model of no named class"
        raise ModelError(f"{model}: holds a {held}; bits per byte need a causal LM (a task model: --task)")
    positions = model_positions(config)
    length = max_length or min(MAX_LENGTH, positions or MAX_LENGTH)
    if positions is not None and length > positions:
        raise ModelError(f"{model}: {length} tokens, but it has {positions} positions; give --max-length {positions}")
    tokenizer = load_tokenizer(model)
    require_fast(tokenizer)
    leave_out_tokens_without_rows(tokenizer, model, config)
    conversations = _conversations(files, tokenizer, messages_field, model) if messages_field is not None else []
    texts = [text for text, _ in conversations] or [text for text in read_documents(files) if text.strip()]
    if not texts:
        raise DataError(f"{', '.join(files)}: no text")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    # Folders that hold the same weights in other precisions shall give the same figure.
    language_model = load_model_as_saved(model).float()
    prove_causal(language_model)
    require_length(language_model, length)
    language_model.to(accelerator.device)
    sizes = {"documents": len(texts), "bytes": _bytes(texts), "max_length": length}
    options: dict[str, Any] = {"max_length": length, "accelerator": accelerator}
    if conversations:
        return sizes | score_conversations(language_model, tokenizer, conversations, **options)
    return sizes | score_text(language_model, tokenizer, texts, **options)


def _conversations(
    files: Sequence[str], tokenizer: Any, field: str, model: str
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Each conversation of the files as the tokenizer's template writes it, and where an assistant speaks in it."""
    reader = ConversationReader(tokenizer, field, loss_on="all", name=model)
    found = reader.texts(list(reader.read(files)))
    if reader.is_placed:
        return found
    logger.info("scores are not given by role: %s", reader.unplaced)
    return [(text, []) for text, _ in found]
