"""Add something to a module of another package: now where it is loaded, and otherwise when it is.

Nothing heavy is imported here.
"""

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

Add = Callable[[ModuleType], None]


def when_imported(name: str, add: Add) -> None:
    """Call a function with a module, by its full name; adding twice must do no harm.

    Args:
        name: Name of the module, as in ``sys.modules``.
        add: What to call with it.
    """
    if name in sys.modules:
        add(sys.modules[name])
    elif not any(isinstance(finder, _WhenImported) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported(name, add))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds one module where the other finders do, and adds to it once it has been executed."""

    def __init__(self, name: str, add: Add) -> None:
        self.name, self.add = name, add

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec with a loader that adds afterwards; None for all other modules."""
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute, add = spec.loader.exec_module, self.add

            def exec_module(module: ModuleType) -> None:
                execute(module)
                add(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
