"""What a run says of its students is true: the folders are there, and the lines of Python run without glmd."""

import subprocess
import sys

import pytest

from glmd.commands.usage import describe_students, usage


@pytest.mark.slow
def test_every_student_is_named_and_its_line_runs(finished):
    text = describe_students(finished.config, finished.results)
    student = finished.folder / "tasks/RTE/seed-0/task_soft_labels/student"
    lines = [line.strip() for line in text.splitlines()]
    assert lines[:2] == ["The student is in", str(student)] and student.is_dir()
    assert "text_pair" in lines[-1] and "trust_remote_code=True" in lines[-1]
    words = usage(finished.folder / "pretraining/student")
    assert "fill-mask" in words and "[MASK]" in words
    done = subprocess.run([sys.executable, "-P", "-c", f"{lines[-1]}\n{words}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'label': '" in done.stdout and "'token_str': '" in done.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [("GPT2LMHeadModel", 'pipeline("text-generation"'), ("BertForMultipleChoice", "AutoModelForMultipleChoice.from")],
)
def test_the_line_is_that_of_the_folders_head(models, tmp_path, name, says):
    import transformers

    folder = models / name
    if not folder.is_dir():
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.BertConfig(vocab_size=100, **sizes)
        folder = tmp_path / name
        getattr(transformers, name)(config).save_pretrained(folder)
    assert says in usage(folder) and "trust_remote_code" not in usage(folder), "it has the stock tokenizer"


def test_a_compressed_decoder_that_transformers_cannot_open_alone_is_trusted_in_its_line(models, tmp_path, monkeypatch):
    """Of some model types transformers has no tokenizer class: there the stock tokenizer does not open by itself."""
    from glmd.commands.compress import compress_model

    monkeypatch.setattr("glmd.commands.compress.check_exports", lambda folders: None)
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM"):
        compress_model(models / name, tmp_path / name, corpus=models / "corpus.txt", keep_ratio=0.9)
    monkeypatch.setattr("glmd.commands.usage.opens_plainly", lambda config: config.model_type == "gpt2")
    assert "trust_remote_code" not in usage(tmp_path / "GPT2LMHeadModel")
    assert "trust_remote_code=True" in usage(tmp_path / "LlamaForCausalLM")
