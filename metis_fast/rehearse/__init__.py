"""A job on a laptop before it is one on a cluster: `metis-fast rehearse`."""
