"""Modules come from the installation alone: the current folder may hold a stranger's files beside a stranger's recipe.

Python looks for modules there first under `-m` and `-c`, and wherever PYTHONPATH has an empty entry. Only built-in modules are
imported here, since this runs before the current folder is off the path.
"""

import os
import sys

PYTHON = [sys.executable, "-P"]  # before `-m MODULE`
HERE = ("", ".")  # entries of PYTHONPATH, mostly by accident: `PYTHONPATH=$PYTHONPATH:/more`


def safe_environment(environment: dict[str, str]) -> dict[str, str]:
    """`environment` for processes of Python, which all that they start inherits: launchers take no `-P`."""
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry not in HERE]
    others = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    return others | {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": os.pathsep.join(entries)} if entries else {})


def leave_current_folder(package: str) -> None:
    """Takes the current folder off the path of this process, unless `package` lies in it or PYTHONPATH names it in full."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep) if "PYTHONPATH" in os.environ else []
    by_module = sys.argv[:1] == ["-m"] and not sys.flags.safe_path  # while Python looks for the module to run
    if not by_module and not any(entry in HERE for entry in entries):
        return
    here = os.getcwd()  # noqa: PTH109  # pathlib is not imported yet
    installation = os.path.dirname(os.path.dirname(os.path.abspath(package)))  # noqa: PTH100, PTH120  # as above
    kept = [os.path.realpath(entry) for entry in (installation, *(entry for entry in entries if entry not in HERE))]
    if os.path.realpath(here) not in kept:
        sys.path[:] = [entry for entry in sys.path if entry not in (*HERE, here)]
