"""The demo: a small set of prompts and a script that plays them, a tiny model, and the job that trains it. A user of the other
packages like any other (docs/demo.md).
"""
