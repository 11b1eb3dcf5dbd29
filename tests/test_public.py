"""The Python API behaves as the command line does: paths of either kind, and one line for what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

import glmd
from glmd.errors import ConfigError, GlmdError
from glmd.public import public


def test_completion_shows_every_public_name_without_loading_torch():
    code = "import sys, glmd; assert set(glmd.__all__) <= set(dir(glmd)); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    for name in glmd.__all__:
        if name != "__version__":
            assert getattr(glmd, name).__doc__, name


def test_a_name_that_is_none_is_answered_with_those_there_are():
    with pytest.raises(AttributeError, match=r"has no attribute 'compres'; it has .*compress_model"):
        glmd.compres  # noqa: B018


@pytest.mark.parametrize(
    "name", ["compress_model", "evaluate_folder", "evaluate_text", "export_folder", "load_results", "predict_file",
             "verify_folder"],
)  # fmt: skip
def test_wrong_arguments_are_one_line(name):
    function = getattr(glmd, name)
    with pytest.raises(GlmdError, match=rf"{name}\(.*missing a required argument"):
        function()
    if name != "compress_model":
        with pytest.raises(GlmdError, match=f"{name} takes no max_lenth"):
            function("a", max_lenth=3)


def test_a_mistyped_keyword_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="evaluate_text takes no max_lenth; did you mean max_length"):
        glmd.evaluate_text("a", "b", max_lenth=3)
    with pytest.raises(ConfigError, match="keep_ration is unknown; did you mean keep_ratio"):
        glmd.compress_model("a", tmp_path / "out", corpus=["b"], keep_ration=0.5)
    with pytest.raises(ConfigError, match=r"keep_ratio must be a number, got '0.5'"):
        glmd.compress_model("a", tmp_path / "out", corpus=["b"], keep_ratio="0.5")
    with pytest.raises(ConfigError, match="techer is unknown; did you mean teacher"):
        glmd.run("minilm-superglue", techer="a")


def test_an_error_within_a_function_is_not_taken_for_a_wrong_argument():
    @public
    def broken(a: int) -> int:
        return a + "b"  # type: ignore[operator]

    with pytest.raises(TypeError, match="unsupported operand"):
        broken(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [str, Path])
def test_text_and_path_are_alike(kind, finished, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
    monkeypatch.setattr("glmd.models.export.check_exports", lambda folders: None)
    monkeypatch.setattr("glmd.commands.verify.check_exports", lambda folders: None)
    half, stock, student = (
        tmp_path / "half",
        tmp_path / "stock",
        finished.folder / "tasks/RTE/seed-0/task_soft_labels/student",
    )
    assert f"{half}: Bert" in glmd.compress_model(kind(tiny.teacher), kind(half), corpus=kind(tiny.corpus), size=50)
    assert glmd.export_folder(kind(half), kind(stock), kind="stock").endswith(", stock")
    assert not [check for check in glmd.verify_folder(kind(half)) if check.problem]
    scores = glmd.evaluate_folder(kind(student), "RTE", kind(tiny.superglue))
    assert (scores["max_length"], scores["examples"]) == (32, 12)
    rows = tiny.superglue / "RTE" / "val.jsonl"
    assert glmd.predict_file(kind(student), "RTE", kind(rows), kind(tmp_path / "out.jsonl")) == 12
    assert glmd.load_results(kind(finished.folder)) == finished.results
    assert len(glmd.load_tokenizer(kind(half))) == 50


@pytest.mark.parametrize("of", ["path", "text", "mapping", "config"])
def test_a_run_is_given_as_file_mapping_or_config(of, finished, tiny, tmp_path, trusting):
    from glmd.strict_yaml import load_yaml

    folder, file = finished.copy(tmp_path / "run"), tiny.root / "run.yaml"
    given = {"path": file, "text": str(file), "mapping": load_yaml(file), "config": glmd.load_config(file)}[of]
    assert glmd.run(given, "pretraining.logging_steps=3", output_dir=folder) == finished.results


def test_a_mapping_is_checked_like_a_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config: pretraining.max_stps is unknown; did you mean max_steps"):
        glmd.load_config({"output_dir": tmp_path, "pretraining": {"max_stps": 1}})
    config = glmd.load_config({"output_dir": tmp_path, "teacher": Path("t"), "pretraining.max_steps": 7}, "seeds=[1]")
    assert (config.output_dir, config.teacher.model) == (str(tmp_path), "t")
    assert (config.pretraining.max_steps, config.seeds) == (7, [1])
    assert glmd.load_config(config) == config
