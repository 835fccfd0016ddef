"""Export a converted network for deployment: fold, trace, write, run what was written and compare."""

import errno
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from normswap.checkpoint.atomic import replacing
from normswap.conversion.carried_plan import plan_of
from normswap.conversion.folding import fold
from normswap.errors import ExportFailed, InvalidOption, NeedsExampleInput, first_line, way_to_have
from normswap.networks.copying import in_mode
from normswap.networks.inputs import as_call, call, materialize, rebuild, tensors_in, two_samples
from normswap.networks.network import Network
from normswap.networks.settings import own_settings
from normswap.networks.validation import must_have_data, unwrap
from normswap.tracing.forward import trace

OPSETS = range(17, 24)
WRITTEN_OPSET = 18
"""Least opset that torch writes; an older one is made of it."""

NATIVE_OPSET = 21
"""ONNX has GroupNormalization with a scale per channel from this opset on."""

ROUNDING = 80
"""Largest difference that is accepted, in units of the type's epsilon: 1e-5 for float32."""

FREE_AXES = (5, 1, 0)
"""How many leading axes are free, tried in this order: all, the batch, none."""

AXES = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}
"""What is behind samples and channels, by the number of all axes."""


@dataclass(frozen=True)
class Exported:
    """What was written and how it compares.

    Attributes:
        path: The file.
        format: ``"torch"`` or ``"onnx"``.
        dynamic: Axes whose size is free, as ``batch`` and ``height``.
        compared: Inputs on which file and network were compared.
        difference: Largest difference of an output, absolute.
    """

    path: str
    format: str
    dynamic: tuple[str, ...]
    compared: tuple[tuple[int, ...], ...]
    difference: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a few lines for people."""
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.compared)
        free = ", ".join(self.dynamic) or "none"
        return f"wrote {self.path}\nfree axes: {free}\nlargest difference {self.difference:.1e} on inputs {shapes}"


@own_settings()
def export(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    to: str = "onnx",
    opset: int | None = None,
    static: bool = False,
    example_input: Any = None,
) -> Exported:
    """Write a converted network as one file that runs without normswap.

    >>> export(converted, "resnet50.onnx")

    Weight standardization is folded in and costs nothing there. Batch and spatial sizes stay free where the network
    allows it. The file is run at two batch sizes and two spatial sizes before it takes its place.

    Args:
        model: A converted network; it is not changed. The export runs on a copy in eval mode on the CPU.
        path: File to write, replaced as a whole.
        to: ``"onnx"``, or ``"torch"`` for a ``torch.export`` program (``torch.export.load(path).module()``).
        opset: ONNX operator set, 17 to 23, by default 21; below that a GroupNorm becomes several operators, for
            runtimes without it.
        static: Keep batch and spatial sizes as the example has them, for runtimes that compile for one size.
        example_input: As for `normswap.convert`; by default the shapes recorded in the plan. Its number of samples says
            nothing about the file's, but for `static`.

    Raises:
        InvalidOption: Unknown format or opset, or the extra ``onnx`` is not installed.
        PlanMismatch: The network was not converted by normswap.
        UnsupportedModel: It cannot be copied, or has no data.
        NeedsExampleInput: The plan records none.
        ExportFailed: The network cannot be traced, the file computes something else, or the place cannot be written;
            nothing is.
    """
    must_be_exportable(Path(path), to, opset)
    plan, path = plan_of(model), Path(path)
    must_have_data(unwrap(model))
    folded = in_mode(fold(model).cpu(), False)
    if example_input is None and plan.inputs is None:
        raise NeedsExampleInput("the plan records no example input: it held more than tensors; pass example_input=")
    if example_input is None:
        example_input = rebuild(plan.inputs)
    elif isinstance(example_input, (list, Mapping, DataLoader)):  # a pass shows what of a batch is taken
        example_input = trace(Network(folded), example_input, until=(), edges=False).example
    dtype = next((p.dtype for p in folded.parameters() if p.is_floating_point()), torch.float32)
    example = materialize(example_input, torch.device("cpu"), dtype, seed=0)
    tries = [(example, free) for free in ((0,) if static else FREE_AXES)]
    # of one sample, torch.export fixes their number at one
    if not static and (several := two_samples(example)) is not example:
        tries = [*((several, free) for free in FREE_AXES if free), *tries]
    first: ExportFailed | None = None
    for given, free in tries:
        try:
            return _attempt(folded, given, path, to, opset or NATIVE_OPSET, free, must_vary=given is not example)
        except ExportFailed as error:
            first = first or error
    raise first or ExportFailed(f"{path}: nothing was tried; report this")


def must_be_exportable(path: Path, to: str, opset: int | None = None) -> None:
    """Raise where nothing can be exported, before a network is looked at.

    Raises:
        InvalidOption: Unknown format or opset, or the extra ``onnx`` is not installed.
        ExportFailed: The place cannot be written.
    """
    if to not in ("onnx", "torch"):
        raise InvalidOption(f"to={to!r} is not one of 'onnx', 'torch'")
    if to == "torch" and opset is not None:
        raise InvalidOption(f"opset={opset} is for to='onnx'; leave it out")
    if opset is not None and opset not in OPSETS:
        raise InvalidOption(f"opset={opset} is outside {OPSETS[0]} to {OPSETS[-1]}; leave it out for {NATIVE_OPSET}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if to == "onnx" and missing:
        raise InvalidOption(f"to='onnx' needs {missing[0]}; {way_to_have(*missing, extra='onnx')}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ExportFailed:
    return ExportFailed(f"{path}: cannot be written ({error.strerror or error}); choose another place")


def _attempt(
    model: nn.Module, example: Any, path: Path, to: str, opset: int, free: int, *, must_vary: bool
) -> Exported:
    """Export with so many leading axes free; the file takes its place once it computes what the network does.

    With `must_vary` only a file that takes any number of samples does.
    """
    try:
        with replacing(path) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = _traced(model, example, free)
            dynamic = _dynamic_axes(program)
            if must_vary and "batch" not in dynamic:
                raise ExportFailed("the number of samples is fixed; nothing was written")
            run = _write_onnx(program, temporary, opset) if to == "onnx" else _write_torch(program, temporary)
            compared, difference = _compare(model, run, example, dynamic)
    except OSError as error:
        raise _unwritable(path, error) from error
    return Exported(str(path), to, dynamic, compared, difference)


def _traced(model: nn.Module, example: Any, free: int) -> ExportedProgram:
    args, kwargs = as_call(example)
    shapes = tree_map_only(Tensor, lambda t: {axis: _free(axis) for axis in range(min(t.ndim, free))}, (args, kwargs))
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=(shapes[1] or shapes[0]) if free else None)
    except Exception as error:  # whatever the network's own code does under the tracer
        what = f"{type(model).__name__} cannot be traced by torch.export ({first_line(error)})"
        raise ExportFailed(f"{what}; use normswap.fold in Python") from error


def _free(axis: int) -> Any:
    return Dim.AUTO if axis != 1 else Dim.STATIC


def _dynamic_axes(program: ExportedProgram) -> tuple[str, ...]:
    names = set(program.graph_signature.user_inputs)
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name in names and isinstance(value, Tensor):
            labels = ("batch", "channels", *AXES.get(value.ndim, ()))
            found |= {labels[axis]: None for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
    return tuple(found)


Runner = Callable[[Any], list[Tensor]]


def _write_torch(program: ExportedProgram, path: Path) -> Runner:
    written = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(program, written)
    path.write_bytes(written.getbuffer())
    loaded = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda example: list(tensors_in(call(loaded, example)))


def _write_onnx(program: ExportedProgram, path: Path, opset: int) -> Runner:
    import onnxruntime

    try:
        written: Any = torch.onnx.export(program, opset_version=max(opset, WRITTEN_OPSET), verbose=False)
        written.save(path, external_data=False)
        if opset < WRITTEN_OPSET:
            _lower(path, opset)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:  # exporter, protobuf and runtime each raise their own
        raise ExportFailed(
            f"opset {opset} cannot express the network ({first_line(error)}); try another --opset, or --to torch"
        ) from error
    names = [entry.name for entry in session.get_inputs()]

    def run(example: Any) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors_in(as_call(example)), strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return run


def _lower(path: Path, opset: int) -> None:
    """Rewrite a file for opset 17: what reductions run over is an attribute there, and no input.

    Whatever else is of a later opset the checker finds.

    Raises:
        ValueError: The graph holds what that opset does not have.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    known = {value.name: value for value in graph.initializer}
    known |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) > 1:
            if node.input[1] not in known:
                raise ValueError(f"{node.name} reduces over axes that are computed")
            axes = numpy_helper.to_array(known[node.input[1]]).flatten().tolist()
            del node.input[1:]
            kept = [attribute for attribute in node.attribute if attribute.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("axes", axes)])
    for needed in model.opset_import:
        needed.version = opset if needed.domain in ("", "ai.onnx") else needed.version
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


