"""What users see: the progress of a run, the graph, and the report."""
