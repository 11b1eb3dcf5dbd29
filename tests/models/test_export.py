"""Exported folders: stock transformers loads them to the same logits, in any process; what does not is refused."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from glmd.cli import main
from glmd.commands.export import export_folder
from glmd.commands.verify import verify_folder
from glmd.errors import ModelError, RunError
from glmd.models import export
from glmd.models.card import PROBE, ModelCard, card_text
from glmd.models.export import _probe, check_exports, export_model, stranger_ahead
from glmd.vocabulary.tokenizer import load_tokenizer, stock_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary

FOLDERS = (
    "pretraining/student",
    "tasks/RTE/task_teacher/model",
    "tasks/RTE/seed-0/task_lm/student",
    "tasks/RTE/seed-0/task_soft_labels/student",
    "tasks/RTE/seed-0/hard_labels/student",
)
CARD = ModelCard("A model", "some/base", "Made for a test.", {"seed": "0"})


def stock_model(folder: Path):
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    size = model.config.vocab_size
    return model(input_ids=torch.arange(size)[None, :60], attention_mask=torch.ones(1, min(60, size))).logits


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_of_a_run_is_a_stock_model_with_its_probe(finished, name):
    model = stock_model(finished.folder / name)
    expected_class = "BertForSequenceClassification" if "labels" in name or "teacher" in name else "BertForMaskedLM"
    assert type(model).__name__ == expected_class
    probe = json.loads((finished.folder / name / PROBE).read_text())
    with torch.no_grad():
        output = model(input_ids=torch.tensor(probe["input_ids"])).logits.flatten()[: len(probe["output"])]
    torch.testing.assert_close(output, torch.tensor(probe["output"]), rtol=0, atol=1e-6)
    assert probe["class"] == expected_class


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_of_a_run_has_a_tokenizer_of_its_models_size(finished, name):
    from transformers import AutoTokenizer

    folder = finished.folder / name
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    exact, stock = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert len(exact) == len(stock) == size
    text = (finished.folder.parent / "run" / "config.yaml").read_text()[:200]
    assert max(exact(text)["input_ids"]) < size


def test_save_and_load_and_save_again_changes_no_byte(finished, tmp_path):
    first = finished.folder / "tasks/RTE/seed-0/task_soft_labels/student"
    export_model(stock_model(first), load_tokenizer(first), tmp_path / "second", card=CARD)
    export_model(stock_model(tmp_path / "second"), load_tokenizer(tmp_path / "second"), tmp_path / "third", card=CARD)
    for path in (tmp_path / "second").iterdir():
        assert path.read_bytes() == (tmp_path / "third" / path.name).read_bytes(), path.name
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "third/model.safetensors").read_bytes()
    assert torch.equal(logits(stock_model(first)), logits(stock_model(tmp_path / "third")))


def test_exporting_leaves_the_model_as_it_was_and_replaces_the_folder_whole(finished, tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "pytorch_model.bin").touch()
    source = finished.folder / "pretraining/student"
    model = stock_model(source).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, load_tokenizer(source), folder, card=CARD)
    assert model.training and all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert {path.name for path in folder.iterdir()} == {path.name for path in source.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def copies(finished, tmp_path: Path, name: str) -> Path:
    return shutil.copytree(finished.folder / "tasks/RTE/seed-0/task_soft_labels/student", tmp_path / name)


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_stranger_refuses_a_folder_that_would_give_other_logits(finished, tmp_path, monkeypatch):
    """One process for all damages: the stranger's own code, run here over one folder at a time."""
    import sys

    from glmd.models.export import _STRANGER

    def swap_rows(tensors):
        words = tensors["bert.embeddings.word_embeddings.weight"]
        words[[6, 7]] = words[[7, 6]]

    def drop_bias(tensors):
        del tensors["classifier.bias"]

    def answer(folder: Path) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([str(folder)])))
        try:
            exec(_STRANGER, {"__name__": "__main__"})
        except SystemExit as end:
            return str(end.code)
        return "fine"

    folder = copies(finished, tmp_path, "whole")
    assert answer(folder) == "fine"
    change_weights(folder, lambda tensors: tensors["classifier.bias"].add_(1e-3))
    assert "its output differs by 1.0e-03 from those before export" in answer(folder)
    folder = copies(finished, tmp_path, "swapped")
    change_weights(folder, swap_rows)
    assert "its output differs" in answer(folder)
    folder = copies(finished, tmp_path, "headless")
    change_weights(folder, drop_bias)
    assert "weights missing or unknown" in answer(folder) and "classifier.bias" in answer(folder)
    folder = copies(finished, tmp_path, "wordy")
    shutil.copy(finished.folder / "tasks/RTE/task_teacher/model/tokenizer.json", folder)
    change_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    assert "the tokenizer has 86 tokens, the model 51 rows for 51" in answer(folder)


