"""Layers of which another holds nearly the same filters: a moving average of them, as momentum encoders are."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ALIKE = 0.9
"""Least cosine between the filters of a layer and those of its average; other layers' are nearly orthogonal."""

ROWS, COLUMNS = 8, 128
"""Filters, and values of each, that are looked at."""

FEWEST = 16
"""Values by which layers can be told apart."""


def moving_averages(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return, by name, another layer that holds nearly the same filters, for the layers of which there is one.

    Whoever averages the one into the other mixes their filters, which must have the same scales and signs.
    """
    alike: dict[tuple[object, ...], dict[str, Tensor]] = {}
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is not None and not weight.is_meta and weight.is_floating_point():
            part = weight.detach()[:ROWS].flatten(1)[:, :COLUMNS]
            if part.numel() >= FEWEST:
                alike.setdefault((weight.shape, weight.device), {})[name] = part.flatten().float()
    found: dict[str, str] = {}
    for parts in alike.values():
        if len(parts) > 1:
            names, rows = list(parts), torch.stack(list(parts.values()))
            rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # NaN, like nothing, where all are zero
            cosines = (rows @ rows.T).fill_diagonal_(0)
            nearest = cosines.nan_to_num().max(1)
            pairs = zip(names, nearest.values.tolist(), nearest.indices.tolist(), strict=True)
            found.update((name, names[other]) for name, cosine, other in pairs if cosine > ALIKE)
    return found
