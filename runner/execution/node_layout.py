"""How many machines share a training, which of them this is, and where the first one is: from the command line, the recipe, or
what Slurm and torchrun say of themselves, in this order.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runner.errors import RecipeError
from runner.stage import Parallel

PORT = 29500  # torchrun's default, too
WANTS_ADDRESS = "HOST or HOST:PORT of the machine of rank 0"


@dataclass(frozen=True)
class Layout:
    """The machines of a run, as one of them sees them."""

    machines: int
    rank: int  # of this one; that of rank 0 makes what is not trained, and writes
    host: str = "127.0.0.1"  # of the machine of rank 0
    port: int = PORT  # there: runs talk at this one, the processes of a training meet at the next

    @property
    def is_main(self) -> bool:
        """Whether this machine makes what is not trained, and writes."""
        return self.rank == 0

    @property
    def training_port(self) -> int:
        """Where the processes of a training meet."""
        return self.port + 1


ALONE = Layout(machines=1, rank=0)


@dataclass(frozen=True)
class Asked:
    """What one source says; None where it says nothing."""

    machines: int | None = None
    rank: int | None = None
    address: str | None = None


def layout_of(parallel: Parallel, command_line: Asked = Asked(), environment: Mapping[str, str] = os.environ) -> Layout:
    """The layout of this run; RecipeError says what is missing or out of range."""
    recipe = Asked(
        None if parallel.machines == "auto" else parallel.machines,
        None if parallel.machine_rank == "auto" else parallel.machine_rank,
        parallel.main_address,
    )
    around = from_slurm(environment) or from_torchrun(environment) or Asked()
    sources = (command_line, recipe, around)
    machines = next((one.machines for one in sources if one.machines is not None), 1)
    rank = next((one.rank for one in sources if one.rank is not None), None)
    address = next((one.address for one in sources if one.address is not None), None)
    if machines == 1:
        if rank and rank != around.rank:
            raise RecipeError(
                f"machine_rank: found {rank} of one machine; expected machines too (--machines N, parallel.machines)"
            )
        return ALONE
    if rank is None:
        raise RecipeError(f"machine_rank: is missing; expected this machine's, 0 to {machines - 1} (--machine-rank K)")
    if not 0 <= rank < machines:
        raise RecipeError(f"machine_rank: expected 0 to {machines - 1}, since there are {machines} machines, got {rank}")
    if address is None:
        raise RecipeError(
            f"main_address: is missing; {machines} machines: expected {WANTS_ADDRESS} (--main-address HOST[:PORT])"
        )
    if address is recipe.address and command_line.rank is None:
        raise RecipeError(
            f"parallel.main_address: the recipe would train together with {address}, and machines that do have to trust each "
            f"other; say on the command line that this is wanted: --machine-rank {rank}, or --main-address"
        )
    host, port = split_address(address)
    return Layout(machines, rank, host, port)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST, HOST:PORT or [IPv6]:PORT; RecipeError if it is none of them."""
    found = re.fullmatch(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:/\[\]]+))(?::(?P<port>\d{1,5}))?", address)
    if found is None or not 0 < (port := int(found["port"] or PORT)) < 2**16 - 1:
        raise RecipeError(f"main_address: expected {WANTS_ADDRESS}, got {address!r}")
    return found["six"] or found["host"], port


def from_slurm(environment: Mapping[str, str]) -> Asked | None:
    """What `srun` and `sbatch` set; of a job step's own nodes, where there is one. One task runs on each node."""
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    if nodes is None or nodes == 1:
        return None
    if _number(environment, "SLURM_LOCALID"):
        raise RecipeError(
            "SLURM_LOCALID: srun started several runs on this node; expected --ntasks-per-node=1, since a run starts the "
            "processes of a training itself (parallel.processes)"
        )
    listed = next((environment[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if environment.get(name)), None)
    host = next(hosts_of(listed), None) if listed else None
    return Asked(nodes, _number(environment, "SLURM_NODEID"), host or environment.get("SLURM_LAUNCH_NODE_IPADDR"))


def from_torchrun(environment: Mapping[str, str]) -> Asked | None:
    """What `torchrun` sets, and scripts that follow its custom. One run is started on each machine."""
    world = _number(environment, "WORLD_SIZE")
    if world is None or world == 1:
        return None
    if _number(environment, "LOCAL_RANK"):
        raise RecipeError(
            "LOCAL_RANK: torchrun started several runs on this machine; expected --nproc-per-node 1, since a run starts the "
            "processes of a training itself (parallel.processes)"
        )
    rank = _number(environment, "GROUP_RANK", "NODE_RANK")
    if rank is None and _number(environment, "LOCAL_WORLD_SIZE") in (None, 1):
        rank = _number(environment, "RANK")
    address = environment.get("MASTER_ADDR")
    if address and (port := _number(environment, "MASTER_PORT")) is not None:
        address = f"[{address}]:{port + 1}" if ":" in address else f"{address}:{port + 1}"  # torchrun itself listens at port
    return Asked(max(1, world // (_number(environment, "LOCAL_WORLD_SIZE") or 1)), rank, address or None)


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
    """The first of some variables that is set; RecipeError if it is no number."""
    for name in names:
        if text := environment.get(name):
            if not text.isdecimal():
                raise RecipeError(f"{name}: expected a number, got {text!r}")
            return int(text)
    return None


# Variables that a launcher sets for the processes it starts; they would mislead those of a training, which has its own.
FOREIGN = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|TORCH_NCCL_ASYNC_ERROR_HANDLING"
    r"|ACCELERATE_(MIXED_PRECISION|DYNAMO_\w+|USE_(CPU|FSDP|DEEPSPEED|MEGATRON_LM))"
)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a launcher of this run says of its own processes."""
    return {name: value for name, value in environment.items() if not FOREIGN.fullmatch(name)}
