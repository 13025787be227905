"""Every op of `metis_kernels` beside its floor and its peers, in one run: `metis-fast bench OP`, `python -m bench OP`."""
