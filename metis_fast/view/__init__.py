"""`metis-fast view`: a read-only page over run folders, live while they train (docs/view.md)."""
