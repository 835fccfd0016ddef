"""Convert small networks of other packages, hold each to plain torch, and say for which an input was needed by hand.

The oracle: every GroupNorm of the converted network is made to compute its old BatchNorm, in plain torch, on its input
brought back to the scale that the filters had; the network must then give the original's output. In float64, where the
network runs in it: spikes and indices fall otherwise by a rounding.
"""

import copy
import functools
import json
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from packages import PACKAGES, Sample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

import normswap
from normswap.networks.copying import in_mode
from normswap.networks.inputs import rebuild, tensors_in
from normswap.networks.recognition import is_batch_norm

SECONDS = 300
"""Of the processor; a network that takes more is reported so."""

TOLERANCE = 1e-4


class Late(BaseException):
    """A network took too long."""


def sweep(package: str, path: Path, only: str = "*") -> None:
    """Convert every network of a package, one after the other; a JSON line each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _late)
    with path.open("w") as file:
        for sample in PACKAGES[package]():
            if not fnmatchcase(sample.name, only):
                continue
            started = time.perf_counter()
            row: dict[str, Any] = {"model": sample.name}
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                row |= one(sample)
            except Late:
                row |= {"status": "too slow", "error": f"takes more than {SECONDS} s"}
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            row["seconds"] = round(time.perf_counter() - started, 1)
            row["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{package:16} {sample.name:40} {row['status']:24} {row.get('error', '')}", flush=True)


def one(sample: Sample) -> dict[str, Any]:
    """Convert one network and return what happened."""
    torch.manual_seed(0)
    try:
        model = in_mode(sample.build(), False)
    except Exception as error:
        return {"status": "not buildable", "error": line(error)}
    norms = sum(is_batch_norm(module) for module in model.modules())
    row: dict[str, Any] = {"norms": norms}
    if not norms:
        return {"status": "no BatchNorm"}
    try:
        example = sample.example()
        trained(model, example)
        expected = called(model, example)
    except Exception as error:
        return {**row, "status": "does not run by itself", "error": line(error)}
    row["by_hand"] = _needs_example(model, row)
    options = {"example_input": example} if row["by_hand"] else {}
    try:
        converted = normswap.convert(model, **options)
    except normswap.NormswapError as error:
        return {**row, "status": "refused", "error": line(error)}
    except Exception as error:
        return {**row, "status": "crash", "error": line(error)}
    plan = normswap.plan_of(converted)
    row["converted"] = sum(entry.changes for entry in plan.norms)
    row["standardized"] = sum(entry.changes for entry in plan.convs)
    row["warnings"] = list(plan.warnings)
    row["inputs"] = plan.inputs
    try:
        # what was made up may take minutes
        smaller = plan.inputs is not None and _values(example) < _values(rebuild(plan.inputs))
        checks = normswap.check(converted, model, **({"example_input": example} if smaller else options))
        row["checks"] = {check.name: check.ok for check in checks.rows}
        failed = [f"{check.name}: {check.detail}" for check in checks.failed]
    except Exception as error:
        failed = [f"check raises {line(error)}"]
    try:
        row["difference"] = difference = oracle(model, converted, example, expected)
    except Exception as error:
        return {**row, "status": "wrong", "error": f"converted, it does not run: {line(error)}"}
    if not difference <= TOLERANCE:
        return {**row, "status": "wrong", "error": f"off by {difference:.1e}"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            normswap.save(converted, folder, source=None)
            loaded = normswap.load(folder, model=model)
        pairs = zip(converted.state_dict().items(), loaded.state_dict().values(), strict=True)
        failed += [f"reload: {key} differs" for (key, a), b in pairs if isinstance(a, Tensor) and not _same(a, b)]
    except Exception as error:
        failed += [f"save and load: {line(error)}"]
    return {**row, "status": "check fails" if failed else "ok", **({"error": failed[0]} if failed else {})}


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors hold the same; buffers that nothing has filled yet may hold NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _values(example: Any) -> int:
    return sum(tensor.numel() for tensor in tensors_in(example))


def _needs_example(model: nn.Module, row: dict[str, Any]) -> bool:
    """Tell whether a conversion asks for an example."""
    try:
        normswap.inspect(model)
    except normswap.NeedsExampleInput as error:
        row["asked"] = line(error)
        return True
    except normswap.NormswapError:
        pass
    except Exception as error:
        row["asked"] = line(error)
    return False


@torch.no_grad()
def trained(model: nn.Module, example: Any) -> None:
    """Give norms the statistics of what they meet, roughly, and affine values that tell channels apart."""
    generator = torch.Generator().manual_seed(0)

    def drawn(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    def meet(norm: Any, args: tuple[Any, ...]) -> None:
        x = args[0] if args else torch.empty(0)
        if x.ndim > 2 and x.shape[1] != norm.num_features:  # steps and samples
            x = x.flatten(0, 1)
        if norm in met or x.ndim < 2 or x.shape[1] != norm.num_features:
            return
        met.add(norm)
        rows = x.movedim(1, -1).reshape(-1, norm.num_features).float()
        var = rows.var(0, correction=0)
        if norm.running_mean is not None and norm.running_mean.shape == var.shape:
            norm.running_mean.copy_(rows.mean(0) + var.sqrt() * drawn(var, -0.2, 0.2))
            norm.running_var.copy_(var * drawn(var, 0.7, 1.4) + 1e-3)

    met = set[nn.Module]()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        if norm.affine and norm.weight is not None:
            norm.weight.copy_(drawn(norm.weight, 0.5, 1.5))
            norm.bias.copy_(drawn(norm.bias, -0.3, 0.3))
    hooks = [norm.register_forward_pre_hook(meet) for norm in norms]
    state = copy.deepcopy({name: vars(module).get("mem") for name, module in model.named_modules()})
    try:
        _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    for name, module in model.named_modules():  # what spiking neurons keep between calls is not part of the network
        if state[name] is not None:
            module.mem = state[name]
        reset = getattr(module, "reset", None)
        if callable(reset) and hasattr(module, "_memories"):
            reset()


def oracle(model: nn.Module, converted: nn.Module, example: Any, expected: list[Tensor]) -> float:
    """Return how far a converted network is off once its norms compute what BatchNorm did."""
    plan = normswap.plan_of(converted)
    try:
        wide = copy.deepcopy(model).double()
        exact = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example)
        found = normswap.convert(wide, example_input=exact, check=False)
        pair = called(wide, exact), called(with_old_norms(found, wide, normswap.plan_of(found)), exact)
    except Exception:  # a network that makes float32 tensors itself
        pair = expected, called(with_old_norms(copy.deepcopy(converted), model, plan), example)
    return difference(*pair)


def with_old_norms(converted: nn.Module, model: nn.Module, plan: normswap.Plan) -> nn.Module:
    """Have every norm of a converted network compute what the model's did: plain torch, by hooks."""
    for entry in plan.norms:
        if entry.converts:
            old, new = model.get_submodule(entry.name), converted.get_submodule(entry.name)
            scale = scales_before(entry, plan)
            own = functools.partial(_old_norm, old, entry, scale)
            new.register_forward_hook(own, with_kwargs=True)
    return converted


