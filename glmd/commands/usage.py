"""Where the students of a run lie, and a line of Python that uses each: what `glmd run` says at its end.

print(describe_students(config, results))
"""

from pathlib import Path
from typing import Any

from glmd.config import RunConfig
from glmd.distillation.methods import load_method
from glmd.models.card import opens_plainly
from glmd.models.heads import is_encoder, lm_kind
from glmd.models.loading import auto_class_name, load_model_config
from glmd.planning.stages import pass_path
from glmd.planning.teacher_rules import passes, task_of, with_task_model
from glmd.reporting.report import best_rows
from glmd.vocabulary.tokenization_glmd import TOKEN_MAP_FILE
from glmd.vocabulary.tokenizer import load_tokenizer


def describe_students(config: RunConfig, results: dict[str, Any]) -> str:
    """The folder of each student (of a sweep: of the best grid points), and a line that uses the first of each task."""
    config = with_task_model(config)
    folders = _folders(config, results)
    number = sum(map(len, folders.values()))
    lines = ["The student is in" if number == 1 else f"The {number} students are in"]
    for task, places in folders.items():
        lines += [f"  {place}" for place in places]
        has_pair = task is not None and task_of(config, task).text_pair is not None
        which = "which is" if len(places) == 1 else "of which the first is"
        lines += [f"{which} used, without glmd, by", f"  {usage(places[0], has_pair=has_pair)}"]
    return "\n".join(lines)


def _folders(config: RunConfig, results: dict[str, Any]) -> dict[str | None, list[Path]]:
    root = Path(config.output_dir)
    if not config.tasks:
        return {None: [root / "pretraining" / "student"]}
    found: dict[str | None, list[Path]] = {}
    last = passes(load_method(config.method))[-1]
    for row in best_rows(results["rows"]):
        if (row["system"], row["stage"]) == ("student", last):
            path = pass_path(last, row["task"], row["seed"], row.get("grid_point", {}))
            found.setdefault(row["task"], []).append(root / path / "student")
    return found


def usage(folder: Path, *, has_pair: bool = False) -> str:
    """One line of Python that uses an exported folder, by the head that it has.

    has_pair: a classifier was trained on two texts. The mapped tokenizer needs trust_remote_code; to go on with a text
    the stock one is the safer, where transformers opens it by itself.
    """
    config = load_model_config(str(folder))
    name, is_exact = (config.architectures or [""])[0], (folder / TOKEN_MAP_FILE).is_file()
    trusted = ", trust_remote_code=True" if is_exact else ""
    if is_encoder(config):
        return (
            "from sentence_transformers import SentenceTransformer; "
            f'print(SentenceTransformer("{folder}"{trusted}).encode(["A sentence."]))'
        )
    if lm_kind(config) == "blank-infilling":
        return _opened("AutoModelForMaskedLM", folder, trusted, code=True)
    if "MultipleChoice" in name:
        return _opened("AutoModelForMultipleChoice", folder, trusted)
    if auto_class_name(name) == "AutoModelForSeq2SeqLM":
        said = 'tokenizer.decode(model.generate(**tokenizer("A text", return_tensors="pt"))[0])'
        return f"{_opened('AutoModelForSeq2SeqLM', folder, trusted)}; print({said})"
    if "SequenceClassification" in name:
        task, text = (
            "text-classification",
            '{"text": "One text.", "text_pair": "Another."}' if has_pair else '"A text."',
        )
        text += ", truncation=True"
        if config.num_labels == 1:
            text += ', function_to_apply="none"'
        elif getattr(config, "problem_type", None) == "multi_label_classification":
            text += ", top_k=None"
    elif "TokenClassification" in name:
        task, text = "token-classification", '"A text."'
    elif "MaskedLM" in name:
        task, text = "fill-mask", f'"A {load_tokenizer(folder).mask_token} text."'
    else:
        task, text = "text-generation", '"A text"'
        trusted = "" if opens_plainly(config) else trusted
    return f'from transformers import pipeline; print(pipeline("{task}", "{folder}"{trusted})({text}))'


def _opened(auto_class: str, folder: Path, trusted: str, *, code: bool = False) -> str:
    """Python that opens model and tokenizer of a folder. code: the model's is in the folder."""
    own = ", trust_remote_code=True" if code else ""
    model = f'{auto_class}.from_pretrained("{folder}"{own})'
    tokenizer = f'AutoTokenizer.from_pretrained("{folder}"{trusted})'
    return f"from transformers import {auto_class}, AutoTokenizer; model, tokenizer = {model}, {tokenizer}"
