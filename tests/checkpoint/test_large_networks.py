"""A network goes from disk to disk without being in memory twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import large
import pytest
import torch
from equality import assert_same_state
from safetensors.torch import load_file

import normswap


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks the kernel what is in memory")
def test_converting_from_disk_to_disk_takes_one_network_of_memory(tmp_path: Path) -> None:
    tests = Path(large.__file__)
    weights, out = tmp_path / "weights.safetensors", tmp_path / "OUT"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), *sys.path])}
    ran = subprocess.run(
        [sys.executable, str(tests), str(weights), str(out)], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["anonymous"] < 1.7 * found["size"]

    model = large.large()
    model.load_state_dict(load_file(weights))
    plain = normswap.convert(model, example_input=torch.zeros(2, 512, 4, 4), batches="synthetic")
    assert_same_state(normswap.load(out, model=large.large()), plain)
