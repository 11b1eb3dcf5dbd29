"""glmd: distil a large Hugging Face language model into a small one, weights and vocabulary.

    results = glmd.run("configs/runs/minilm-superglue.yaml", teacher="MODEL", output_dir="runs/mine")
    print(glmd.results_table(results))

Importing this reads no files and loads no torch; the names below come with the module that defines them. They take text
and Path alike, and what cannot be done is a GlmdError of one line.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmd.bits_per_byte import evaluate_text as evaluate_text
    from glmd.compress import compress_model as compress_model
    from glmd.config import load_config as load_config
    from glmd.errors import GlmdError as GlmdError
    from glmd.evaluation import evaluate_folder as evaluate_folder
    from glmd.evaluation import predict_file as predict_file
    from glmd.export import export_folder as export_folder
    from glmd.pipeline import run as run
    from glmd.report import load_results as load_results
    from glmd.report import results_table as results_table
    from glmd.tokenizer import load_tokenizer as load_tokenizer
    from glmd.verify import verify_folder as verify_folder

__version__ = "0.1.0"

_NAMES = {
    "GlmdError": "glmd.errors",
    "compress_model": "glmd.compress",
    "evaluate_folder": "glmd.evaluation",
    "evaluate_text": "glmd.bits_per_byte",
    "export_folder": "glmd.export",
    "load_config": "glmd.config",
    "load_results": "glmd.report",
    "load_tokenizer": "glmd.tokenizer",
    "predict_file": "glmd.evaluation",
    "results_table": "glmd.report",
    "run": "glmd.pipeline",
    "verify_folder": "glmd.verify",
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'glmd' has no attribute {name!r}; it has {', '.join(_NAMES)}")


def __dir__() -> list[str]:
    return sorted(__all__)
