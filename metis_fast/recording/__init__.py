"""Record and replay of what a run asks of its tools and judges (docs/record.md): `tools.record`, `tools.replay`.

`opening` is the door. What is recorded lies in one SQLite file (`file`), found by what was asked (`asking`); `tools` and
`judge` stand between the run and what it asks, on the run's side, so that it does not matter where tools and judges work.
"""
