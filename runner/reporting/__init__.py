"""What people see: a run while it goes on, the graph, the report, and what a stage will learn from."""
