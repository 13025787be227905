"""metis_fast: a high-performance trainer for HDPO (Hierarchical Decoupled Policy Optimization)."""

from metis_fast import compat

__version__ = "0.2.0"

compat.prepare()