@pytest.mark.slow
def test_the_fresh_process_has_no_glmd_and_its_refusal_is_one_line(finished, tmp_path, monkeypatch):
    """Launched ranks pass nothing of themselves on, and the checkout in the working folder does not help."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folder = copies(finished, tmp_path, "damaged")
    change_weights(folder, lambda tensors: tensors["classifier.bias"].add_(1.0))
    with pytest.raises(ModelError) as caught:
        check_exports([finished.folder / "pretraining/student", folder])
    message = str(caught.value)
    assert message.startswith("an exported folder does not load with stock transformers: ")
    assert str(folder) in message and "its output differs by 1.0e+00" in message and "\n" not in message


def test_nothing_to_check_starts_no_process(monkeypatch):
    monkeypatch.setattr("glmd.models.export.subprocess.Popen", None)
    check_exports([])


def test_a_fresh_process_that_was_begun_ahead_is_the_one_that_proves_and_leaves_with_the_run(monkeypatch):
    code = """
import json, sys
print("here", file=sys.stderr, flush=True)
sys.exit("told " + json.load(sys.stdin)[0])
"""
    monkeypatch.setattr("glmd.models.export._STRANGER", code)
    with stranger_ahead():
        (ahead,) = export._waiting
        assert ahead.stderr.readline() == "here\n"
        with pytest.raises(ModelError, match="told /a"):
            check_exports([Path("/a")])
    assert ahead.returncode == 1 and not export._waiting
    with stranger_ahead():  # one that is not asked
        (ahead,) = export._waiting
    assert ahead.returncode == -9 and not export._waiting
    with stranger_ahead():  # one that has died is replaced
        (ahead,) = export._waiting
        ahead.kill()
        ahead.wait()
        with pytest.raises(ModelError, match="told /b"):
            check_exports([Path("/b")])


def test_a_card_names_hub_models_and_no_local_paths(tmp_path):
    import yaml

    def metadata(text: str) -> dict:
        return yaml.safe_load(text.split("---")[1])

    text = card_text(CARD)
    assert metadata(text) == {
        "library_name": "transformers",
        "tags": ["glmd", "distillation"],
        "base_model": "some/base",
    }
    assert "- seed: 0" in text and "import glmd.tokenizer" not in text and "| measure |" not in text
    text = card_text(ModelCard("A", str(tmp_path), "B", {}, {"accuracy": 0.5}, exact_tokenizer=True))
    assert "base_model" not in metadata(text) and str(tmp_path) not in text
    assert "| accuracy | 0.5000 |" in text and "import glmd.tokenizer" in text


def test_a_card_says_how_to_load_the_exact_tokenizer_without_glmd(finished):
    remote = 'AutoTokenizer.from_pretrained("THIS_FOLDER", trust_remote_code=True)'
    student, teacher = finished.folder / "pretraining/student", finished.folder / "tasks/RTE/task_teacher/model"
    assert f"tokenizer = {remote}  # runs tokenization_glmd.py of the folder\n" in (student / "README.md").read_text()
    assert (student / "tokenization_glmd.py").is_file()
    assert "trust_remote_code" not in (teacher / "README.md").read_text()


def test_cards_of_a_run_speak_of_it_without_local_paths(finished, tiny):
    text = (finished.folder / "tasks/RTE/seed-0/task_soft_labels/student/README.md").read_text()
    assert "- method: glmd" in text and "- seed: 0" in text and "| accuracy |" in text
    assert "AutoModelForSequenceClassification" in text
    assert str(tiny.root) not in text and str(finished.folder) not in text


# Other forms of a student


def texts_of(finished) -> tuple[str, ...]:
    """Some, one of them of words that the student's vocabulary dropped."""
    vocabulary, source = Vocabulary.load(finished.folder / "vocabulary"), load_tokenizer(finished.config.teacher.model)
    dropped = source.convert_ids_to_tokens(vocabulary.dropped_ids.tolist())
    return (" ".join(dropped[:9]), "[MASK] iiii, jjjj!", "", "abcj" * 5)


