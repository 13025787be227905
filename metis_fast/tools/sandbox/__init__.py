"""Runs the agent's Python. Everything here is loaded by the warm server: standard library, numpy and Pillow only.

server.py forks sessions; kernel.py locks them in; interpreter.py runs calls in them; wire.py is what they say to the trainer.
"""
