"""metis_fast: a high-performance trainer for HDPO (Hierarchical Decoupled Policy Optimization)."""

__version__ = "0.1.0"
