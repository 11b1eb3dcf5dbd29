"""The shape of the package: imports point down, light modules stay light, config keys stay, every YAML builds."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import glmd
from glmd.config import RunConfig
from glmd.config_file import config_keys, dump_config, load_config
from glmd.distillation.methods import load_method
from glmd.evaluation.metrics import require_metrics
from glmd.planning.comparison import load_comparison
from glmd.strict_yaml import configs_root, load_yaml
from glmd.tasks.tasks import load_task

PACKAGE = Path(glmd.__file__).parent

# The wings, lowest first; the modules of the top folder stand for themselves. Each may import what stands before it,
# but not its neighbors between the same bars.
WINGS = """
version errors | runtime | storage strict_yaml losses | stage_config public | task_files | config | config_file data
| vocabulary | models | tasks | distillation | training evaluation | planning | reporting | pipeline
| commands tokenizer glm | cli | __main__
"""
RANK = {name: rank for rank, group in enumerate(WINGS.split("|")) for name in group.split()}


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import in a file, or of those that run when the file is imported."""
    nodes = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its layer"
            yield str(node.module), tuple(alias.name for alias in node.names)
        later = isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))
        if not (top_level_only and later):
            nodes += ast.iter_child_nodes(node)


def own_imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """The modules of glmd that a file imports, without the `glmd.`."""
    found = set()
    for module, names in imports(path, top_level_only=top_level_only):
        if module.split(".")[0] == "glmd":
            parent = module.removeprefix("glmd").removeprefix(".")
            found |= {name for each in names if (name := f"{parent}.{each}".lstrip(".")) in MODULES}
            found |= {parent} & set(MODULES)
    return found


def wing(name: str) -> str:
    return name.split(".")[0]


def test_every_wing_has_a_place():
    assert {wing(name) for name in MODULES} == set(RANK)


@pytest.mark.parametrize("name", MODULES)
def test_wings_import_downward(name):
    others = {each for each in own_imports(MODULES[name]) if wing(each) != wing(name)}
    assert {each for each in others if RANK[wing(each)] >= RANK[wing(name)]} == set()


def test_no_module_imports_itself_over_others():
    """Inside of a wing too: what remains after modules whose imports are all known are taken away is a circle."""
    waiting = {name: own_imports(path) for name, path in MODULES.items()}
    while free := [name for name, needed in waiting.items() if not needed & set(waiting)]:
        for name in free:
            del waiting[name]
    assert not waiting


def test_no_module_imports_the_package_itself():
    """`from glmd import run` brings the names that users see: inside the package it is an import upward."""
    for name, path in MODULES.items():
        names = {each for module, found in imports(path) for each in found if module == "glmd"}
        assert names <= set(MODULES), f"glmd.{name}"


def test_reports_are_read_without_a_framework():
    assert own_imports(MODULES["reporting.report"]) <= {"errors", "public"}


@pytest.mark.parametrize("name", [name for name in MODULES if wing(name) == "reporting"])
def test_reports_load_no_torch(name):
    assert own_imports(MODULES[name]) <= {"errors", "public", *(each for each in MODULES if wing(each) == "reporting")}
    assert not loaded_at_import(name) & {"torch", "transformers", "matplotlib"}


def loaded_at_import(name: str) -> set[str]:
    """Top-level packages that importing glmd.`name` brings in, glmd's own modules followed."""
    packages, to_visit, visited = set(), [name], set()
    while to_visit:
        current = to_visit.pop()
        visited.add(current)
        packages |= {module.split(".")[0] for module, _ in imports(MODULES[current], top_level_only=True)}
        to_visit += own_imports(MODULES[current], top_level_only=True) - visited
    return packages


@pytest.mark.parametrize("name", ["errors", "strict_yaml", "config", "tasks.tasks", "reporting.report", "cli"])
def test_light_modules_bring_no_framework(name):
    heavy = {"torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy"}
    assert not loaded_at_import(name) & heavy


def test_losses_know_nothing_but_torch():
    for name in (name for name in MODULES if wing(name) == "losses" and name != "losses.triton_rows"):
        assert loaded_at_import(name) <= {"torch", "glmd", "numpy"} | set(sys.stdlib_module_names)
        assert all(each == "errors" or wing(each) == "losses" for each in own_imports(MODULES[name]))


