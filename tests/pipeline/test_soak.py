"""A short soak: the long one is `python benchmarks/soak.py --kills 100`."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
pytestmark = [pytest.mark.slow, pytest.mark.full]


def test_a_run_under_a_random_killer_ends_in_the_bits_of_an_undisturbed_one(tiny):
    command = [sys.executable, str(SOAK), "--config", str(tiny.root / "run.yaml"), "--kills", "8", "--no-proof"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "every student is bit for bit that of the undisturbed run" in done.stdout
