"""Watch a network's norms while images pass through: each sample's moments, channel by channel."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from normswap.errors import InvalidOption, NeedsExampleInput, described
from normswap.layers.equalization import Moments, deviation
from normswap.networks.copying import copy_model, in_mode
from normswap.networks.hooks import watching
from normswap.networks.inputs import batch_size, call, fresh, reference
from normswap.networks.network import Network
from normswap.networks.processes import joined, processes
from normswap.networks.recognition import norm_parts
from normswap.networks.surroundings import undisturbed
from normswap.planning.choices import Affine
from normswap.planning.entry import NormEntry
from normswap.planning.importance import Importance, weighted
from normswap.planning.statistics import bad_statistics, loud, usable

SAMPLES = 256
"""Samples of which moments are kept, so that memory does not grow with the number of images."""

ROWS = 4 * SAMPLES
"""Rows of them at most: to norms behind a flattened batch, as of tokens, a sample is many."""


@dataclass
class Seen:
    """First and second moments, (N, C) each, of one norm's input over the positions of each sample; and what the
    outputs make of its channels, (M, C), where a gradient tells.
    """

    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    slopes: Tensor | None = None
    every: int = 1
    """One row of so many is kept."""

    def add(self, values: Tensor) -> None:
        """Count samples (N, C, *) in units of BatchNorm's running deviation; they are overwritten."""
        flat = values.flatten(2)[:: self.every] if values.ndim > 2 else values[:: self.every].unsqueeze(-1)
        self.first.append(flat.mean(-1))
        self.second.append(flat.square_().mean(-1))

    def thin(self) -> None:
        """Drop every second row for as long as there are more than enough."""
        while sum(map(len, self.first)) > ROWS:
            self.every *= 2
            self.first, self.second = [torch.cat(self.first)[::2].clone()], [torch.cat(self.second)[::2].clone()]


def must_be_batches(batches: Any) -> None:
    """Raise where batches are none, as a number is.

    Raises:
        InvalidOption: They cannot be gone through.
    """
    if not isinstance(batches, Iterable):
        raise InvalidOption(f"batches={batches!r:.60} must be several batches, as in [images]")


def first_batches(batches: Iterable[Any]) -> list[Any]:
    """Return as many of the first batches as make up the samples that tell, of all processes together."""
    few, count = list[Any](), 0
    for batch in batches:
        few.append(batch)
        count += batch_size(batch) * processes()
        if count >= SAMPLES:
            break
    return few


Images = Mapping[str, Seen]
"""What images showed, by norm."""


