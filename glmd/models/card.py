"""README.md of an exported folder: what it says, and what is read from it again.

text = card_text(ModelCard("Student", "bert-base-uncased", "Made by glmd.", {"seed": "0"}))
base_model, facts, metrics = told_by_card(folder)
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PROBE = "export_probe.json"


@dataclass(frozen=True)
class ModelCard:
    """What README.md of an exported folder says."""

    title: str
    base_model: str
    summary: str
    facts: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)
    exact_tokenizer: bool = False  # the tokenizer maps dropped tokens and needs trust_remote_code (or glmd) to do so
    auto_class: str = "AutoModelForMaskedLM"
    opens_plainly: bool = True  # AutoTokenizer opens a mapped folder without trust_remote_code, as the stock one
    task: str | None = None  # whose answers the model gives
    is_glm: bool = False  # the auto classes have to be told of it
    is_encoder: bool = False  # the folder is one of sentence-transformers


def card_text(card: ModelCard) -> str:
    """README.md with the metadata block that the hub reads."""
    # A local path is nobody else's base model.
    base = {"base_model": card.base_model} if card.base_model and not Path(card.base_model).exists() else {}
    metadata = yaml.safe_dump({"library_name": "transformers", "tags": ["glmd", "distillation"], **base})
    lines = ["---", metadata.strip(), "---", "", f"# {card.title}", "", card.summary, ""]
    lines += [f"- {name}: {value}" for name, value in card.facts.items()]
    if card.metrics:
        lines += ["", "| measure | value |", "| --- | --- |"]
        lines += [f"| {name} | {value:.4f} |" for name, value in card.metrics.items()]
    remote = ", trust_remote_code=True)  # runs tokenization_glmd.py of the folder" if card.exact_tokenizer else ")"
    if card.is_encoder:
        trusted = ", trust_remote_code=True" if card.exact_tokenizer else ""
        lines += [
            *("", "```python", "from sentence_transformers import SentenceTransformer", ""),
            f'vectors = SentenceTransformer("THIS_FOLDER"{trusted}).encode(["A sentence."])',
            "```",
        ]
    lines += ["", "```python", *(["import glmd.glm  # the auto classes know GLM from then on"] if card.is_glm else [])]
    lines += [f"from transformers import {card.auto_class}, AutoTokenizer", ""]
    lines += [
        f'model = {card.auto_class}.from_pretrained("THIS_FOLDER")',
        f'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER"{remote}',
        "```",
    ]
    if card.exact_tokenizer:
        lines += [
            "",
            "With glmd installed, `import glmd.tokenizer` stands for `trust_remote_code`. "
            + _WITHOUT[card.opens_plainly],
        ]
        if card.task is not None:
            named = "" if "text" in card.facts else f"--task {card.task} "  # the card tells the task itself
            command = f"glmd evaluate THIS_FOLDER {named}--data ... --tokenizer stock"
            lines += ["", f"`{command}` measures how it reads text with the stock tokenizer."]
    return "\n".join(lines) + "\n"


def told_by_card(folder: Path) -> tuple[str, dict[str, str], dict[str, float]]:
    """Base model, facts and metrics of a card that `card_text` wrote; nothing of any other."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() and (folder / PROBE).exists() else ""
    base_model = re.search(r"^base_model: (.+)$", text, re.MULTILINE)
    lines = text.splitlines()
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("- ") and ": " in line)
    rows = (re.fullmatch(r"\| (.+) \| (-?\d+\.\d+) \|", line) for line in lines)
    return base_model[1] if base_model else "", facts, {row[1]: float(row[2]) for row in rows if row is not None}


def opens_plainly(config: Any) -> bool:
    """Whether AutoTokenizer opens a compressed folder of this config without its code, as the stock tokenizer.

    Of a few model types (llama) transformers has no tokenizer class, and asks for the folder's own.
    """
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    return type(config) in TOKENIZER_MAPPING


_WITHOUT = {
    True: "Without both the folder opens too, with a tokenizer that splits rare words differently from what the model "
    "was trained on.",
    False: "Without both AutoTokenizer and pipelines refuse the folder, since transformers has no tokenizer class for "
    "this model type: give `trust_remote_code=True`, or take `PreTrainedTokenizerFast.from_pretrained`, or a "
    "folder made "
    "by `glmd export --kind stock`; these split rare words differently from what the model was trained on.",
}
