"""Fixtures shared by all tests: everything is small, made on the spot, offline, on the CPU."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as the command line does
os.environ["OMP_NUM_THREADS"] = "1"  # the last bits of a sum depend on it, here and in the processes of tests

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings

# The same examples in every run: a change is judged by what it changes. `--hypothesis-profile=search` looks further.
settings.register_profile("search", deadline=None)
settings.register_profile("default", derandomize=True, deadline=None)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of most slow tests, so that no worker is left alone with one; skip what needs a GPU."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    wanted = [item for item in items if item.get_closest_marker("cuda") is not None]
    if wanted:
        import torch

        if not torch.cuda.is_available():
            for item in wanted:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and models beside the checkout; tests marked `real` skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no folder with real data beside the checkout")
    return SHARED


@dataclass(frozen=True)
class Tiny:
    """A folder with a teacher (random BERT masked LM and its tokenizer), a corpus and an RTE-like task."""

    root: Path
    teacher: Path
    corpus: Path
    superglue: Path

    def config(self, output_dir: Path, *overrides: str) -> Any:
        """A run of seconds on all of it: `tiny.config(tmp_path / "run", "seeds=[0,1]")`."""
        from glmd.config_file import load_config

        return load_config(self.root / "run.yaml", [f"output_dir={output_dir}", *overrides])


RUN = """
output_dir: replaced
teacher: {teacher}
student: {{num_hidden_layers: 1}}
vocabulary: {{keep_ratio: 0.6}}
data: {{corpus: ["{corpus}"], superglue: "{superglue}", eval_blocks: 4}}
tasks: {{RTE: {{}}}}
pretraining: {{max_steps: 6, max_length: 16, per_device_train_batch_size: 4, learning_rate: 1e-3,
  logging_steps: 2, save_steps: 2}}
task_teacher: {{num_train_epochs: 1, per_device_train_batch_size: 8, learning_rate: 1e-3, max_length: 32,
  save_steps: 2}}
task_lm: {{num_train_epochs: 1, per_device_train_batch_size: 8, learning_rate: 1e-3, max_length: 32,
  save_steps: 2}}
task_soft_labels: {{num_train_epochs: 1, per_device_train_batch_size: 8, learning_rate: 1e-3, max_length: 32,
  save_steps: 2}}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A world of 60 tokens. Nothing in it is worth learning; what is tested is what happens to it."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    letters = list("abcdefghij")
    words = sorted({"".join(rng.choice(letters, 4)) for _ in range(60)})
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), ".", *words]
    vocab = {entry: i for i, entry in enumerate(entries)}
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=64)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(entries),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,  # so that the random teacher has opinions
    )
    teacher = root / "teacher"
    BertForMaskedLM(config).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)

    def sentence(length: int) -> str:
        # A long tail: low ranks are frequent, so that a vocabulary can be cut.
        ranks = np.minimum(rng.zipf(1.3, length) - 1, len(words) - 1)
        return " ".join(words[rank] for rank in ranks) + " ."

    documents = ["\n".join(sentence(int(rng.integers(5, 15))) for _ in range(4)) for _ in range(20)]
    (root / "corpus.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    for split, count in (("train", 24), ("val", 12)):
        path = root / "superglue" / "RTE" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "premise": sentence(int(rng.integers(3, 10))),
                "hypothesis": sentence(3),
                "label": ("entailment", "not_entailment")[i % 2],
                "idx": i,
            }
            for i in range(count)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    places = {"teacher": teacher, "corpus": root / "corpus.txt", "superglue": root / "superglue"}
    (root / "run.yaml").write_text(RUN.format(**places), encoding="utf-8")
    return Tiny(root, **places)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models of many classes, each in a folder of its name, and a corpus for them."""
    from families import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@dataclass(frozen=True)
class FinishedRun:
    """A whole run of `tiny` to its end. Tests read it; one that writes takes a copy."""

    config: Any
    folder: Path
    results: dict[str, Any]

    def copy(self, folder: Path) -> Path:
        shutil.copytree(self.folder, folder)
        return folder


@pytest.fixture(scope="session")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One run shared by all tests, the proof of its exported folders in a fresh process included."""
    from glmd.pipeline.run import run

    config = tiny.config(tmp_path_factory.mktemp("finished") / "run")
    return FinishedRun(config, Path(config.output_dir), run(config))


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a run the proof of its exports: a process of six seconds, which `finished` and test_export have."""
    monkeypatch.setattr("glmd.pipeline.exports.check_exports", lambda folders: None)
    monkeypatch.setattr("glmd.pipeline.run.stranger_ahead", nullcontext)


@pytest.fixture
def no_added_losses() -> Iterator[None]:
    """Losses that a test adds are taken away again."""
    from glmd.distillation.signals import SIGNALS
    from glmd.losses.rows import ROW_LOSSES

    tables: list[Any] = [ROW_LOSSES, *(signal.losses for signal in SIGNALS.values())]
    before = [dict(table) for table in tables]
    yield
    for table, was in zip(tables, before, strict=True):
        for key in table.keys() - was:
            del table[key]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """`write("a.yaml", text)` puts a file into the test's folder and returns its path."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every batch that a live teacher is asked for, or a cache is made of."""
    from glmd.distillation.teacher import OnlineTeacher
    from glmd.distillation.teacher_cache import TeacherCache

    calls: list[str] = []
    live, write = OnlineTeacher.__call__, TeacherCache.write_shard

    def answer(teacher: OnlineTeacher, batch: Any) -> Any:
        calls.append("live")
        return live(teacher, batch)

    def written(cache: TeacherCache, *rest: Any, **options: Any) -> None:
        before = len(calls)
        write(cache, *rest, **options)
        calls[before:] = ["cache"] * (len(calls) - before)

    monkeypatch.setattr(OnlineTeacher, "__call__", answer)
    monkeypatch.setattr(TeacherCache, "write_shard", written)
    return calls
