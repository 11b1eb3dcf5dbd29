"""glmd: distill a large Hugging Face language model into a small one, weights and vocabulary.

    results = glmd.run("configs/runs/minilm-superglue.yaml", teacher="MODEL", output_dir="runs/mine")
    print(glmd.results_table(results))

Importing this reads no files and loads no torch; the names below come with the module that defines them. They take text
and Path alike, and what cannot be done is a GlmdError of one line.
"""

import importlib
from typing import TYPE_CHECKING, Any

from glmd.version import __version__

if TYPE_CHECKING:
    from glmd.commands.compare import join_runs as join_runs
    from glmd.commands.compress import compress_model as compress_model
    from glmd.commands.evaluate import evaluate_folder as evaluate_folder
    from glmd.commands.evaluate import evaluate_text as evaluate_text
    from glmd.commands.evaluate import predict_file as predict_file
    from glmd.commands.export import export_folder as export_folder
    from glmd.commands.generations import evaluate_references as evaluate_references
    from glmd.commands.init_task import init_task as init_task
    from glmd.commands.verify import verify_folder as verify_folder
    from glmd.config_file import load_config as load_config
    from glmd.errors import GlmdError as GlmdError
    from glmd.pipeline.compare import compare as compare
    from glmd.pipeline.run import run as run
    from glmd.reporting.report import load_results as load_results
    from glmd.reporting.report import results_table as results_table
    from glmd.vocabulary.tokenizer import load_tokenizer as load_tokenizer

_NAMES = {
    "GlmdError": "glmd.errors",
    "compare": "glmd.pipeline.compare",
    "compress_model": "glmd.commands.compress",
    "evaluate_folder": "glmd.commands.evaluate",
    "evaluate_references": "glmd.commands.generations",
    "evaluate_text": "glmd.commands.evaluate",
    "export_folder": "glmd.commands.export",
    "init_task": "glmd.commands.init_task",
    "join_runs": "glmd.commands.compare",
    "load_config": "glmd.config_file",
    "load_results": "glmd.reporting.report",
    "load_tokenizer": "glmd.vocabulary.tokenizer",
    "predict_file": "glmd.commands.evaluate",
    "results_table": "glmd.reporting.report",
    "run": "glmd.pipeline.run",
    "verify_folder": "glmd.commands.verify",
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'glmd' has no attribute {name!r}; it has {', '.join(_NAMES)}")


def __dir__() -> list[str]:
    return sorted(__all__)
