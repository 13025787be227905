"""`bench tools`: sessions and calls of the python tool, beside a Jupyter kernel a session and a plain process a call."""
