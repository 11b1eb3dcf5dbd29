"""A small student with drawn weights, tried in `check` in all that a run would do with it.

    try_student(config.student, teacher_config, length=128, task_heads={"MultipleChoice"})

The architecture is the student's own; it has few tokens, so that even one of a large model takes a second. What this
refuses would be refused by a run too, days later.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from glmd.config import StudentConfig
from glmd.errors import ConfigError, ModelError
from glmd.models.attention import prove_implementation, set_attention
from glmd.models.attention_calls import prove_attention
from glmd.models.heads import share_backbone
from glmd.models.layers import depths
from glmd.models.loading import base_class
from glmd.models.probes import prove_config, prove_model, prove_task_model, prove_texts_apart
from glmd.models.student import student_model_config
from glmd.vocabulary.renumbering import renumber_config, token_id_fields
from glmd.vocabulary.vocabulary import Vocabulary

TOKENS = 64  # besides special ones


def try_student(
    student: StudentConfig,
    teacher_config: Any,
    *,
    length: int,
    task_heads: Iterable[str] = (),
    is_whole: bool = False,
    needs: Collection[str] = (),
    attention: str | None = None,
    packs: bool = False,
) -> None:
    """Refuse what a student cannot be trained, scored or exported as. Raises ConfigError, one line.

    length: the most tokens that it reads at once.
    task_heads: of the tasks, SequenceClassification or MultipleChoice; each shares its backbone with the LM head.
    is_whole: the student keeps every row, so that its ids stay and need not be known.
    needs: what is compared with the teacher's, by the names of `distillation.signals`. attention: by which code it is
        trained, `attn_implementation`. packs: conversations share a row.
    """
    import transformers

    few = _with_few_tokens(teacher_config, is_whole=is_whole)
    config = student_model_config(few, student)
    of_base: Any = base_class(config)
    try:
        inside = "attention_inputs" in needs
        prove: Callable[[Any], None] = prove_model
        if inside or "attentions" in needs:
            prove = partial(_prove_with_attention, inside=inside, implementation=attention)
        if packs:
            prove = partial(_prove_apart, prove)
        prove_config(config, of_base, prove, length=length)
        for head in sorted(task_heads):
            of_task: Any = getattr(transformers, f"AutoModelFor{head}")
            prove_config(config, of_task, prove_task_model, length=length)
            with torch.device("meta"):
                share_backbone(of_task.from_config(config), of_base.from_config(config))
    except ModelError as error:
        start = student.initialization
        count = " + ".join(map(str, depths(config)))
        raise ConfigError(f"a student of {count} layers with student.initialization {start}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:  # no such head for this architecture
        reason = " ".join(str(error).split())[:200]
        remedy = "give casting=cloze, or leave the task out"
        raise ConfigError(
            f"{type(config).__name__} has no model for a task of this kind ({reason}); {remedy}"
        ) from None


def try_attention(
    implementation: str,
    shapes: Mapping[str, StudentConfig],
    teacher_config: Any,
    *,
    mixed_precision: str,
    trained: Collection[str],
) -> None:
    """Refuse an `attn_implementation` by which models give something else, or cannot be trained. Raises ConfigError.

    shapes: "student", and "teacher" as one of the same number of layers. trained: those that learn.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    few = _with_few_tokens(teacher_config, is_whole=True)
    for name, shape in shapes.items():
        config = student_model_config(few, shape)
        prove = partial(prove_implementation, implementation=implementation, half=half, trains=name in trained)
        try:
            prove_config(config, base_class(config), prove)
        except ModelError as error:
            raise ConfigError(f"the {name}: {error}") from None


def _prove_apart(prove: Callable[[Any], None], model: Any) -> None:
    prove(model)
    prove_texts_apart(model)


def _prove_with_attention(model: Any, *, inside: bool, implementation: str | None) -> None:
    prove_model(model)
    if implementation is not None:
        set_attention(model, implementation)
    prove_attention(model, inside=inside, training=True)


def _with_few_tokens(config: Any, *, is_whole: bool) -> Any:
    """The config with its special tokens and the first few others, renumbered; one that cannot be stays if it may."""
    rows = config.vocab_size
    special = [i for _, i in token_id_fields(config) if 0 <= i < rows]
    kept = np.unique([*range(min(TOKENS, rows)), *special])
    token_map = np.zeros(rows, dtype=np.int64)
    token_map[kept] = np.arange(len(kept))
    try:
        return renumber_config(config, Vocabulary(kept, token_map))
    except ModelError:
        if not is_whole:
            raise
        return config
