"""Parquet in, prompts out.

`parquet` reads the Metis-RL schema (`row` holds what one row must look like), `writing` writes it, `cursor` streams prompts
over epochs and resumes, `check` reports on files before a run depends on them.
"""
