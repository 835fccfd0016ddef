"""In-place operations on what a layer with backward hooks returns, which autograd refuses: done out of place."""

import threading
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.errors import WrittenInPlace

_RUNNING = threading.local()


class OutOfPlace(TorchFunctionMode):
    """Return new tensors where ``out += shortcut`` would write to a tensor that a backward hook looks at.

    Only there, where autograd raises otherwise: other in-place operations are what they were. To torch ``x += y`` is
    ``x.add_(y)``, whose result may go unused; so what stands for the old tensor must not be asked again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left: dict[int, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one function of torch.

        Raises:
            WrittenInPlace: A tensor is read that would have been written to.
        """
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self._left and name != "__get__":
            self._refuse(name, args)
        if kwargs.get("inplace") and args and _is_hooked(args[0]):
            return self._leave(args[0], func(*args, **{**kwargs, "inplace": False}))
        if name.endswith("_") and not name.endswith("__") and args and _is_hooked(args[0]):
            twin = getattr(Tensor, name[:-1], None)
            made = None if twin is None else twin(*args, **kwargs)
            if isinstance(made, Tensor) and made.shape == args[0].shape:
                return self._leave(args[0], made.to(args[0].dtype))
        return func(*args, **kwargs)

    def _leave(self, old: Tensor, new: Tensor) -> Tensor:
        storage = old.untyped_storage()  # held, so that its address stays a name for it
        self._left[storage._cdata] = storage
        return new

    def _refuse(self, name: str, args: tuple[Any, ...]) -> None:
        flat = (value for arg in args for value in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        if any(isinstance(v, Tensor) and v.untyped_storage()._cdata in self._left for v in flat):
            raise WrittenInPlace(
                f"{name} reads a tensor that was to change in place under another name, which backward hooks "
                "do not allow; write it as y = y + x in the forward pass"
            )


def _is_hooked(value: Any) -> bool:
    """Tell whether a tensor is what torch makes of a module's output for its backward hooks."""
    return isinstance(value, Tensor) and type(value.grad_fn).__name__ == "BackwardHookFunctionBackward"


def entering(model: nn.Module, args: Any) -> None:
    """Begin a forward pass; a hook that goes before it."""
    running = vars(_RUNNING).setdefault("modes", [])
    running.append(OutOfPlace())
    running[-1].__enter__()


def leaving(model: nn.Module, args: Any, output: Any) -> None:
    """End a forward pass; a hook that is called after it, whether it came to its end or not."""
    running = vars(_RUNNING).get("modes")
    if running:
        running.pop().__exit__(None, None, None)
