"""How many machines share a training, which one this is, and the address of the first one: from the command line, else the
recipe, else the environment that Slurm or torchrun sets.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runner.errors import RecipeError
from runner.stage import Parallel

PORT = 29500  # also torchrun's default
ADDRESS_FORM = "HOST or HOST:PORT of the machine of rank 0"


@dataclass(frozen=True)
class Layout:
    """The machines of a run."""

    machines: int
    rank: int  # of this machine
    host: str = "127.0.0.1"  # of the machine of rank 0
    port: int = PORT  # of the run there; the processes of a training use the next one

    @property
    def is_main(self) -> bool:
        """Whether this machine runs the stages that do not train, and writes the artifacts."""
        return self.rank == 0

    @property
    def training_port(self) -> int:
        """The port at which the processes of a training form their group."""
        return self.port + 1


ALONE = Layout(machines=1, rank=0)


@dataclass(frozen=True)
class LayoutOptions:
    """What one source says of the layout; None where it says nothing."""

    machines: int | None = None
    rank: int | None = None
    address: str | None = None


def layout_of(
    parallel: Parallel, command_line: LayoutOptions = LayoutOptions(), environment: Mapping[str, str] = os.environ
) -> Layout:
    """The layout of this run; RecipeError says what is missing or out of range."""
    recipe = LayoutOptions(
        None if parallel.machines == "auto" else parallel.machines,
        None if parallel.machine_rank == "auto" else parallel.machine_rank,
        parallel.main_address,
    )
    launched = from_slurm(environment) or from_torchrun(environment) or LayoutOptions()
    sources = (command_line, recipe, launched)
    machines = next((source.machines for source in sources if source.machines is not None), 1)
    rank = next((source.rank for source in sources if source.rank is not None), None)
    address = next((source.address for source in sources if source.address is not None), None)
    if machines == 1:
        if rank and rank != launched.rank:
            raise RecipeError(
                f"machine_rank: expected 0, since there is one machine, got {rank}; set --machines N or parallel.machines too"
            )
        return ALONE
    if rank is None:
        raise RecipeError(f"machine_rank: expected 0 to {machines - 1}, got none; set --machine-rank K on each machine")
    if not 0 <= rank < machines:
        raise RecipeError(f"machine_rank: expected 0 to {machines - 1}, since there are {machines} machines, got {rank}")
    if address is None:
        raise RecipeError(f"main_address: expected {ADDRESS_FORM}, got none; set --main-address HOST[:PORT]")
    if address is recipe.address and command_line.rank is None:
        raise RecipeError(
            f"parallel.main_address: the recipe would train together with {address}, and such machines must trust each other; "
            f"confirm it on the command line with --machine-rank {rank} or --main-address"
        )
    host, port = split_address(address)
    return Layout(machines, rank, host, port)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST, HOST:PORT or [IPv6]:PORT; RecipeError for any other form."""
    found = re.fullmatch(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:/\[\]]+))(?::(?P<port>\d{1,5}))?", address)
    if found is None or not 0 < (port := int(found["port"] or PORT)) < 2**16 - 1:
        raise RecipeError(f"main_address: expected {ADDRESS_FORM}, got {address!r}")
    return found["six"] or found["host"], port


def from_slurm(environment: Mapping[str, str]) -> LayoutOptions | None:
    """The layout that `srun` and `sbatch` set, of the job step if there is one. One task runs on each node."""
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    if nodes is None or nodes == 1:
        return None
    if _number(environment, "SLURM_LOCALID"):
        raise RecipeError(
            "SLURM_LOCALID: expected one run per node, got several; use srun --ntasks-per-node=1, since a run starts the "
            "processes of a training itself (parallel.processes)"
        )
    listed = next((environment[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if environment.get(name)), None)
    host = next(hosts_of(listed), None) if listed else None
    return LayoutOptions(nodes, _number(environment, "SLURM_NODEID"), host or environment.get("SLURM_LAUNCH_NODE_IPADDR"))


def from_torchrun(environment: Mapping[str, str]) -> LayoutOptions | None:
    """The layout that `torchrun` and compatible launchers set. One run is started on each machine."""
    world = _number(environment, "WORLD_SIZE")
    if world is None or world == 1:
        return None
    if _number(environment, "LOCAL_RANK"):
        raise RecipeError(
            "LOCAL_RANK: expected one run per machine, got several; use torchrun --nproc-per-node 1, since a run starts the "
            "processes of a training itself (parallel.processes)"
        )
    rank = _number(environment, "GROUP_RANK", "NODE_RANK")
    if rank is None and _number(environment, "LOCAL_WORLD_SIZE") in (None, 1):
        rank = _number(environment, "RANK")
    address = environment.get("MASTER_ADDR")
    if address and (port := _number(environment, "MASTER_PORT")) is not None:
        address = f"[{address}]:{port + 1}" if ":" in address else f"{address}:{port + 1}"  # torchrun itself listens at port
    return LayoutOptions(max(1, world // (_number(environment, "LOCAL_WORLD_SIZE") or 1)), rank, address or None)


def hosts_of(nodes: str) -> Iterator[str]:
    """The hosts of a Slurm node list: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7 and login."""
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes):
        yield from _expanded(part)


def _expanded(part: str) -> Iterator[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    inside, _, after = rest.partition("]")
    for piece in inside.split(","):
        first, _, last = piece.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for ending in _expanded(after):
                yield f"{before}{number:0{len(first)}d}{ending}"


def _number(environment: Mapping[str, str], *names: str) -> int | None:
    """The first of the variables `names` that is set; RecipeError if it is not a number."""
    for name in names:
        if text := environment.get(name):
            if not text.isdecimal():
                raise RecipeError(f"{name}: expected a number, got {text!r}")
            return int(text)
    return None


# Variables of a launcher that started this run; the processes of a training get their own values.
LAUNCHER_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|TORCH_NCCL_ASYNC_ERROR_HANDLING"
    r"|ACCELERATE_(MIXED_PRECISION|DYNAMO_\w+|USE_(CPU|FSDP|DEEPSPEED|MEGATRON_LM))"
)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the variables of the launcher that started this run."""
    return {name: value for name, value in environment.items() if not LAUNCHER_VARIABLES.fullmatch(name)}
