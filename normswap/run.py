"""``python -m normswap.run train.py …``: run a script that finds normswap's checkpoints through timm.

The same works under ``torchrun -m normswap.run train.py …``, and for a module: ``python -m normswap.run -m pkg.train``.
"""

import os
import runpy
import sys

from normswap.checkpoint.timm_entrypoint import register

USAGE = "usage: python -m normswap.run [-m MODULE | SCRIPT] [ARGUMENTS …]"


def main() -> None:
    """Run the script that the command line names, with the arguments after it, as Python itself would."""
    register()
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    target, *rest = arguments[as_module:] or [""]
    if not target or target in ("-h", "--help"):
        print(USAGE, file=sys.stdout if target else sys.stderr)
        sys.exit(0 if target else 2)
    if as_module:
        sys.argv = [target, *rest]
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    if not os.path.exists(target):
        print(f"normswap: {target}: no such script; pass the path of a Python file", file=sys.stderr)
        sys.exit(2)
    sys.argv = [target, *rest]
    sys.path[0] = os.path.dirname(os.path.abspath(target))
    runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    main()
