"""Processes that work together calibrate as one does."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import normswap
from normswap.calibration.calibration import calibration
from normswap.demo.digits import digits_resnet, load_digits

STEPS = 24


def calibrated(rank: int, world: int) -> tuple[nn.Module, dict[str, float]]:
    """Calibrate on every world-th of the images, in batches that make 32 together."""
    model, (images, *_) = digits_resnet().double(), load_digits()
    images = images[:320].double()
    own = [batch[rank::world] for batch in images.split(32)]
    converted = normswap.convert(model, example_input=torch.zeros(2, 1, 8, 8, dtype=torch.float64))
    result = calibration(converted, model, own[:8], steps=STEPS, held_back=own[8:])
    return converted, result.scores


def work(rank: int, world: int, port: int, folder: str) -> None:
    """Calibrate as one of several processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    converted, scores = calibrated(rank, world)
    torch.save((converted.state_dict(), scores), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_get_what_one_gets(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (2, port, str(tmp_path)), nprocs=2)
    one, scores = calibrated(0, 1)
    assert list(scores) == ["converted", "equalized", "distilled"]
    states: list[dict[str, Tensor]] = []
    for rank in range(2):
        state, theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert theirs == pytest.approx(scores, rel=1e-5)
        states.append(state)
    for key, value in one.state_dict().items():
        assert torch.equal(states[0][key], states[1][key]), key
        torch.testing.assert_close(
            states[0][key], value, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key} {text}"
        )
