"""One thread a test process, one seed a test."""

import pytest
import torch

torch.set_num_threads(1)  # workers that share cores slow each other down many times over


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
