"""bench/dry_run.py: the plan and the formulas against the code itself, at full size, without memory."""
import re
import subprocess
import sys

import pytest

from bench.common import forward_flops, read_shape
from world import REPO

pytestmark = pytest.mark.slow


def told(*arguments):
    """-> the numbers of each line that it prints, by its first word"""
    command = [sys.executable, "-m", "bench.dry_run", *arguments]  # its process group is a fake
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    return {line.split()[0]: [float(x) for x in re.findall(r"-?[0-9.]*[0-9]", line)]
            for line in done.stdout.splitlines()}


@pytest.mark.parametrize("how", [[], ["train.activation_checkpointing=true", "train.kl_coef=0"]])
def test_a_7b_step(how):
    found = told("configs/table1/7b/grpo.yaml", *how)
    peak, planned, _ = found["memory"]
    assert abs(planned / peak - 1) < 0.1
    shape, trees, layers, rest = read_shape("7b"), 8, 6.525e9, 1.09e9  # parameters
    gathered = found["wire"][2]
    # Forward and backward gather each layer (the last is kept), embedding and head once; the reference too.
    least = 2 * 7 / 8 * (layers * 2 + rest) / 1e9
    assert least * 0.97 < gathered < least * 1.6
    forward = forward_flops(shape, trees * (600 + 5 * 49), trees * 5 * 50) / 1e12
    # Forward once, backward twice; then the reference, or each layer again as far as it is needed.
    low, high = (3.7, 3.9) if how else (4.05, 4.2)
    assert low * forward < found["FLOP"][0] < high * forward
    assert found["FLOP"][1] == pytest.approx(forward_flops(shape, trees * 600, trees) / 1e12, rel=0.02)
    assert found["FLOP"][2] == pytest.approx(forward_flops(shape, 40, 40) / 1e12, rel=0.06)
