"""Read a state dict from somebody's file: safetensors or a torch pickle of tensors, told apart by content."""

import io
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from normswap.errors import CheckpointAdapted, CheckpointError
from normswap.sources.torch_archives import is_uncompressed, must_be_sound

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""What torch.compile, activation checkpointing and FSDP put into names, at any depth."""

NESTED = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model")
"""Where training scripts keep the tensors inside a checkpoint, averaged weights first, as timm picks them."""


def read_state_dict(
    path: str | PathLike[str], names: Collection[str] = (), *, mapped: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name; nothing in the file is executed.

    Training tools nest the tensors and put prefixes before their names (``model.`` of Lightning, ``module.`` of DDP,
    ``_orig_mod.`` of torch.compile). Both are taken off, with a `CheckpointAdapted` warning that says so.

    Args:
        path: A safetensors file, or one that torch.save wrote.
        names: Names the tensors should have; without them prefixes stay.
        mapped: Whether the tensors of a file of torch.save may stay in it, as those of a safetensors file do, until
            they are asked for: it must not be written to as long as they are in use.

    Raises:
        CheckpointError: The file is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    state, steps = _read(path, mapped)
    if names:
        state, prefixes = _without_prefixes(state, names)
        steps += prefixes
    if steps:
        warnings.warn(f"{path}: {'; '.join(steps)}", CheckpointAdapted, stacklevel=2)
    return state


def read_tensors(path: Path) -> Any:
    """Return what a file of tensors holds: a tensor or containers of them, of safetensors a dict.

    Raises:
        CheckpointError: The file is missing, damaged, or holds more than tensors and plain values.
    """
    zipped = _pickled(path)
    return _safe(path) if zipped is None else _unpickled(path, zipped=zipped)


def _read(path: Path, mapped: bool) -> tuple[dict[str, Tensor], list[str]]:
    zipped = _pickled(path)
    return (_safe(path), []) if zipped is None else _tensors_of(path, _unpickled(path, zipped=zipped, mapped=mapped))


def _pickled(path: Path) -> bool | None:
    """Tell whether a pickle is zipped; None where the file is none."""
    head = must_be_checkpoint(path)
    if not _is_safetensors(head, os.path.getsize(path)) and (head[:2] == b"PK" or head[:1] == b"\x80"):
        return head[:2] == b"PK"
    return None


def _safe(path: Path) -> dict[str, Tensor]:
    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is truncated or no checkpoint ({error}); get a fresh copy") from error


def _is_safetensors(head: bytes, size: int) -> bool:
    """Tell by the length of the header, which may begin with any byte, and by the brace that the header begins with."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def must_be_checkpoint(path: Path) -> bytes:
    """Return the beginning of a file, which is none of those that are often mistaken for a checkpoint.

    Raises:
        CheckpointError: It is one of them, or cannot be read.
    """
    if not os.path.isfile(path):
        found = "is a folder" if os.path.isdir(path) else "no such file"
        raise CheckpointError(f"{path}: {found}; pass the path of a .safetensors or .pth checkpoint")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); pass a file that can") from error
    if (stranger := _not_a_checkpoint(head)) is not None:
        raise CheckpointError(f"{path}: is {stranger}, not a checkpoint; download the file itself")
    return head


def fill(
    model: nn.Module, state: Mapping[str, Tensor], *, name: str, head: Collection[str] = (), take: bool = False
) -> None:
    """Load a state dict strictly.

    Args:
        model: Network that receives the tensors.
        state: Tensors by name.
        name: What to call the state in errors.
        head: Names of tensors that stay as the network initialized them where they have another shape.
        take: Have the network's parameters and buffers use the memory of the state's tensors where that can be, rather
            than copy them. It may be on the meta device; a `load_state_dict` of its own is called and copies.

    Raises:
        CheckpointError: Names or shapes differ, or a tensor is of a kind that the network's cannot hold.
    """
    own = model.state_dict()
    misfits = _misfits(own, state, name)
    if body := [key for key in misfits if key not in head]:
        raise _another_shape(own, state, body[0], name)
    for key in own:
        if not _can_hold(own[key], state[key]):
            kind = f"{str(state[key].layout).removeprefix('torch.')} {str(state[key].dtype).removeprefix('torch.')}"
            where = " on the meta device" if state[key].is_meta else ""
            raise CheckpointError(
                f"{name}: {key} is {kind}{where}, the network holds plain {str(own[key].dtype).removeprefix('torch.')};"
                " save the tensors of the network as it was before it was quantized or packed"
            )
    fitting = OrderedDict((key, own[key] if key in misfits else state[key]) for key in own)
    if take:
        fitting = _apart(fitting, own)
    # modules read the version they were saved with from here; safetensors carries none, and only current ones are saved
    fitting._metadata = getattr(state, "_metadata", own._metadata)  # type: ignore[attr-defined]
    if type(model).load_state_dict is nn.Module.load_state_dict and "load_state_dict" not in vars(model):
        _load(model, fitting, name, take)
    else:
        model.load_state_dict(fitting)


