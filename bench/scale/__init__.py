"""`bench scale`: what the run's own process costs as nodes are added, which compute nothing and have groups of real size."""
