"""Processes that work for a run: engines, tools, judges. They dial in, are watched, and can be started again."""