def _apart(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Return tensors of the types that a network has, in memory that none shares with another."""
    held = set[int]()
    taken = ((key, tensor.detach().to(own[key].dtype).contiguous()) for key, tensor in state.items())
    return OrderedDict((key, kept_apart(tensor, held)) for key, tensor in taken)


def kept_apart(tensor: Tensor, held: set[int]) -> Tensor:
    """Return a tensor, or a copy where its memory is held by one that was met before, and note that it is held.

    Args:
        tensor: Any tensor with memory.
        held: Addresses of what was met, to which this one's is added.
    """
    if tensor.untyped_storage().data_ptr() in held:
        tensor = tensor.clone()
    held.add(tensor.untyped_storage().data_ptr())
    return tensor


def _load(model: nn.Module, state: OrderedDict[str, Tensor], name: str, take: bool) -> None:
    """Do what ``model.load_state_dict`` does, whose time grows with the square of the children of one module.

    torch looks through all names under a module once for each of its children; here they are sorted out once. And with
    ``assign=True`` torch makes new parameters: tied ones would not be any more, nor those that lists hold, too.
    """
    missing, unexpected, errors = list[str](), list[str](), list[str]()
    known, whole = getattr(state, "_metadata", {}), state.copy()
    whole._metadata = known  # type: ignore[attr-defined]

    def load(module: nn.Module, own: dict[str, Tensor], prefix: str) -> None:
        about = {**known.get(prefix[:-1], {}), **({"assign_to_params_buffers": True} if take else {})}
        before = {**module._parameters, **module._buffers} if take else {}
        module._load_from_state_dict(own, prefix, about, True, missing, unexpected, errors)
        for key, tensor in before.items():
            _same_object(module, key, tensor)
        inside: dict[str, dict[str, Tensor]] = {}
        for key, tensor in own.items():
            child, dot, _ = key.removeprefix(prefix).partition(".")
            if dot and key.startswith(prefix):
                inside.setdefault(child, {})[key] = tensor
        for child, held in module._modules.items():
            if held is not None:
                load(held, inside.get(child, {}), f"{prefix}{child}.")
        incompatible = _IncompatibleKeys(missing, unexpected)
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, incompatible)

    load(model, whole, "")
    errors += [f"{key} is missing" for key in missing] + [f"{key} is not in the network" for key in unexpected]
    if errors:
        raise CheckpointError(f"{name}: does not fit ({errors[0]}); use the model it was saved from")


def _same_object(module: nn.Module, key: str, before: Tensor | None) -> None:
    """Put the tensor that a module had back in its place, with the memory of the one that is there now."""
    held: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
    now = held.get(key)
    if before is None or now is None or now is before:
        return
    if before.is_meta:
        torch.utils.swap_tensors(before, now)
    else:
        before.data = now.data
    held[key] = before


def made_whole(model: nn.Module, state: Mapping[str, Tensor], *, name: str) -> bool:
    """Have a network that was built without data take a state dict's tensors; tell whether it is whole then.

    Raises:
        CheckpointError: As `fill` does.
    """
    try:
        fill(model, state, name=name, take=True)
        seeker = _Seeker(io.BytesIO())
        seeker.dump(model)
    except CheckpointError:
        raise
    except Exception:  # a tensor that cannot be replaced, an object that cannot be looked into
        return False
    return not seeker.found


class _Seeker(pickle.Pickler):
    """Looks for tensors without data in all that an object holds."""

    found = False

    def persistent_id(self, obj: Any) -> str | None:
        """Look at one object; of tensors nothing is written."""
        if not isinstance(obj, Tensor):
            return None
        self.found = self.found or obj.is_meta
        return "tensor"


def must_fit(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    name: str,
    num_classes: int | None = None,
    head: Callable[[], Collection[str]] = tuple,
) -> list[str]:
    """Raise unless a network of the shapes `own` can be filled with a state; no data is looked at.

    Args:
        own: Tensors of the network, which may be on the meta device.
        state: Tensors by name.
        name: What to call the state in errors.
        num_classes: Size of a new head: its tensors may have another shape, and that many times the elements.
        head: Returns the names of the head's tensors; called where any has another shape.

    Returns:
        The names of the tensors that have another shape and may.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    misfits = _misfits(own, state, name)
    names = head() if misfits and num_classes is not None else ()
    for key in misfits:
        if key not in names or own[key].numel() > state[key].numel() * max(num_classes or 0, 1):
            raise _another_shape(own, state, key, name)
    return misfits


def _misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> list[str]:
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unexpected:
        which = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not in the network"
        count = len(missing) + len(unexpected)
        raise CheckpointError(f"{name}: does not fit ({which}; {count} names differ); use the model it was saved from")
    return [key for key in own if own[key].shape != state[key].shape]


def _can_hold(own: Tensor, given: Tensor) -> bool:
    """Tell whether copying keeps the values: whole numbers are not weights, and packed tensors have a scale besides."""
    plain = given.layout is torch.strided and not given.is_quantized and not given.is_meta
    same = own.is_complex() == given.is_complex()
    return plain and same and own.is_floating_point() <= given.is_floating_point()


def _another_shape(own: Mapping[str, Tensor], state: Mapping[str, Tensor], key: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {key} is {tuple(state[key].shape)}, the network has {tuple(own[key].shape)}; "
        "use the model it was saved from, with as many classes"
    )


def _unpickled(path: Path, *, zipped: bool, mapped: bool = False) -> Any:
    if zipped:
        must_be_sound(path)
    mapped = mapped and zipped and path.suffix != ".safetensors" and is_uncompressed(path)
    try:
        with path.open("rb") as file:  # of a path, which mapping asks for, torch looks at the ending, too
            return torch.load(os.fspath(path) if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds Python objects, not only tensors; save model.state_dict() to a new file and pass that"
        ) from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        if "TorchScript" in str(error) or "torch.jit" in str(error):
            reason = "is a TorchScript archive; save the state_dict of the Python model instead"
        else:
            reason = "is truncated or no checkpoint; get a fresh copy"
        raise CheckpointError(f"{path}: {reason}") from error


def _tensors_of(path: Path, data: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Find the state dict in what a training script saved, and say where it was."""
    steps: list[str] = []
    for _ in range(3):
        if isinstance(data, Mapping) and data and all(map(_is_named_tensor, data.items())):
            return cast(dict[str, Tensor], data if hasattr(data, "_metadata") else dict(data)), steps
        held = [key for key in NESTED if isinstance(data.get(key), Mapping)] if isinstance(data, Mapping) else []
        if not held:
            break
        others = f" rather than {', '.join(map(repr, held[1:]))}" if held[1:] else ""
        steps.append(f"took {held[0]!r}{others}")
        data = data[held[0]]
    raise CheckpointError(f"{path}: holds no state dict; save model.state_dict() to a new file and pass that")


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _without_prefixes(state: dict[str, Tensor], names: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Take wrappers and one common prefix off the names, where all of `names` appear once that is done.

    timm's ``clean_state_dict`` knows two prefixes, takes them off whatever the network's names are, and says nothing.
    """
    if set(names) <= set(state):
        return state, []
    steps, bare = [], dict(state)
    for wrapper in WRAPPERS:
        inside = sum(wrapper in name for name in bare)
        if inside:
            steps.append(f"stripped {wrapper!r} from {inside} names")
            bare = {name.replace(wrapper, ""): tensor for name, tensor in bare.items()}
    first = next(iter(names))
    for prefix in sorted(name.removesuffix(first) for name in bare if name.endswith(first)):
        if all(prefix + name in bare for name in names):
            if prefix:
                inner = {name.removeprefix(prefix): t for name, t in bare.items() if name.startswith(prefix)}
                left = len(bare) - len(inner)
                steps.append(f"stripped {prefix!r} from {len(inner)} names" + f" and left {left} out" * bool(left))
                bare = inner
            return bare, steps
    return state, []


def _not_a_checkpoint(head: bytes) -> str | None:
    """Say what a file is that is often mistaken for a checkpoint."""
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer"
    if text.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    return "an empty file" if not head else None
