"""`analysis: layer_distances`: what it says, that it changes no weight, and what it is refused with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForMaskedLM

from glmd.cli import main
from glmd.data.batches import with_positions
from glmd.pipeline.analysis import LM_LOSS, spearman
from glmd.pipeline.run import run
from glmd.training.trainer import Trainer

NAMES = ["hidden_states.cosine", "hidden_states.mse", "attentions.kl_divergence", "attentions.mse"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if LM_LOSS in row]


def test_distances_are_those_of_both_models_and_the_run_is_the_same_without_them(
    tiny: Any, tmp_path: Path, trusting: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen = []

    def collate_too(self: Any, batch: Any, outputs: Any = None, *more: Any, **named: Any) -> Any:
        seen.append(batch)
        return forward(self, batch, outputs, *more, **named)

    from glmd.distillation.distiller import Distiller

    forward = Distiller.forward
    plain = run(tiny.config(tmp_path / "plain", "tasks={}"))
    monkeypatch.setattr(Distiller, "forward", collate_too)
    results = run(tiny.config(tmp_path / "seen", "tasks={}", "analysis=layer_distances"))
    name = "pretraining/student/model.safetensors"
    ours, theirs = (load_file(tmp_path / folder / name) for folder in ("seen", "plain"))
    assert all(ours[key].equal(theirs[key]) for key in theirs)

    (row,) = [each for each in results["rows"] if each["stage"] == "pretraining"]
    found = row["layer_distances"]
    assert found["steps"] == [0, 2, 4, 6] and [*found] == ["steps", LM_LOSS, *NAMES]
    assert found["lm_loss"] == [each[LM_LOSS] for each in rows_of(tmp_path / "seen")]
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "seen" / "pretraining" / "student")
    teacher = AutoModelForMaskedLM.from_pretrained(tiny.teacher)
    token_map = torch.from_numpy(_token_map(tmp_path / "seen" / "vocabulary"))
    total, tokens, squares = 0.0, 0, 0.0
    for batch in [with_positions(each) for each in seen[-4:]]:  # the last look at the four held-out blocks
        mask = batch["attention_mask"].bool()
        given = {"attention_mask": batch["attention_mask"], "output_hidden_states": True}
        with torch.no_grad():
            a = student(input_ids=token_map[batch["input_ids"]], **given).hidden_states[-1][mask]
            b = teacher(input_ids=batch["input_ids"], **given).hidden_states[-1][mask]
        total, tokens = total + float((1 - cosine_similarity(a, b)).sum()), tokens + len(a)
        squares += float((a - b).square().mean(-1).sum())
    assert found["hidden_states.cosine"]["after"] == pytest.approx([total / tokens], rel=1e-4)
    assert found["hidden_states.mse"]["after"] == pytest.approx([squares / tokens], rel=1e-4)
    assert plain["rows"][0]["training"]["losses"] == row["training"]["losses"]
    assert (tmp_path / "seen" / "pretraining" / "layer_distances.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["report", str(tmp_path / "seen")]) == 0
    said = capsys.readouterr().out
    assert "Spearman with the loss on words" in said and all(each in said for each in NAMES)


def _token_map(folder: Path) -> Any:
    from glmd.vocabulary.vocabulary import Vocabulary

    return Vocabulary.load(folder).token_map


def test_a_killed_run_looks_at_each_step_once(
    tiny: Any, tmp_path: Path, trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step
    dies_at = [1, 5]

    def dying(self: Any, *arguments: Any) -> Any:
        if dies_at and arguments[4] == dies_at[0]:
            dies_at.pop(0)
            raise KeyboardInterrupt
        return step(self, *arguments)

    config = tiny.config(tmp_path / "run", "tasks={}", "analysis=layer_distances")
    monkeypatch.setattr(Trainer, "_step", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(config)
    results = run(config)
    whole = run(tiny.config(tmp_path / "whole", "tasks={}", "analysis=layer_distances"))
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 2, 4, 6]
    killed, undisturbed = (each["rows"][0]["layer_distances"] for each in (results, whole))
    assert killed == undisturbed


def test_rank_correlations_are_those_of_ranks_with_means_for_ties() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 45]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [8, 7, 6, 5]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)  # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    assert spearman([1, 2], [1, 2]) is None and spearman([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["analysis=layers"], "analysis must be one of none, layer_distances"),
        (["analysis=layer_distances", "method=kd"], "analysis has no effect: method kd has no pretraining"),
        (
            ["analysis=layer_distances", "teacher.cache=c", "teacher.cached_stages=[pretraining]"],
            "pretraining of method glmd has analysis layer_distances, which the cache does not keep; it can serve "
            "task_lm, task_soft_labels",
        ),
        (["method={method}", "torch_compile=true"], "compares attention_inputs, which compiled code does not show"),
    ],
)
def test_what_an_analysis_cannot_be_beside_is_refused_by_check(
    given: list[str], message: str, tiny: Any, tmp_path: Path, write: Any, capsys: Any
) -> None:
    method = write("values.yaml", "pretraining: [{signal: values, loss: relation_kl}]\ntask_soft_labels: "
                   "[{signal: task_logits, loss: mse}]")  # fmt: skip
    words = ["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}"]
    assert main([*words, *(each.format(method=method) for each in given)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
