"""The run's own process: the spine, what a config opens, the state between steps, the cold start."""
