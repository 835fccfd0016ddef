"""Watch the layers of a network while it runs: what goes into them, and what comes out."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from normswap.networks.inputs import tensors_in

Watch = Callable[[str, nn.Module, Tensor], None]


@contextmanager
def watching(
    modules: Mapping[str, nn.Module], watch: Watch, *, attached: bool = False, stepped: Collection[str] = ()
) -> Iterator[None]:
    """Call ``watch(name, module, input)`` before every forward pass of the named modules.

    Args:
        modules: The modules by name.
        watch: What is called.
        attached: Pass inputs on with their history, to take gradients by them.
        stepped: Those whose input is (T, N, C, *); it is passed on as (T·N, C, *).
    """

    def before(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = next(iter(tensors_in((args, kwargs))))
            x = x.flatten(0, 1) if name in stepped else x
            watch(name, module, x if attached else x.detach())

        return look

    handles = [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module]) -> Iterator[Mapping[str, Any]]:
    """Yield the named modules' outputs in the last forward pass, by name."""
    found: dict[str, Any] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            found[name] = output

        return keep

    handles = [module.register_forward_hook(keeper(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
