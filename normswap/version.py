"""The version, where a checkpoint can read it without importing everything else."""

__version__ = "0.1.0"
