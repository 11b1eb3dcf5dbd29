"""The command line, command by command: what it prints, what it leaves, what its exit code is."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch

from glmd import __version__
from glmd.cli import main


@pytest.fixture
def glmd(capsys):
    """`glmd("report", folder)`: the output of a command that must succeed."""

    def command(*arguments: str | Path) -> str:
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return command


@pytest.fixture
def refused(capsys):
    """`refused("report", folder)`: the one line of a command that must be refused."""

    def command(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert main([str(each) for each in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1, err
        return err

    return command


@pytest.fixture
def no_fresh_process(monkeypatch):
    """Spare `compress` and `export` the proof in a fresh process; test_export has it."""
    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
    monkeypatch.setattr("glmd.models.export.check_exports", lambda folders: None)


def test_version_and_wrong_usage(capsys):
    for arguments, code in ((["--version"], 0), ([], 2), (["ru"], 2), (["report"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
    assert __version__ in capsys.readouterr().out


def plan_lines(text: str) -> dict[str, list[str]]:
    """The grid points of each line of a plan by the first; the last line of a name counts."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {name: grid_points for name, *grid_points in rows}


def test_check_prints_the_plan_and_touches_nothing(glmd, tiny, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("check loads no weights")

    for module in ("tasks", "models"):  # a module that is imported now would keep what it finds in the other
        monkeypatch.setattr(f"glmd.{module}.loading.require_complete", never)
    run = tmp_path / "run"
    text = glmd("check", tiny.root / "run.yaml", f"output_dir={run}", "seeds=[0,1]", "tasks.RTE.max_steps=5")
    lines = plan_lines(text)
    assert lines["teacher"] == ["7,302", "1,462", "5,840", "2", "86", "16"]
    assert lines["student"] == ["4,483", "867", "3,616", "1", "51", "16"]
    assert lines["pretraining"][:3] == ["6", "4", "16"]
    for stage in ("task_teacher", "task_lm", "task_soft_labels"):
        assert lines[f"RTE {stage}"] == ["5", "8", "32", "24", "1,280"]
    assert lines["seeds"] == ["0, 1"] and lines["output"] == [str(run)]
    assert not run.exists()


def test_check_refuses_a_corpus_that_has_changed_since_the_run_began(refused, finished, tiny, tmp_path):
    folder, corpus = finished.copy(tmp_path / "run"), tmp_path / "corpus.txt"
    for path in (folder / "config.yaml", folder / "corpus" / "manifest.json"):
        path.write_text(path.read_text().replace(str(tiny.corpus), str(corpus)))
    corpus.write_text(tiny.corpus.read_text() + "\n\na b c\n")
    for command in ("check", "run"):
        message = refused(command, tiny.root / "run.yaml", f"output_dir={folder}", f"data.corpus=[{corpus}]")
        assert "the token store was made from another corpus (corpus.txt changed)" in message


def test_the_plans_steps_are_those_of_the_run(glmd, finished, tiny):
    text = glmd("check", tiny.root / "run.yaml", f"output_dir={finished.folder}")
    planned = {
        name: int(grid_points[0]) for name, grid_points in plan_lines(text).items() if name.startswith(("RTE", "pretr"))
    }
    trained = {row["stage"]: row["training"]["steps"] for row in finished.results["rows"]}
    assert planned == {
        "pretraining": trained["pretraining"],
        "RTE task_teacher": trained["task_teacher"],
        "RTE task_lm": trained["task_lm"],
        "RTE task_soft_labels": trained["task_soft_labels"],
        "RTE hard_labels": trained["hard_labels"],
    }


@pytest.mark.slow
def test_overrides_may_stand_behind_options_and_nothing_else_may(glmd, capsys):
    lines = [glmd("plan", *words) for words in (
        ("quickstart", "tasks={}", "mixed_precision=bf16", "--device-memory", "1"),
        ("quickstart", "tasks={}", "--device-memory", "1", "mixed_precision=bf16"),
    )]  # fmt: skip
    assert lines[0] == lines[1]
    for word in ("--nonsense=1", "quickstart2"):
        with pytest.raises(SystemExit) as error:
            main(["plan", "quickstart", "--devices", "2", word])
        assert error.value.code == 2 and f"unrecognized arguments: {word}" in capsys.readouterr().err


def test_run_without_a_config_takes_its_first_word_for_an_override(refused):
    assert "pretraining.max_stps is unknown; did you mean max_steps?" in refused("run", "pretraining.max_stps=3")


@pytest.mark.parametrize(
    ("folder", "stage", "system"),
    [
        ("tasks/RTE/seed-0/task_soft_labels/student", "task_soft_labels", "student"),
        ("tasks/RTE/seed-0/hard_labels/student", "hard_labels", "hard labels"),
        ("tasks/RTE/task_teacher/model", "task_teacher", "teacher"),
    ],
)
def test_evaluate_gives_the_score_of_the_run(glmd, finished, tiny, folder, stage, system):
    """Students with their own tokenizer, the stock teacher with its own; other batches than in the run."""
    arguments = ("--task", "rte", "--data", tiny.superglue, "--batch-size", "5", "--max-length", "32")
    text = glmd("evaluate", finished.folder / folder, *arguments)
    scores = dict(line.split() for line in text.splitlines())
    (row,) = (row for row in finished.results["rows"] if (row["stage"], row["system"]) == (stage, system))
    accuracy = f"{row['metrics']['accuracy']:.4f}"
    counts = {"examples": "12", "truncated": "0", "max_length": "32"}
    assert scores == {"casting": "head", **counts, "accuracy": accuracy}


def test_evaluate_refuses_what_does_not_fit(refused, finished, tiny, tmp_path):
    classifier = finished.folder / "tasks/RTE/task_teacher/model"
    assert "are not those of BoolQ" in refused("evaluate", classifier, "--task", "BoolQ", "--data", tiny.superglue)
    assert "did you mean RTE?" in refused("evaluate", classifier, "--task", "RTEE", "--data", tiny.superglue)
    assert "test.jsonl: no such file" in refused(
        "evaluate", classifier, "--task", "RTE", "--data", tiny.superglue, "--split", "test"
    )
    assert "is no folder" in refused("evaluate", tmp_path / "absent", "--task", "RTE", "--data", tiny.superglue)


def test_predict_refuses_before_the_model_is_loaded(refused, finished, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("glmd.commands.evaluate.load_classifier", lambda *_: pytest.fail("loaded"))
    rows = tmp_path / "rows.jsonl"
    row = '{"premise": "a", "hypothesis": "b"'
    common = ("predict", finished.folder / "tasks/RTE/task_teacher/model", "--task", "RTE", "--file", rows)
    rows.write_text(row + ', "idx": 1}\n')
    for output, says in ((tmp_path / "rows.jsonl", "exists already"), (rows / "below.jsonl", "is a file")):
        assert f"--output {output}: {says}; choose another" in refused(*common, "--output", output)
    for lines, says in (
        (
            row + ', "idx": 1}\n' + row + "}\n",
            f"{rows}:2: field 'idx' is missing, by which the leaderboard knows",
        ),
        (f'{row}, "idx": 1}}\n' * 2, f"{rows}:2: idx 1 stands in {rows}:1 too"),
    ):
        rows.write_text(lines)
        assert says in refused(*common, "--output", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    other = (*common[:-1], tmp_path / "rows.xlsx", "--output", tmp_path / "out.jsonl")
    assert "rows.xlsx: rows are read from .jsonl, .csv, .tsv and .parquet files" in refused(*other)


def test_predict_numbers_rows_without_idx(glmd, finished, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"premise": "a", "hypothesis": "b"}\n\n' * 3)
    classifier, output = finished.folder / "tasks/RTE/task_teacher/model", tmp_path / "out.jsonl"
    common = ("--task", "RTE", "--max-length", "32", "--file", tmp_path / "rows.jsonl")
    assert "answers to 3 examples" in glmd("predict", classifier, *common, "--output", output)
    assert [json.loads(line)["idx"] for line in output.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("length", ["7", "0", "x"])
def test_a_length_that_leaves_no_room_for_text_is_wrong_usage(length, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "model", "--task", "RTE", "--data", "x", "--max-length", length])
    assert ended.value.code == 2 and "--max-length" in capsys.readouterr().err


def test_compress_keeps_the_logits_of_kept_tokens_and_loads_with_stock(glmd, tiny, tmp_path, no_fresh_process):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from glmd.vocabulary.tokenizer import load_tokenizer

    output = tmp_path / "half"
    text = glmd("compress", tiny.teacher, output, "--corpus", tiny.corpus, "--keep-ratio", "0.5")
    assert f"{output}: BertForMaskedLM, 43 of 86 tokens" in text
    teacher, student = (AutoModelForMaskedLM.from_pretrained(folder).eval() for folder in (tiny.teacher, output))
    tokenizer, source = load_tokenizer(output), AutoTokenizer.from_pretrained(tiny.teacher)
    kept = [source.convert_tokens_to_ids(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    assert len(kept) == len(set(kept)) == 43 == student.config.vocab_size
    ids = torch.arange(43)[None]
    with torch.no_grad():
        expected = teacher(input_ids=torch.tensor([kept])).logits[..., kept]
        torch.testing.assert_close(student(input_ids=ids).logits, expected)
    assert len(AutoTokenizer.from_pretrained(output)) == 43


def test_compress_refuses_a_full_folder_and_a_missing_size(refused, tiny, finished, tmp_path):
    corpus = ("--corpus", tiny.corpus)
    assert "is not empty; choose another folder" in refused(
        "compress", tiny.teacher, finished.folder, *corpus, "--size", "40"
    )
    assert "--keep-ratio is missing" in refused("compress", tiny.teacher, tmp_path / "out", *corpus)
    assert "keep_ratio must be in (0, 1], got 2.0" in refused(
        "compress", tiny.teacher, tmp_path / "out", *corpus, "--keep-ratio", "2"
    )
    assert not (tmp_path / "out").exists()


def command_with_output(name: str, finished, tiny, output: Path) -> list:
    if name == "export":
        return ["export", finished.folder / "pretraining", output]
    return ["compress", tiny.teacher, output, "--corpus", tiny.corpus, "--keep-ratio", "0.5"]


@pytest.mark.parametrize("name", ["compress", "export"])
def test_an_output_that_cannot_be_a_folder_is_refused_before_any_work(
    refused, finished, tiny, tmp_path, name, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("refused before anything is read")

    monkeypatch.setattr("glmd.commands.compress.build_token_store", never)
    monkeypatch.setattr("glmd.commands.export.load_checkpoint", never)
    monkeypatch.chdir(tmp_path)
    taken, empty, link, working = tmp_path / "taken", tmp_path / "empty", tmp_path / "link", tmp_path / "working"
    taken.touch(), empty.mkdir(), link.symlink_to(empty), working.mkdir()
    for output, problem in (
        (taken, "is a file"),
        (taken / "x", "cannot be written (Not a directory)"),
        (Path("/proc/glmd"), "cannot be written ("),
        (tmp_path / ("x" * 300), "cannot be written (File name too long)"),
        (tmp_path / ("x" * 253), "cannot be written (File name too long)"),
        (tmp_path / "new" / ("x" * 300), "cannot be written (File name too long)"),
        (tmp_path / "a\0b", "holds a NUL character"),
        (link, "cannot be replaced by a folder"),
    ):
        message = refused(*command_with_output(name, finished, tiny, output))
        assert problem in message and message.endswith("; choose another folder\n") and "\0" not in message
    monkeypatch.chdir(working)
    assert "cannot be replaced by a folder" in refused(*command_with_output(name, finished, tiny, Path(".")))
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "empty", "link", "working"}


@pytest.fixture
def interruptible():
    """A job of a shell in the background is born deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_keyboard_interrupt_outside_of_training_is_one_line_and_code_130(
    capsys, monkeypatch, tmp_path, interruptible
):
    monkeypatch.setattr("glmd.reporting.report.load_results", lambda _: signal.raise_signal(signal.SIGINT))
    assert main(["report", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "glmd: interrupted\n"


def test_an_interrupt_in_training_keeps_its_own_exit_code(monkeypatch, tmp_path):
    from glmd.training.trainer import Interrupted

    def interrupted(_):
        raise Interrupted(143)

    monkeypatch.setattr("glmd.reporting.report.load_results", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 143


@pytest.mark.slow
def test_export_writes_the_student_of_an_interrupted_stage(glmd, tiny, tmp_path, monkeypatch, no_fresh_process):
    from transformers import AutoModelForMaskedLM

    from glmd.pipeline.run import run
    from glmd.training.checkpoint import load_checkpoint
    from glmd.training.trainer import Trainer
    from glmd.vocabulary.tokenizer import load_tokenizer

    real = Trainer._step

    def interrupted(self, model, optimizer, teacher, batches, step, max_steps):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return real(self, model, optimizer, teacher, batches, step, max_steps)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(tiny.config(tmp_path / "run", "tasks={}"))
    assert ended.value.code == 130
    text = glmd("export", tmp_path / "run/pretraining", tmp_path / "student")
    assert text == f"{tmp_path / 'student'}: the student after step 5\n"
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "student")
    checkpoint = load_checkpoint(tmp_path / "run/pretraining/checkpoints")
    assert checkpoint is not None and checkpoint.state["progress"]["step"] == 5
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, checkpoint.tensors["model"][f"language_model.{name}"]), name
    assert len(load_tokenizer(tmp_path / "student")) == student.config.vocab_size == 51


def test_export_refuses_what_holds_no_checkpoint(refused, finished, tmp_path):
    message = refused("export", finished.folder / "pretraining", tmp_path / "out")
    assert f"no checkpoint; its finished students are {finished.folder / 'pretraining/student'}" in message
    assert "is not empty; choose another folder" in refused("export", finished.folder / "pretraining", finished.folder)


def test_report_prints_the_table_of_the_run(glmd, refused, finished, tmp_path):
    from glmd.reporting.report import results_table

    assert glmd("report", finished.folder) == results_table(json.loads((finished.folder / "results.json").read_text()))
    assert "no results.json" in refused("report", tmp_path)


def test_run_prints_the_table_once_it_is_complete(glmd, finished, tiny, tmp_path, trusting):
    from glmd.reporting.report import results_table

    folder = finished.copy(tmp_path / "run")
    text = glmd("run", tiny.root / "run.yaml", f"output_dir={folder}")
    assert text.startswith(results_table(finished.results)) and "The student is in\n" in text
    assert str(folder / "tasks/RTE/seed-0/task_soft_labels/student") in text


@pytest.mark.slow
def test_truncation_is_said_once_for_a_task_whatever_its_passes_seeds_and_controls(tiny, tmp_path, trusting, caplog):
    from glmd.pipeline.run import run

    lengths = [f"{name}.max_length=8" for name in ("task_teacher", "task_lm", "task_soft_labels")]
    with caplog.at_level("INFO", "glmd"):
        run(tiny.config(tmp_path / "run", "seeds=[0,1,2]", "pretraining.max_steps=1", *lengths))
    assert caplog.text.count("RTE: 24 of 24 inputs truncated to 8 tokens") == 1
    assert "of 24 inputs" not in caplog.text.replace("RTE: 24 of 24 inputs truncated to 8 tokens", "")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_a_count_that_is_none_is_refused_as_wrong_usage(value, capsys):
    for option in ("--batch-size", "--max-length"):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", "model", "--task", "RTE", "--data", "x", f"{option}={value}"])
        assert ended.value.code == 2
        assert f"argument {option}: '{value}' is no whole number above 0" in capsys.readouterr().err
