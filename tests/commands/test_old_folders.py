"""A folder that glmd 0.1.0 exported opens, is scored, verified and exported as one of today."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import glmd

FOLDER = Path(__file__).with_name("student_of_0.1.0")
TEXT = "aadi acee adgb aech agfg ahbf aiaf ajfd ajij bbbh beae bgfa"
PAIR = "fghj fgjh gaih gdfb gebj gfcd"  # of which two were dropped and are mapped
IDS = [2, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 3, 13, 34, 44, 18, 49, 9, 3]
LOGITS = [1.2626861, -1.1280497]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(FOLDER, tmp_path / "student")


def test_it_opens_with_glmd_and_with_the_code_that_it_brings(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for tokenizer in (glmd.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)):
        inputs = tokenizer(TEXT, PAIR, return_tensors="pt")
        assert inputs["input_ids"].tolist() == [IDS] and tokenizer.is_exact
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, torch.tensor([LOGITS]), rtol=1e-4, atol=1e-5)


def test_the_import_that_cards_print_makes_autotokenizer_know_the_folder(folder: Path) -> None:
    assert "import glmd.tokenizer" in (folder / "README.md").read_text(encoding="utf-8")
    code = f"import glmd.tokenizer, transformers as t; print(t.AutoTokenizer.from_pretrained({str(folder)!r}).is_exact)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_it_is_scored_by_the_length_of_its_card(folder: Path, tmp_path: Path) -> None:
    rows = [{"premise": TEXT, "hypothesis": PAIR, "label": "entailment", "idx": 0}]
    rows += [{"premise": TEXT, "hypothesis": PAIR, "label": "not_entailment", "idx": 1}]
    file = tmp_path / "val.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = glmd.evaluate_folder(folder, "RTE", file)
    assert scores["accuracy"] == 0.5 and scores["max_length"] == 32


@pytest.mark.slow
def test_it_passes_every_check_of_verify_and_can_be_exported_again(folder: Path, tmp_path: Path) -> None:
    assert all(check.problem is None for check in glmd.verify_folder(folder))
    glmd.export_folder(folder, tmp_path / "stock", kind="stock")
    assert not hasattr(AutoTokenizer.from_pretrained(tmp_path / "stock"), "is_exact")
