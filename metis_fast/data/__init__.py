"""Parquet in, prompts out.

`parquet` reads the Metis-RL schema (`paths` finds files, `columns` holds which columns and types are read, `row` what one row
must look like, `digesting` what rows are known by), `writing` writes it, `cursor` streams prompts over epochs and resumes.
`check` reports on files before a run depends on them (`offers`, `report`); `command` has the verbs. `coldstart` reads whole
conversations.
"""
