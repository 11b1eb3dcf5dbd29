"""Whether a folder's weights are those of its model, found out by the heads of its files: no weight is read.

    require_language_model("models/mine", field="teacher.model")

Transformers itself matches names and shapes, on a model that has no memory for them, so that what is refused here is
what loading would refuse. Values are looked at only where a file holds two embeddings that its config calls one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmd.config import TeacherConfig
from glmd.errors import ModelError
from glmd.models.heads import task_class
from glmd.models.loading import (
    WEIGHTS,
    base_class,
    compared_embeddings,
    from_pretrained,
    is_tied,
    language_model_class,
    load_model_config,
    looks_local,
    not_tied,
    require_keys,
    require_weight_files,
)

ROWS = 4096  # of two embeddings that are compared at once


def require_language_model(name: str, *, field: str, tasks: Sequence[str] = (), **options: Any) -> None:
    """Refuse a local folder that holds no whole language model. A hub id passes. Raises ModelError with the cure.

    tasks: of the run, for which a classifier might have been meant. options: revision and trust_remote_code.
    """
    require_weight_files(name)
    if not looks_local(name):
        return
    config = load_model_config(name, **options)
    head = task_class(config)
    if head is not None:  # where embeddings are tied, as T5's, a language model misses nothing
        raise ModelError(
            f"{field}: {name} holds a {head}, which predicts no tokens; give the language model that it was made "
            f"from, and it for its task: teacher=BASE teacher.tasks.{next(iter(tasks), 'TASK')}={name}"
        )
    model, info = without_memory(language_model_class(config), name, **options)
    require_keys(model, info, name, allowed_missing=())
    require_one_matrix(model, name)


def own_matrices_of(name: str, model: Any) -> tuple[str, ...]:
    """Names of weights that the class of a language model ties to others, and of which the files at `name` hold two.

    Of a hub id nothing is known before its files are here; those that cannot be read are refused elsewhere.
    """
    from safetensors import SafetensorError, safe_open

    held: set[str] = set()
    try:
        for path in Path(name).glob("*.safetensors") if looks_local(name) else ():
            with safe_open(path, framework="pt") as file:
                held |= set(file.keys())
    except (SafetensorError, OSError):
        return ()
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    return tuple(sorted(name for name, other in tied.items() if {name, other} <= held))


def stored_embeddings(teacher: TeacherConfig, similarity: str) -> tuple[Any, Any]:
    """The embeddings that tokens are compared by, (rows, H) float32, and the model without memory that they are of.

    They alone are read: a model of 20 GB is not loaded for one of its matrices. None where the files do not hold them
    by their name in the model, as those of an older layout. Raises ModelError as `compared_embeddings` does.
    """
    import torch
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    assert teacher.model is not None, "checked before"
    options: dict[str, Any] = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
    model, _ = without_memory(base_class(load_model_config(teacher.model, **options)), teacher.model, **options)
    compared = compared_embeddings(model, similarity)
    parameters = model.named_parameters(remove_duplicate=False)
    names = {name for name, each in parameters if each is compared}
    config_file = Path(teacher.model) / "config.json"
    if not looks_local(teacher.model):
        config_file = Path(str(cached_file(teacher.model, "config.json", revision=teacher.revision)))
    for path in sorted(config_file.parent.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in names & set(file.keys()):
                stored = file.get_tensor(name)
                if stored.shape == compared.shape and stored.dtype in (torch.float32, torch.bfloat16, torch.float16):
                    return stored.float(), model
    return None, model


def without_memory(auto_class: Any, name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    model, info = from_pretrained(auto_class, name, device_map="meta", **WEIGHTS, **options)
    return model, info


def require_one_matrix(model: Any, name: str) -> None:
    """Refuse two matrices of embeddings in the files where the config says that they are one."""
    import torch
    from safetensors import safe_open

    if not is_tied(model):
        return
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [next((key for key, each in model.named_modules() if each is end), None) for end in ends]
    found: list[Any] = []
    with torch.no_grad():
        for wanted in (f"{each}.weight" for each in names if each):
            for path in sorted(Path(name).glob("*.safetensors")):
                file = safe_open(path, framework="pt")  # a context manager, but the slices outlive it
                found += [file.get_slice(key) for key in file.keys() if key == wanted]  # noqa: SIM118
        if len(found) != 2 or found[0].get_shape() != found[1].get_shape():
            return
        for first in range(0, found[0].get_shape()[0], ROWS):
            if not torch.equal(*(each[first : first + ROWS] for each in found)):
                raise not_tied(name)
