"""Write docs/configuration.md: every key of a run's YAML, from the dataclasses of glmd.config and their comments.

python docs/make_configuration.py
"""

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from glmd import config, config_file, stage_config
from glmd.config import RunConfig
from glmd.planning.comparison import CompareConfig
from glmd.stage_config import StageConfig

PAGE = Path(__file__).with_name("configuration.md")
GROUPS = ("teacher", "student", "vocabulary", "data", "controls")
INTRO = """\
# Configuration

Made by `python docs/make_configuration.py` from the comments of `glmd/config.py`, `glmd/stage_config.py` and
`glmd/planning/comparison.py`: change these files alone.

A run is one YAML file of these keys, with `key=value` words after it on the command line:

    glmd run my-run.yaml teacher=FOLDER pretraining.max_steps=1000 'seeds=[0, 1, 2]'

A value is YAML, and the last word for a key wins. A key that is unknown, of the wrong type or out of range is an error
that names file and key before any model is loaded. What a file leaves out keeps its default; the resolved
configuration is written to `config.yaml` in the run folder.

Three shorthands: `teacher: FOLDER` is `teacher: {model: FOLDER}`, `tasks: [RTE, CB]` is `tasks: {RTE: {}, CB: {}}`, and
`data.corpus` may be one text instead of a list.
"""
STAGES = """\
## pretraining, task_teacher, task_lm, task_soft_labels, teacher.pretraining

How a stage trains: word prediction on the corpus, the fine-tuning of a task's teacher, the two passes on a task, and
the training of a `teacher.scratch`. A key is written under its stage, for example `pretraining.learning_rate`. A task
may change keys for all of its own stages: `tasks: {RTE: {num_train_epochs: 50.0}}`. Exactly one of `max_steps` and
`num_train_epochs` says how long a stage is; a stage on the corpus needs `max_steps` and `max_length`, and
`teacher.pretraining` has to give both. Keys without a meaning here have that of `transformers.TrainingArguments`.
"""


COMPARE = """\
## compare

Of a comparison (`glmd compare`), whose other keys are a run's. `compare: NAME` takes these from a
file of `configs/comparisons`, or from one of yours, and `compare: {of: NAME, ...}` changes some of them.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    top = [key for key in _meanings(RunConfig) if key not in (*GROUPS, *config_file._STAGE_FIELDS)]
    parts = [INTRO, "## Top level\n", _table(RunConfig, top)]
    for name in GROUPS:
        cls = config_file._GROUPS[name]
        keys = [key for key in _meanings(cls) if key != "pretraining"]
        parts += [f"## {name}\n\n{inspect.getdoc(cls)}\n", _table(cls, keys, prefix=f"{name}.")]
    compared = [COMPARE, _table(CompareConfig, list(_meanings(CompareConfig)), prefix="compare.")]
    return "\n".join([*parts, STAGES, _stage_table(), *compared])


def _table(cls: Any, keys: list[str], *, prefix: str = "") -> str:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types, meanings = _types(cls), _meanings(cls)
    rows = [[f"`{prefix}{key}`", types[key], _default(fields[key]), meanings[key]] for key in keys]
    return _markdown(["key", "type", "default", "meaning"], rows)


def _stage_table() -> str:
    types, meanings = _types(StageConfig), _meanings(StageConfig)
    pretraining, task = (vars(make()) for make in (config._pretraining_defaults, config._task_defaults))
    allowed = {
        key: f"{types[key]}, in {stage_config.RANGES[key]}" if key in stage_config.RANGES else types[key]
        for key in types
    }
    rows = [[f"`{key}`", allowed[key], _shown(pretraining[key]), _shown(task[key]), meanings[key]] for key in types]
    return _markdown(["key", "type", "pretraining", "task stages", "meaning"], rows)


def _fields(cls: Any) -> list[ast.AnnAssign]:
    tree = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(tree, ast.ClassDef), "a dataclass is a class"
    return [node for node in tree.body if isinstance(node, ast.AnnAssign)]


def _types(cls: Any) -> dict[str, str]:
    """Field -> its type as a person reads it: `Literal['a', 'b'] | None` is "a, b"."""
    found = {}
    for node in _fields(cls):
        text = re.sub(r"Literal\[([^]]*)\]", lambda m: m[1].replace("'", ""), ast.unparse(node.annotation))
        for old, new in (("str", "text"), (" | None", ""), ("dict[text, Any]", "mapping"), ("dict", "mapping")):
            text = text.replace(old, new)
        found[ast.unparse(node.target)] = text.replace("|", "or")
    return found


def _meanings(cls: Any) -> dict[str, str]:
    """Field -> the comment behind it, or the lines of one above it."""
    lines = inspect.getsource(cls).splitlines()
    found = {}
    for node in _fields(cls):
        assert node.end_lineno is not None, "parsed from a source"
        behind = re.search(r"  # (.*)$", lines[node.end_lineno - 1])
        above = []
        while match := re.match(r"\s*# (.*)$", lines[node.lineno - 2 - len(above)]):
            above.insert(0, match[1])
        found[ast.unparse(node.target)] = behind[1] if behind else " ".join(above)
    return found


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        return _shown(field.default)
    return _shown(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"


def _shown(value: Any) -> str:
    """A value as it is written in YAML."""
    if isinstance(value, float):
        return f"`{value:.0e}`".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"`{value:g}`"
    return "none" if value is None else f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