@pytest.fixture
def no_fresh_process(monkeypatch):
    monkeypatch.setattr("glmd.models.export.check_exports", lambda folders: None)
    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)


def says_of(folder: Path, tokenizer, texts) -> torch.Tensor:
    model = stock_model(folder)
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
    return output[0] if "logits" in output else output[0] * inputs["attention_mask"][..., None]


@pytest.mark.slow
def test_an_expanded_student_reads_text_exactly_with_stock_parts_alone(finished, tmp_path):
    from transformers import AutoTokenizer

    source, output = finished.folder / "tasks/RTE/seed-0/task_soft_labels/student", tmp_path / "wide"
    assert (
        export_folder(source, output, kind="expanded") == f"{output}: the student in task_soft_labels/student, expanded"
    )
    tokenizer, teacher = AutoTokenizer.from_pretrained(output), finished.config.teacher.model
    assert tokenizer.get_vocab() == load_tokenizer(teacher).get_vocab() and not hasattr(tokenizer, "is_exact")
    assert stock_model(output).config.vocab_size == 86
    texts = texts_of(finished)
    expected = says_of(source, load_tokenizer(source), texts)
    torch.testing.assert_close(says_of(output, tokenizer, texts), expected, rtol=0, atol=1e-6)
    # With the stock tokenizer it would be another answer.
    assert not torch.allclose(says_of(source, stock_tokenizer(load_tokenizer(source)), texts), expected, atol=1e-4)
    assert [check.line() for check in verify_folder(output) if check.problem] == []
    card, before = ((folder / "README.md").read_text() for folder in (output, source))
    assert "- kind: expanded" in card and "- max_length: 32" in card
    assert [line for line in card.splitlines() if line.startswith("| accuracy")] == [
        line for line in before.splitlines() if line.startswith("| accuracy |")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "T5EncoderModel"])
def test_students_of_other_families_are_expanded_with_their_special_ids(name, models, tmp_path, no_fresh_process):
    small, wide = tmp_path / "small", tmp_path / "wide"
    arguments = ["--corpus", str(models / "corpus.txt"), "--keep-ratio", "0.8"]
    assert main(["compress", str(models / name), str(small), *arguments]) == 0
    assert main(["export", str(small), str(wide), "--kind", "expanded"]) == 0
    texts = ("unlike running stones", "the naïve 猫 rivers", "light")
    source = load_tokenizer(models / name)
    ours = says_of(wide, load_tokenizer(wide), texts)
    torch.testing.assert_close(ours, says_of(small, load_tokenizer(small), texts), rtol=0, atol=1e-5)
    assert load_tokenizer(wide)(texts[0])["input_ids"] == source(texts[0])["input_ids"]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (models / name, wide))
    assert {key: before.get(key) for key in ("pad_token_id", "eos_token_id", "vocab_size")} == {
        key: after.get(key) for key in ("pad_token_id", "eos_token_id", "vocab_size")
    }


@pytest.mark.slow
def test_a_stock_student_has_the_ordinary_tokenizer_alone(finished, tmp_path):
    from transformers import AutoTokenizer

    source, output = finished.folder / "pretraining/student", tmp_path / "stock"
    export_folder(source, output, kind="stock")
    assert not {"token_map.json", "source_tokenizer.json", "tokenization_glmd.py"} & {p.name for p in output.iterdir()}
    assert "auto_map" not in (output / "tokenizer_config.json").read_text()
    tokenizer, exact = AutoTokenizer.from_pretrained(output), load_tokenizer(source)
    ordinary, texts = stock_tokenizer(exact), texts_of(finished)
    assert not hasattr(tokenizer, "is_exact") and tokenizer.get_vocab() == exact.get_vocab()
    assert all(tokenizer(text)["input_ids"] == ordinary(text)["input_ids"] for text in texts)
    assert any(tokenizer(text)["input_ids"] != exact(text)["input_ids"] for text in texts), "else this shows nothing"
    assert tokenizer.mask_token == exact.mask_token and tokenizer.model_max_length == exact.model_max_length
    assert [check.line() for check in verify_folder(output) if check.problem] == []
    assert "trust_remote_code" not in (output / "README.md").read_text()


