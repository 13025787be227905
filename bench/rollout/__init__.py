"""`metis-fast bench rollout`: the rollout loop under slow tools, beside two other schemes and beside the engine alone."""
