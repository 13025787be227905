"""The cold start's parts: conversations to trajectories, where batches come from, the two trainers, the held-out loss."""
