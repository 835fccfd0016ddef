"""Sources that a checkpoint names."""

import pytest

import normswap


def test_source_cannot_name_code() -> None:
    with pytest.raises(normswap.CheckpointError, match="is not a model of timm or torchvision"):
        normswap.Source("os", "system")
