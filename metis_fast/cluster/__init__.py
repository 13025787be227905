"""Ray: between the machines of a run there is nothing else of ours. Only what is in here imports it, at first use.

room      joins a cluster, and reserves all that a run needs of it at once
keeper    the actor of a bundle that starts the trainer's ranks, and is all that they talk to (Ray's side)
ranks     the run's side of these
tunnel    a rank's connection, carried through calls of its keeper
weights   weights as objects of Ray's
"""
