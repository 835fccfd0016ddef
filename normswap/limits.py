"""Bounds on what comes from outside: beyond them no real network lies, and memory may not suffice."""

MAX_COUNT = 2**31 - 1
"""Largest count of channels or groups; torch's own kernels index no more."""

MAX_TEXT = 10_000
"""Characters of a name or a reason."""

MAX_ELEMENTS = 2**28
"""Elements of all example inputs together, 1 GiB of float32."""

MAX_SIDE = 2**28
"""Size of one axis of an example input."""

MAX_AXES = 8
"""Axes of a tensor."""

MAX_DEPTH = 32
"""Containers within containers of example inputs."""
