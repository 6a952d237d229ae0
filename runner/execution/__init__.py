"""Execution: the scheduler of a run, the processes of each stage, and retries after faults."""