@torch.no_grad()
def watch(network: Network, norms: Iterable[NormEntry], batches: Iterable[Any]) -> dict[str, Seen]:
    """Return what the inputs of trained norms look like on images.

    Args:
        network: The unconverted network; a copy in eval mode sees the images.
        norms: Entries of its norms; those with matched affine values are watched.
        batches: Example inputs, as many as it takes to have seen enough samples.

    Raises:
        InvalidOption: No norm is trained, so that images have nothing to tell, or what they lead to is not finite.
        BadStatistics: A norm's running statistics are negative or not finite.
        NeedsExampleInput: The network does not run on them.
    """
    watched = [entry for entry in norms if entry.affine is Affine.MATCH and entry.shape is not None]
    names, stepped = [entry.name for entry in watched], {entry.name for entry in watched if entry.stepped}
    if not names:
        raise InvalidOption("batches= are for trained norms; there are none here, leave it out")
    names = [name for name in names if _has_statistics(network.slots[name])]
    for name in names:
        parts = norm_parts(network.slots[name])
        if not usable(parts.mean.double(), parts.var.double()):  # type: ignore[union-attr]
            raise bad_statistics(name)
    copy = Network(in_mode(copy_model(network.model), False))
    seen = {name: Seen() for name in names}

    def look(name: str, norm: nn.Module, x: Tensor) -> None:
        parts = norm_parts(norm)
        if parts.mean is None or parts.var is None:
            return
        axes = (1, -1, *(1 for _ in x.shape[2:]))
        mean = parts.mean.float()
        unit = deviation(mean, parts.var.float(), eps=parts.eps)
        seen[name].add((x.float() - mean.view(axes)).div_(unit.view(axes)))

    like, count, importance = reference(copy.model), 0, Importance(copy, names, stepped)
    with (
        undisturbed(network.model),
        watching({name: copy.slots[name] for name in names}, look, stepped=stepped),
        torch.compiler.set_stance("force_eager"),
    ):  # a pass or two pay for no compilation
        for batch in tqdm(batches, "looking at images", unit="batch", disable=None, leave=False):
            batch = prepared(batch, like)
            for rows, followed in importance.pieces(batch):
                if followed:
                    before = {name: len(own.first) for name, own in seen.items()}
                    if not importance.look(rows):
                        for name, own in seen.items():
                            del own.first[before[name] :], own.second[before[name] :]
                    continue
                try:
                    call(copy.model, fresh(rows))
                except (Exception, SystemExit) as error:  # whatever the network's own code does with them
                    raise NeedsExampleInput(
                        f"no forward pass ran on the images ({described(error)}); pass batches= as the network takes "
                        "them, or leave them out"
                    ) from error
            for own in seen.values():
                own.thin()
            count += batch_size(batch)
            if count * processes() >= SAMPLES:
                break
    for name, told in importance.found().items():
        seen[name].slopes = told
    for found in seen.values() if processes() > 1 else ():
        found.first, found.second = [joined(torch.cat(found.first))], [joined(torch.cat(found.second))]
    for name, found in seen.items():
        if found.second and not bool(torch.cat(found.second).isfinite().all()):
            raise InvalidOption(f"batches= make {name} see NaN or infinity; pass images of the range it was trained on")
    return {name: found for name, found in seen.items() if found.first}


def _has_statistics(norm: nn.Module) -> bool:
    """Tell whether a norm keeps running statistics."""
    parts = norm_parts(norm)
    return parts.mean is not None and parts.var is not None


def prepared(batch: Any, like: Tensor) -> Any:
    """Return a batch without labels, on the device and in the floating type of a parameter.

    A list of inputs and whole-number labels, as a DataLoader gives it, is taken for its inputs.
    """
    labelled = isinstance(batch, list) and len(batch) == 2 and isinstance(batch[1], Tensor)
    if labelled and not batch[1].is_floating_point():
        batch = batch[0]
    return tree_map_only(Tensor, lambda t: t.to(like) if t.is_floating_point() else t.to(like.device), batch)


class Prepared:
    """Batches without labels, on the device and in the floating type of a parameter; none without a sample."""

    def __init__(self, batches: Iterable[Any], like: Tensor) -> None:
        self.batches, self.like = batches, like

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        made = (prepared(batch, self.like) for batch in self.batches)
        yield from filter(batch_size, made)


def moments_of(seen: Sequence[Seen], network: Network, names: Iterable[str]) -> Moments:
    """Return the moments of norms of one size, of as many samples as all of them have seen."""
    firsts, seconds = zip(*((torch.cat(s.first), torch.cat(s.second)) for s in seen), strict=True)
    count = min(map(len, firsts))
    parts = [norm_parts(network.slots[name]) for name in names]
    first = torch.stack([values[:count] for values in firsts])
    mean, var = (torch.stack([getattr(own, key).to(first) for own in parts]) for key in ("mean", "var"))
    eps = first.new_tensor([own.eps for own in parts]).unsqueeze(-1)
    unit = deviation(mean, var, eps=eps)
    # γ as it acts on x/unit, whatever a constant channel's unit is
    gammas = torch.stack([loud(own.affine(first)[0]) for own in parts]) * unit / (var + eps).sqrt()
    second = torch.stack([values[:count] for values in seconds])
    told = [first.new_empty(0, gammas.shape[1]) if one.slopes is None else one.slopes.to(first.device) for one in seen]
    rows, own = weighted(nn.utils.rnn.pad_sequence(told, batch_first=True), gammas, unit)
    return Moments(first, second, mean / unit, var / unit.square(), gammas, rows, own)
