"""`glmd verify` passes what glmd exports and names what is wrong with a folder that was damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import CLASSES, one_of
from safetensors.torch import load_file, save_file

from glmd.cli import main
from glmd.commands.verify import verify_folder
from glmd.errors import ModelError
from glmd.models.export import check_exports


@pytest.fixture(scope="module")
def compressed(models, tmp_path_factory):
    """`compressed("GPT2LMHeadModel")`: that model with fewer tokens, as `glmd compress` leaves it."""
    root = tmp_path_factory.mktemp("compressed")

    def make(name: str) -> Path:
        if not (root / name).exists():
            arguments = ["--corpus", str(models / "corpus.txt"), "--keep-ratio", "0.9"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
                assert main(["compress", str(models / name), str(root / name), *arguments]) == 0
        return root / name

    return make


@pytest.fixture
def no_fresh_process(monkeypatch):
    monkeypatch.setattr("glmd.commands.verify.check_exports", lambda folders: None)


@pytest.mark.parametrize("name", CLASSES)
def test_what_compress_leaves_passes(name, compressed, no_fresh_process):
    checks = verify_folder(compressed(name))
    assert [check.line() for check in checks if check.problem] == []
    assert {"weights", "rows", "mapped tokenizer", "saved again", "without glmd"} <= {check.name for check in checks}


@pytest.mark.slow
def test_a_student_of_a_run_passes_and_a_stock_folder_too(finished, models, capsys):
    assert main(["verify", str(finished.folder / "tasks/RTE/seed-0/task_soft_labels/student")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(line.startswith("ok    ") for line in lines)
    checks = verify_folder(models / "RobertaForMaskedLM")
    assert not any(check.problem for check in checks)
    assert {"mapped tokenizer", "without glmd"}.isdisjoint(check.name for check in checks), "it has nothing to compare"


def change_json(folder: Path, name: str, change) -> None:
    parsed = json.loads((folder / name).read_text())
    change(parsed)
    (folder / name).write_text(json.dumps(parsed))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def swap(vocabulary: dict[str, int]) -> None:
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


PADDING = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
           "pad_token": "<pad>"}  # fmt: skip
EMBEDDINGS = "roberta.embeddings.word_embeddings.weight"
FAULTS = {
    "stale pad id": (
        lambda f: change_json(f, "config.json", lambda c: c.update(pad_token_id=300)),
        "special ids", "pad_token_id is 300, the ordinary token",
    ),
    "id beyond the vocabulary": (
        lambda f: change_json(f, "config.json", lambda c: c.update(bos_token_id=900)),
        "special ids", "bos_token_id is 900, the tokenizer has 360 tokens",
    ),
    "pad id of another special token": (
        lambda f: change_json(f, "config.json", lambda c: c.update(pad_token_id=0)),
        "special ids", "the config's pad_token_id is 0, the tokenizer's is 1",
    ),
    "two ids swapped in tokenizer.json": (
        lambda f: change_json(f, "tokenizer.json", lambda t: swap(t["model"]["vocab"])),
        "mapped tokenizer", "token_map.json maps it to",
    ),
    "an id twice in tokenizer.json": (
        lambda f: change_json(f, "tokenizer.json", lambda t: t["model"]["vocab"].update({"strange": 300})),
        "tokenizer ids", "gives id 300 to",
    ),
    "baked padding": (
        lambda f: change_json(f, "tokenizer.json", lambda t: t.update(padding=PADDING)),
        "nothing left over", "holds padding from its last use",
    ),
    "lost bias": (
        lambda f: change_weights(f, lambda t: t.pop("lm_head.bias")),
        "weights", "they would be random",
    ),
    "lost source tokenizer": (
        lambda f: (f / "source_tokenizer.json").unlink(),
        "tokenizer ids", "source_tokenizer.json",
    ),
    "lost map": (lambda f: (f / "token_map.json").unlink(), "tokenizer ids", "token_map.json"),
    "another source tokenizer": (
        lambda f: change_json(f, "source_tokenizer.json", lambda t: t["model"].update(fuse_unk=True)),
        "tokenizer ids", "sha256 differs",
    ),
    "weights cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "weights", "is damaged",
    ),
    "not a number": (
        lambda f: change_weights(f, lambda t: t[EMBEDDINGS].__setitem__((5, 1), float("nan"))),
        "weights", "not finite",
    ),
    "rows exchanged": (
        lambda f: change_weights(f, lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].flip(0).contiguous()})),
        "without glmd", "its output differs",
    ),
    "some bytes of the weights changed": (
        lambda f: change_weights(f, lambda t: t[EMBEDDINGS].__setitem__((300, 3), 0.5)),
        "weights", "model.safetensors is not the file that was exported",
    ),
    "lost probe": (lambda f: (f / "export_probe.json").unlink(), "without glmd", "export_probe.json is missing"),
    "fewer rows than tokens": (
        lambda f: change_json(f, "tokenizer.json", lambda t: t["added_tokens"].append(
            {"id": 360, "content": "<more>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True})),
        "rows", "the tokenizer has 361 tokens, the model 360 rows",
    ),
}  # fmt: skip


def test_a_causal_lm_may_name_another_pad_token_than_its_tokenizer(compressed, tmp_path, no_fresh_process):
    """SmolLM3's does. What pads its texts is masked; a classifier finds the end of a text by its config's pad."""
    folder, found = tmp_path / "student", []
    shutil.copytree(compressed("MistralForCausalLM"), folder)
    for name in ("MistralForCausalLM", "MistralForSequenceClassification"):
        change_json(folder, "config.json", lambda c, name=name: c.update(pad_token_id=0, architectures=[name]))
        found.append({check.name: check.problem for check in verify_folder(folder)}["special ids"])
    assert found == [None, "the config's pad_token_id is 0, the tokenizer's is 2"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(fault, compressed, tmp_path, monkeypatch, capsys):
    damage, name, says = FAULTS[fault]
    if name != "without glmd":
        monkeypatch.setattr("glmd.commands.verify.check_exports", lambda folders: None)
    folder = shutil.copytree(compressed("RobertaForMaskedLM"), tmp_path / "damaged")
    damage(folder)
    problems = {check.name: check.line() for check in verify_folder(folder) if check.problem}
    assert name in problems and says in problems[name], problems
    assert all("\n" not in line and line.startswith("FAIL  ") for line in problems.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of(["GPT2LMHeadModel", "RobertaForMaskedLM"]))
def test_rows_that_moved_by_one_change_the_output_of_the_probe(name, compressed, tmp_path, monkeypatch):
    """Also where the first position and the first words say nothing of it, as in a decoder."""
    folder = shutil.copytree(compressed(name), tmp_path / "moved")
    words = {"GPT2LMHeadModel": "transformer.wte.weight", "RobertaForMaskedLM": EMBEDDINGS}[name]

    def roll(tensors):
        tensors[words][300:] = tensors[words][300:].roll(1, 0)

    change_weights(folder, roll)
    with pytest.raises(ModelError, match="its output differs"):
        check_exports([folder])


def test_a_failing_check_ends_with_code_1(compressed, tmp_path, no_fresh_process, capsys):
    folder = shutil.copytree(compressed("GPT2LMHeadModel"), tmp_path / "damaged")
    (folder / "source_tokenizer.json").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(folder)])
    assert ended.value.code == 1 and "FAIL  mapped tokenizer: " in capsys.readouterr().out


def test_a_file_that_breaks_many_checks_is_told_once(compressed, tmp_path, no_fresh_process):
    folder = tmp_path / "model"
    shutil.copytree(compressed("RobertaForMaskedLM"), folder)
    (folder / "tokenizer.json").write_text("{")
    problems = [check.problem for check in verify_folder(folder) if check.problem]
    assert len(problems) > 3 and len(set(problems)) < len(problems)
    told = [problem for problem in problems if not problem.startswith("not told, for the reason at ")]
    assert len(told) == len(set(told)) and all("'tokenizer ids'" in each for each in problems if each not in told)


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main(["verify", "somebody/some-model"]) == 2
    assert "no such folder; verify reads local folders" in capsys.readouterr().err


def test_verify_leaves_the_folder_as_it_was(compressed, no_fresh_process):
    folder = compressed("T5ForConditionalGeneration")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    state = torch.get_rng_state()
    verify_folder(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(torch.get_rng_state(), state)
