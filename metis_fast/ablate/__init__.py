"""Named variants of a config, over seeds, from one cold start: `metis-fast ablate` (docs/ablate.md). Its runs are ordinary
ones, each a process of `metis-fast train`; nothing here trains.
"""
