"""Decides what to run: recipes, graph, cache, processes, tracking. No mathematics and no torch."""

import os

from runner.safe_path import leave_current_folder

leave_current_folder(__file__)  # before anything else is imported

# None are used, and looking for them means reading about every installed package: a tenth of the time of planning.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