def test_help_and_refused_config_load_no_torch():
    """In one fresh process: what counts is what was imported, not how long it took."""
    code = """
import sys
import glmd, glmd.cli
try:
    glmd.cli.main(["--help"])
except SystemExit as end:
    assert end.code == 0
assert glmd.cli.main(["run", "minilm-superglue", "pretraining.learning_rte=1"]) == 2
print(sorted({"torch", "transformers", "accelerate", "datasets", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Distill a large Hugging Face language model" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert "did you mean learning_rate?" in done.stderr


def test_public_names_are_there():
    """And are functions: a submodule of the same name would hide one, once imported."""
    assert all(callable(getattr(glmd, name)) for name in glmd.__all__ if name != "__version__")


# --- Configurations ----------------------------------------------------------------------------------------------

STAGE = """max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps train_sampling_strategy
gradient_checkpointing learning_rate lr_scheduler_type warmup_ratio min_lr_ratio weight_decay adam_beta1 adam_beta2
adam_epsilon max_grad_norm skip_nonfinite max_length mlm_probability num_maskings logging_steps save_steps
save_total_limit per_device_eval_batch_size"""

# A key that is renamed or removed breaks the runs of users: changing this is a decision.
KEYS = {
    "": """output_dir analysis assistants method tasks untrained_tasks stages casting updates_of sweep seeds selection
        mixed_precision deterministic torch_compile cuda_graphs attn_implementation tf32 dataloader_num_workers elastic
        report_to""",
    "teacher.": "model revision trust_remote_code ensemble dtype quantization sharded cache cached_stages tasks "
    "scratch",
    "student.": "num_hidden_layers initialization config architecture num_decoder_layers decoder_initialization",
    "vocabulary.": "keep_ratio size multiple_of selection mapping within_class similarity teacher_mass "
    "teacher_reads keep_words corpus_weights",
    "data.": "corpus text_field messages_field loss_on packing superglue synthetic eval_blocks",
    "controls.": "hard_labels full_vocabulary trim_only trim_after",
    "teacher.pretraining.": STAGE,
    "pretraining.": STAGE,
    "task_teacher.": STAGE,
    "task_lm.": STAGE,
    "task_soft_labels.": STAGE,
}


def test_config_keys_are_frozen():
    assert sorted(config_keys(RunConfig)) == sorted(prefix + key for prefix in KEYS for key in KEYS[prefix].split())


def yaml_files(kind: str) -> list[Path]:
    return sorted((configs_root() / kind).glob("*.yaml"))


def test_there_are_methods_tasks_and_runs():
    assert all(yaml_files(kind) for kind in ("methods", "tasks", "runs", "comparisons"))


@pytest.mark.parametrize("path", yaml_files("methods"), ids=lambda path: path.stem)
def test_every_method_builds(path):
    method = load_method(path.stem)
    assert "task_head" in [*method.values()][-1].needs and all(objective.terms for objective in method.values())


@pytest.mark.parametrize("path", yaml_files("tasks"), ids=lambda path: path.stem)
def test_every_task_builds(path):
    for casting in ("head", "cloze") if load_task(path.stem).has_one_answer else ("head",):
        task = load_task(path.stem, casting)
        assert task.name == path.stem
        require_metrics(task)


def is_comparison(path: Path) -> bool:
    return "compare" in load_yaml(path)


RUNS = [path for path in yaml_files("runs") if not is_comparison(path)]


@pytest.mark.parametrize("path", [path for path in yaml_files("runs") if is_comparison(path)], ids=lambda p: p.stem)
def test_every_comparison_builds(path):
    assert len(load_comparison(path.stem).arms) > 1


# One of those that are alike in all that a protocol looks at, of runs that do not name their one method.
UNLIKE = {
    (str(run.tasks), str(run.sweep), str(run.seeds)): path
    for path in RUNS
    if (run := load_config(path.stem)).tasks and "method" not in load_yaml(path)
}


@pytest.mark.parametrize("path", yaml_files("comparisons"), ids=lambda path: path.stem)
@pytest.mark.parametrize("run", UNLIKE.values(), ids=lambda path: path.stem)
def test_every_protocol_fits_every_run(path, run):
    comparison = load_comparison(run.stem, [f"compare={path.stem}"])
    assert comparison.arms[0].name == comparison.reference
    assert len({arm.folder for arm in comparison.arms}) == len(comparison.arms)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_builds_and_names_what_exists(path, tmp_path):
    config = load_config(path.stem)
    load_method(config.method)
    known = [name for name, files in config.tasks.items() if "text" not in files]
    assert [load_task(name).name for name in known] == known
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(config), encoding="utf-8")
    assert load_config(written) == config


@pytest.mark.parametrize("path", yaml_files("accelerate"), ids=lambda path: path.stem)
def test_every_launch_file_names_processes_and_precision(path):
    assert {"distributed_type", "num_processes", "mixed_precision"} <= set(load_yaml(path))
