"""Engines: where the processes of stages run. This machine, a Slurm cluster or a Ray cluster, behind one interface."""