def scales_before(entry: normswap.NormEntry, plan: normswap.Plan) -> Tensor | None:
    """Return what the channels of a norm's input were multiplied by."""
    if not entry.scaled_by:
        scale = plan.scales.get(entry.fed_by[0]) if len(entry.fed_by) == 1 else None
        return None if scale is None else torch.tensor(scale)
    scale = torch.ones(entry.channels)
    for layer, start, stop in entry.scaled_by:
        scale[start:stop] = torch.tensor(plan.scales[layer])
    return scale


def _old_norm(
    old: Any, entry: normswap.NormEntry, scale: Tensor | None, new: nn.Module, args: Any, kwargs: Any, _: Any
) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    if entry.stepped:  # its scale is 1: something lies between it and the filters
        return old(x)  # type: ignore[no-any-return]
    if scale is not None:
        x = x / scale.to(x).view(-1, *(1 for _ in x.shape[2:]))
    mean, var = getattr(old, "running_mean", None), getattr(old, "running_var", None)
    if not isinstance(old, _BatchNorm) or (mean is not None and mean.ndim != 1):
        return old(x)
    y = F.batch_norm(x, mean, var, old.weight, old.bias, training=mean is None, eps=old.eps)
    for name in entry.then:
        y = getattr(new, name)(y)
    return y


@torch.no_grad()
def _call(model: nn.Module, example: Any) -> Any:
    example = copy.deepcopy(example)
    torch.manual_seed(0)
    if isinstance(example, tuple):
        return model(*example)
    return model(**example) if isinstance(example, Mapping) else model(example)


def called(model: nn.Module, example: Any) -> list[Tensor]:
    """Return what a copy of a network makes of an example: its numbers."""
    return list(numbers(_call(in_mode(copy.deepcopy(model), False), example)))


def numbers(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of floats in an output."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, Mapping):
        yield from numbers(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        yield from numbers(vars(value))


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value of each tensor."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.numel() and not bool((a.isnan() & b.isnan()).all()):
            off = torch.nan_to_num((a - b).abs(), nan=0.0 if bool((a.isnan() == b.isnan()).all()) else float("inf"))
            worst = max(worst, float(off.max() / torch.nan_to_num(a.abs()).max().clamp_min(1e-12)))
    return worst


def _late(*_: Any) -> None:
    raise Late


def line(error: Exception) -> str:
    """Return an error's class and its first line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
