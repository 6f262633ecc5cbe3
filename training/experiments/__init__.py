"""`passion experiment`: a grid of runs described in YAML, from the data to the report."""
