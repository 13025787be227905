"""Some real steps of a run, recorded: a trace with a lane for each component, and tables of stages and ops."""
