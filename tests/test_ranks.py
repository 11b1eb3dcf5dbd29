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
    script = Path(__file__).with_name("rank_scenarios.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def ends(root: Path, name: str) -> tuple[list[int | None], list[str]]:
    """Exit codes and errors of both ranks, which must have ended in time."""
    ranks: list[list[Any]] = json.loads((root / "ends.json").read_text())[name]
    assert all(seconds is not None and seconds < SECONDS for _, seconds, _ in ranks), f"{name}: hung: {ranks}"
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


def test_layers_run_again_in_the_backward_change_no_bit_on_two_ranks(root: Path) -> None:
    assert ends(root, "run again")[0] == [0, 0]
    for ours in weights(root, "run again"):
        assert_equal(ours, weights(root, "undisturbed")[0])


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


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_distiller_sharded_by_fsdp2_trains_as_under_ddp(root: Path, head: str) -> None:
    """Only the module: the trainer saves and loads whole parameters, and does not shard."""
    codes, said = ends(root, f"sharded, {head}")
    assert codes == [0, 0], said
    for rank in range(2):
        found = json.loads((root / f"sharded, {head}" / f"rank-{rank}.json").read_text())
        assert found["sharded"] > found["names"] / 2, "else nothing was compared"
        for kind in ("losses", "norms"):
            assert found[kind][::2] == pytest.approx(found[kind][1::2], rel=1e-5)
        assert found["error"] < 1e-6
