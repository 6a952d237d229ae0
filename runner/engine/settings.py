"""What a user's own file says of the engine: which one, and what to ask it for.

Never a recipe: whoever wrote it must not choose addresses and accounts.
"""

from pathlib import Path
from typing import Literal

import tomli
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runner.errors import RecipeError
from runner.files import read_bounded

FILE = "engine.toml"
LARGEST = 1 << 16  # bytes
Kind = Literal["local", "slurm"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SlurmSettings(_Table):
    """The table [slurm]: what stages ask Slurm for when they are jobs of their own. Inside an allocation it does not count."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None  # the limit of each stage, as 24:00:00
    gres: str | None = None  # of a node for trainings and evaluations, as gpu:4
    cpu_gres: str | None = None  # of a node for other stages
    cpus: int | None = Field(None, ge=1)  # of each node; without it, a stage has its nodes to itself
    options: list[str] = Field(default_factory=list)  # more words for srun, as --mem=64G


class Settings(_Table):
    """The file engine.toml of the user's configuration."""

    kind: Kind = "local"
    slurm: SlurmSettings = SlurmSettings()


def settings_file() -> Path:
    """Where the user's settings lie."""
    from platformdirs import user_config_path

    return user_config_path("stockpot") / FILE


def read_settings() -> Settings:
    """The user's settings; RecipeError says what is wrong with the file."""
    path = settings_file()
    try:
        return Settings.model_validate(tomli.loads(read_bounded(path, LARGEST).decode()))
    except FileNotFoundError:
        return Settings()
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {fault['input']!r}" for fault in error.errors()]
        raise RecipeError("\n".join(f"{path}: {fault}" for fault in faults)) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: expected a TOML file, got: {error}") from error
