"""Two ranks on the CPU: they stop together, for what one of them alone met, and a resume gives the same bits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow
SECONDS = 60  # within which all ranks must have ended, on a busy machine; each scenario takes about two


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios of rank_scenarios.py, played."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parents[1] / "rank_scenarios.py"
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def ends(root: Path, name: str, limit: float = SECONDS) -> tuple[list[int | None], list[str]]:
    """Exit codes and errors of both ranks, which must have ended in time."""
    ranks: list[list[Any]] = json.loads((root / "ends.json").read_text())[name]
    assert all(seconds is not None and seconds < limit for _, seconds, _ in ranks), f"{name}: hung: {ranks}"
    return [code for code, _, _ in ranks], [said for _, _, said in ranks]


def weights(root: Path, folder: str, ranks: int = 2) -> list[dict[str, torch.Tensor]]:
    return [torch.load(root / folder / f"rank-{rank}.pt", weights_only=True) for rank in range(ranks)]


def log_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def checkpoints(root: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (root / folder / "checkpoints").iterdir())


def test_both_ranks_end_with_the_same_weights(root: Path) -> None:
    assert ends(root, "undisturbed")[0] == [0, 0]
    assert_equal(*weights(root, "undisturbed"))


def test_a_signal_to_one_rank_ends_both_after_the_same_step_with_its_code(root: Path) -> None:
    assert ends(root, "signal")[0] == [143, 143]
    # What it had saved is gone on from, to the bits of a run that got no signal.
    assert ends(root, "signal, resumed")[0] == [0, 0]
    for ours in weights(root, "signal"):
        assert_equal(ours, weights(root, "undisturbed")[0])


def test_a_rank_that_is_killed_takes_the_other_down_and_a_resume_ends_in_the_same_bits(root: Path) -> None:
    codes, _ = ends(root, "killed")
    assert codes[1] == -9 and codes[0] not in (0, None)
    assert ends(root, "killed, resumed")[0] == [0, 0]
    for ours in weights(root, "killed"):
        assert_equal(ours, weights(root, "undisturbed")[0])


def test_a_main_rank_that_is_killed_in_a_save_leaves_the_checkpoint_before_and_a_resume_ends_in_the_same_bits(
    root: Path,
) -> None:
    codes, _ = ends(root, "killed in a save")
    assert codes[0] == -9 and codes[1] not in (0, None)
    assert ends(root, "killed in a save, resumed")[0] == [0, 0]
    for ours in weights(root, "killed-in-a-save"):
        assert_equal(ours, weights(root, "undisturbed")[0])


def test_ranks_with_loader_workers_that_are_killed_in_an_evaluation_resume_to_the_same_bits_of_the_best(
    root: Path,
) -> None:
    assert ends(root, "scored")[0] == [0, 0]
    assert ends(root, "killed while scored")[0][1] == -9
    assert ends(root, "killed while scored, resumed")[0] == [0, 0]
    for ours in [*weights(root, "scored"), *weights(root, "killed-while-scored")]:
        assert_equal(ours, weights(root, "scored")[0])
    assert not torch.equal(*(next(iter(weights(root, name)[0].values())) for name in ("scored", "undisturbed")))


def test_the_main_rank_alone_chooses_the_checkpoint_and_the_best_one(root: Path) -> None:
    """Another rank may see no file of it yet, or round a score otherwise: it goes by what it is told."""
    assert ends(root, "killed again")[0][1] == -9
    codes, said = ends(root, "blind, resumed")
    assert codes == [0, 0], said
    codes, said = ends(root, "apart")
    assert codes == [0, 0], said
    for folder, twin in (("blind", "undisturbed"), ("apart", "scored")):
        for ours in weights(root, folder):
            assert_equal(ours, weights(root, twin)[0])


def test_layers_run_again_in_the_backward_change_no_bit_on_two_ranks(root: Path) -> None:
    for name, folder, twin in (
        ("run again", "run again", "undisturbed"),
        ("fsdp2, run again", "fsdp2-run-again", "fsdp2"),
    ):
        codes, said = ends(root, name)
        assert codes == [0, 0], said
        for ours in weights(root, folder):
            assert_equal(ours, weights(root, twin)[0])


def test_what_two_ranks_began_one_process_ends_with_the_same_batches_and_dropout(root: Path) -> None:
    assert ends(root, "elastic")[0][1] == -9
    codes, said = ends(root, "elastic, resumed")
    assert codes == [0], said
    ours, theirs = weights(root, "elastic", 1)[0], weights(root, "whole")[0]
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    losses = [[row["loss"] for row in log_rows(root / name)] for name in ("elastic", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_rank_that_refuses_its_data_takes_the_other_down_and_says_why(root: Path) -> None:
    codes, said = ends(root, "raised")
    assert codes[1] == 2 and said[1] == "DataError: rows.jsonl:7: cannot be read" and codes[0] not in (0, None)
    assert checkpoints(root, "raised") == ["step-000002"]


def test_a_nan_on_one_rank_stops_both_before_the_step_with_the_examples_of_both(root: Path) -> None:
    codes, said = ends(root, "nan")
    assert codes == [3, 3] and said[0] == said[1]
    assert said[0].startswith("NumericsError: pretraining: step 3: loss [nan")
    bad = log_rows(root / "nan")[-1]
    assert bad["step"] == 3 and len(set(bad["examples"])) == 12 and str(bad["examples"]) in said[0]
    assert checkpoints(root, "nan") == ["step-000002"]


def test_a_tolerated_nan_on_one_rank_is_left_out_by_both(root: Path) -> None:
    assert ends(root, "nan, tolerated")[0] == [0, 0]
    first, second = weights(root, "tolerated")
    assert_equal(first, second)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in first.values())


@pytest.fixture(scope="module")
def twins(root: Path) -> list[dict[str, Any]]:
    """What each rank found of stages under DDP and their twins under FSDP2."""
    codes, said = ends(root, "twins", 3 * SECONDS)  # twelve pairs of stages
    assert codes == [0, 0], said
    return [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(2)]


# Each layer is gathered by itself, and all else together.
GROUPS = {"tied": 2, "untied": 2, "one group": 1, "bf16": 2, "layers": 3, "idle ranks": 2}
GROUPS |= {"llama": 3, "gpt2": 3, "electra": 3, "mobilebert": 3, "albert": 1, "modernbert": 3}


@pytest.mark.parametrize("stage", GROUPS)
def test_a_sharded_stage_trains_and_logs_as_under_ddp(twins: list[dict[str, Any]], stage: str) -> None:
    """With dropout, accumulation and clipping; language model and classifier share a backbone."""
    for found in (rank[stage] for rank in twins):
        assert found["error"] < 1e-6 and found["groups"] == GROUPS[stage]
        for ddp, fsdp2 in zip(*found["logs"], strict=True):
            assert fsdp2.pop("stage") == ddp.pop("stage") and fsdp2 == pytest.approx(ddp, rel=1e-5)
    shares = [rank[stage]["parts"] for rank in twins]
    assert not any(each["ddp"] for each in shares) and len(shares[0]["fsdp2"]) == twins[0][stage]["names"]
    for name, share in shares[0]["fsdp2"].items():
        assert share + shares[1]["fsdp2"][name] == 1 and share < 1, f"{name} is not shared out"
    assert twins[0][stage]["idle"] + twins[1][stage]["idle"] > 0 or stage != "idle ranks"


@pytest.mark.parametrize("name", ["pair", "opt", *list(GROUPS)[-6:]])
def test_a_sharded_teacher_answers_and_scores_as_a_whole_one(twins: list[dict[str, Any]], name: str) -> None:
    """To the bit; the ranks score unequal numbers of batches. Each holds half of the backbone, and the whole head."""
    for found in (rank["teachers"][name] for rank in twins):
        assert found["shared"] == found["whole"] and ("bits" in found["whole"]) == (name in ("opt", "llama", "gpt2"))
        assert found["parts"] and set(found["parts"].values()) == {0.5}


def test_the_best_of_a_sharded_stage_is_that_of_ddp_and_the_student_is_whole(twins: list[dict[str, Any]]) -> None:
    for found in (rank["tied"] for rank in twins):
        assert found["best"][0] == found["best"][1] == ["step-000001"]
        assert [row["step"] for row in found["logs"][1] if "score" in row] == [1, 2, 3, 4, 5, 6]


def test_a_sharded_stage_that_was_killed_is_resumed_to_the_same_bits_on_all_ranks(root: Path) -> None:
    assert ends(root, "fsdp2")[0] == [0, 0]
    assert ends(root, "fsdp2, killed")[0][0] == -9, "in the middle of a save"
    codes, said = ends(root, "fsdp2, resumed")
    assert codes == [0, 0], said
    for ours in [*weights(root, "fsdp2"), *weights(root, "fsdp2-killed")]:
        assert_equal(ours, weights(root, "fsdp2")[0])


def test_a_stage_goes_from_ddp_to_fsdp2_and_on_to_one_process(root: Path) -> None:
    """Checkpoints hold whole tensors by name, whoever shares them."""
    assert ends(root, "ddp, killed")[0][1] == -9
    codes, said = ends(root, "ddp, then fsdp2")
    assert codes == [143, 143], said
    codes, said = ends(root, "then one process")
    assert codes == [0], said
    ours, theirs = weights(root, "switched", 1)[0], weights(root, "whole")[0]
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_tolerated_nan_on_one_rank_is_left_out_of_a_sharded_stage(root: Path) -> None:
    codes, said = ends(root, "fsdp2, nan tolerated")
    assert codes == [0, 0], said
    first, second = weights(root, "fsdp2-tolerated")
    assert_equal(first, second)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, weights(root, "tolerated")[0][name], rtol=1e-5, atol=1e-6)
