"""What can be known of a job before it is submitted: `metis-fast doctor`."""
