"""Decides what to run: recipes, graph, cache, processes, tracking. No mathematics and no torch."""

import os

if os.name == "nt":  # locks, forks and signals are those of POSIX
    raise ImportError(
        "Stockpot: expected Linux or macOS, got Windows; use WSL (`wsl --install`), where it is the same as on Linux"
    )

from runner.safe_path import leave_current_folder

leave_current_folder(__file__)  # before anything else is imported

# None are used, and looking for them means reading about every installed package: a tenth of the time of planning.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
