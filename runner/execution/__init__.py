"""The work of one stage: its processes, how they are started, followed and ended, and what follows a fault."""