@torch.no_grad()
def _compare(
    model: nn.Module, run: Runner, example: Any, dynamic: tuple[str, ...]
) -> tuple[tuple[tuple[int, ...], ...], float]:
    shapes, worst = [], 0.0
    for probe in _probes(example, dynamic):
        shape = tuple(next(iter(tensors_in(as_call(probe)))).shape)
        try:
            expected, found = list(tensors_in(call(model, probe))), run(probe)
        except Exception as error:  # a size the network was not made for, which tracing had left free
            raise ExportFailed(
                f"an input of {shape} does not run ({first_line(error)}); nothing was written"
            ) from error
        if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in found]:
            raise ExportFailed(
                f"the exported file gives outputs of other shapes for an input of {shape}; nothing was written"
            )
        for ours, theirs in zip(expected, found, strict=True):
            difference = float((ours.double() - theirs.double()).abs().max())
            bound = ROUNDING * torch.finfo(ours.dtype).eps * max(1.0, float(ours.abs().max()))
            if not difference <= bound:
                raise ExportFailed(
                    f"the exported file is off by {difference:.1e} (allowed {bound:.1e}) for an input of {shape}; "
                    "nothing was written"
                )
            worst = max(worst, difference)
        shapes.append(shape)
    return tuple(shapes), worst


def _probes(example: Any, dynamic: tuple[str, ...]) -> Iterator[Any]:
    """Yield examples at two batch sizes and two spatial sizes, as far as these are free."""
    for batch in (1, 3) if "batch" in dynamic else (None,):
        for larger in (False, True) if set(dynamic) - {"batch"} else (False,):
            resize = partial(_resized, batch=batch, larger=larger, dynamic=dynamic)
            yield tree_map_only(Tensor, resize, example)


def _resized(tensor: Tensor, *, batch: int | None, larger: bool, dynamic: tuple[str, ...]) -> Tensor:
    labels = ("batch", "channels", *AXES.get(tensor.ndim, ()))
    sizes = list(tensor.shape)
    if batch is not None and sizes:
        sizes[0] = batch
    for axis in range(2, len(sizes)):
        if larger and labels[axis] in dynamic:
            sizes[axis] += 32 if sizes[axis] >= 64 else sizes[axis]
    if not tensor.is_floating_point():
        return torch.zeros(sizes, dtype=tensor.dtype)
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(sizes, generator=generator).to(tensor.dtype)
