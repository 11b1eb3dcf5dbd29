"""Sizes beyond data, memory or reason are refused before anything is trained, with the largest that fits."""

import pytest

from glmd.errors import ConfigError, DataError
from glmd.planning.limits import require_room, require_sizes
from glmd.planning.plan import make_plan
from glmd.planning.run_cost import Layout

HUGE = 1_000_000_000


def sizes(tiny, tmp_path, *overrides, **options):
    config = tiny.config(tmp_path / "run", *overrides)
    require_sizes(make_plan(config), config.data.corpus, **options)


@pytest.mark.parametrize("given", [100, HUGE, 10**30])
@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("task_lm.per_device_train_batch_size", 24),
        ("tasks.RTE.per_device_train_batch_size", 24),
        ("task_soft_labels.gradient_accumulation_steps", 8),  # 8 texts a micro-batch, steps of 64 are small
        ("task_teacher.per_device_eval_batch_size", 64),
    ],
)
def test_what_is_beyond_a_tasks_data_is_refused_with_what_fits(tiny, tmp_path, key, most, given):
    with pytest.raises(ConfigError, match=rf"{given:,}.* RTE has 24 .*; give at most {most}$"):
        sizes(tiny, tmp_path, f"{key}={given}")
    sizes(tiny, tmp_path, f"{key}={most}")


@pytest.mark.parametrize(
    "key",
    ["data.eval_blocks", "pretraining.per_device_train_batch_size", "pretraining.gradient_accumulation_steps",
     "pretraining.per_device_eval_batch_size"],
)  # fmt: skip
def test_what_is_beyond_the_corpus_is_refused_with_what_fits(tiny, tmp_path, key):
    with pytest.raises(ConfigError, match=r"is 1,000,000,000.* of 16 tokens; give at most ") as error:
        sizes(tiny, tmp_path, f"{key}={HUGE}")
    fits = str(error.value).rpartition("at most ")[2].removesuffix(", a fifth of them").replace(",", "")
    sizes(tiny, tmp_path, f"{key}={fits}")


def test_a_cell_of_a_sweep_is_refused_like_a_stage(tiny, tmp_path):
    with pytest.raises(ConfigError, match="per_device_train_batch_size of RTE task_soft_labels is 5,000"):
        sizes(tiny, tmp_path, "sweep.task_soft_labels.per_device_train_batch_size=[8, 5000]")


def test_a_large_corpus_is_bounded_by_its_bytes_and_not_read(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("glmd.planning.limits.READ_WHOLE", 0)
    monkeypatch.setattr("glmd.planning.limits.estimated_tokens", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError, match="the corpus is at most "):
        sizes(tiny, tmp_path, f"pretraining.per_device_train_batch_size={HUGE}")


def test_a_corpus_of_too_few_blocks_is_refused_with_their_number(tiny, tmp_path, write):
    corpus = f"data.corpus=[{write('corpus.txt', 'a b c')}]"
    with pytest.raises(DataError, match=r"corpus: 3 tokens are 1 block of 16; at least 5 are needed"):
        sizes(tiny, tmp_path, corpus)


def test_more_loader_workers_than_any_machine_uses_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"dataloader_num_workers: 1,000 processes .*; give at most 32"):
        sizes(tiny, tmp_path, "dataloader_num_workers=1000")


@pytest.mark.parametrize(
    ("setting", "most"),
    [("save_steps", "1,000,000,000"), ("max_steps", "1,000,000,000"), ("max_length", "1,000,000"),
     ("num_maskings", "10,000"), ("logging_steps", "1,000,000,000")],
)  # fmt: skip
def test_a_number_beyond_reason_is_refused_by_the_config_alone(tiny, tmp_path, setting, most):
    with pytest.raises(ConfigError, match=rf"pretraining.{setting} must be in \S\S+, {most}\], got {10**18}"):
        tiny.config(tmp_path / "run", f"pretraining.{setting}={10**18}")


def test_a_batch_beyond_the_memory_is_refused_with_one_that_fits(tiny, tmp_path):
    key = "pretraining.per_device_train_batch_size"
    layout = Layout(device_memory=5e5)
    with pytest.raises(
        ConfigError, match=rf"{key.partition('.')[2]} of pretraining is 80, .* give at most \d+$"
    ) as error:
        require_room(make_plan(tiny.config(tmp_path / "run", f"{key}=80", "tasks={}")), layout)
    fits = int(str(error.value).rpartition(" ")[2])
    assert 1 <= fits < 80
    require_room(make_plan(tiny.config(tmp_path / "run", f"{key}={fits}", "tasks={}")), layout)


def test_a_batch_to_score_beyond_the_memory_is_refused(tiny, tmp_path):
    plan = make_plan(tiny.config(tmp_path / "run", "pretraining.per_device_eval_batch_size=1000", "tasks={}"))
    with pytest.raises(ConfigError, match="per_device_eval_batch_size of pretraining is 1,000, of which about"):
        require_room(plan, Layout(device_memory=2e6))


def test_check_and_run_refuse_an_absurd_batch_and_leave_nothing(tiny, tmp_path, capsys):
    from glmd.cli import main

    for command in ("check", "run", "plan"):
        words = [f"output_dir={tmp_path / 'run'}", f"pretraining.per_device_train_batch_size={HUGE}"]
        assert main([command, str(tiny.root / "run.yaml"), *words]) == 2
        assert "; give at most " in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()