@pytest.mark.slow
def test_another_form_names_the_same_base_model(finished, tmp_path, no_fresh_process):
    source, output = tmp_path / "student", tmp_path / "stock"
    shutil.copytree(finished.folder / "pretraining/student", source)
    card = source / "README.md"
    card.write_text(card.read_text().replace("library_name:", "base_model: someone/bert\nlibrary_name:", 1))
    export_folder(source, output, kind="stock")
    assert "\nbase_model: someone/bert\n" in (output / "README.md").read_text()


def test_a_form_that_does_not_fit_is_refused(finished, tmp_path):
    student, teacher = finished.folder / "pretraining/student", finished.folder / "tasks/RTE/task_teacher/model"
    for source, kind, error, says in (
        (student, "expanded", ModelError, "BertForMaskedLM predicts tokens"),
        (student, "mapped", RunError, "is a model folder already; give --kind stock or expanded"),
        (teacher, "stock", ModelError, "--kind stock has no effect: .* keeps every token of its source, or"),
        (tmp_path, "stock", RunError, "no checkpoint"),
    ):
        with pytest.raises(error, match=says):
            export_folder(source, tmp_path / "out", kind=kind)
        assert not (tmp_path / "out").exists()


def test_a_card_says_how_its_student_is_scored_without_glmd_and_the_command_does_so(finished, tiny, capsys):
    task = finished.folder / "tasks/RTE"
    card = (task / "seed-0/task_soft_labels/student/README.md").read_text()
    (command,) = re.findall(r"`glmd (evaluate THIS_FOLDER [^`]+)`", card)
    words = command.replace("...", str(tiny.superglue)).split()
    folders = {"student": task / "seed-0/task_soft_labels/student", "teacher": task / "task_teacher/model"}
    found = {name: [word.replace("THIS_FOLDER", str(folder)) for word in words] for name, folder in folders.items()}
    assert main([*found["student"], "--max-length", "32"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main([*found["teacher"], "--max-length", "32"]) == 2
    assert "--tokenizer stock has no effect" in capsys.readouterr().err
    assert "--tokenizer stock" not in (folders["teacher"] / "README.md").read_text()


@pytest.mark.parametrize("name", ["T5", "Bart", "GPT2"])
def test_a_task_head_that_looks_for_an_end_or_a_pad_token_can_be_probed(name):
    import transformers
    from test_vocabulary import BART, GPT2, T5

    fields = {"T5": {**T5, "eos_token_id": 1}, "Bart": BART, "GPT2": GPT2}[name]
    config = getattr(transformers, f"{name}Config")(**fields)
    probe = _probe(getattr(transformers, f"{name}ForSequenceClassification")(config).eval())
    assert len(probe["output"]) == len(probe["places"]) > 0


def strangers_answer(folder: Path, monkeypatch) -> str:
    """What a stranger says of a folder, in this process."""
    import sys

    from glmd.models.export import _STRANGER

    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([str(folder)])))
    try:
        exec(_STRANGER, {"__name__": "__main__"})
    except SystemExit as end:
        return str(end.code)
    return "fine"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_folder_is_proved_in_every_precision_and_by_what_its_outputs_are_worth(
    finished, tmp_path, monkeypatch, dtype, size
):
    """The probe is made as it is compared, in float32 on the CPU; an error counts beside the largest output."""
    source, folder = finished.folder / "pretraining/student", tmp_path / "model"
    model = stock_model(source)
    with torch.no_grad():
        for parameter in model.cls.predictions.transform.LayerNorm.parameters():
            parameter *= size
        model.cls.predictions.bias *= 0
    export_model(model.to(dtype), load_tokenizer(source), folder, card=CARD)
    assert {p.dtype for p in model.parameters()} == {dtype}, "the model itself is left as it was"
    assert strangers_answer(folder, monkeypatch) == "fine"
    probe = json.loads((folder / PROBE).read_text())
    largest = max(map(abs, probe["output"]))
    for error, answer in ((1e-5, "fine"), (1e-1, "its output differs by")):
        wrong = [value + error * largest for value in probe["output"]]
        (folder / PROBE).write_text(json.dumps({**probe, "output": wrong}))
        assert answer in strangers_answer(folder, monkeypatch)


def test_a_refusal_of_the_fresh_process_is_one_line_with_its_folder_whatever_it_was(finished, tmp_path, monkeypatch):
    folder = copies(finished, tmp_path, "torn")
    (folder / "model.safetensors").write_bytes(b"{")
    assert strangers_answer(folder, monkeypatch).startswith(f"{folder}: ")
    assert "\n" not in strangers_answer(folder, monkeypatch)
