"""`metis-fast bench update_step`: one optimizer step of the public recipe and of ours, saving by saving."""
