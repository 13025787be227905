"""Benchmarks: their published files, what is asked, how a reply is scored, and what is computed of the scores.

    published file --files--> Question --prompt--> reply --scorers--> Mark --aggregates--> Figure

One small file a benchmark in `benchmarks/`, and a literal dict of them. Nothing here runs a model.
"""
