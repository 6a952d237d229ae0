"""The layout of several machines: from the command line, the recipe, Slurm or torchrun."""

from typing import Any

import pytest

from runner.errors import RecipeError
from runner.execution.node_layout import ALONE, Layout, LayoutOptions, hosts_of, layout_of, split_address, without_launcher
from runner.stage import Parallel

SLURM = {"SLURM_NNODES": "3", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[08-10]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
TORCHRUN = {
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "1",
    "RANK": "1",
    "LOCAL_RANK": "0",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "6000",
}


def test_one_machine_is_the_default() -> None:
    assert layout_of(Parallel(), environment={}) == ALONE
    assert layout_of(Parallel(), environment={"WORLD_SIZE": "1", "SLURM_NNODES": "1"}) == ALONE
    assert layout_of(Parallel(machines=1), environment=SLURM) == ALONE
    assert layout_of(Parallel(), LayoutOptions(machines=1), environment=TORCHRUN) == ALONE


def test_the_layout_comes_from_slurm_or_torchrun() -> None:
    assert layout_of(Parallel(), environment=SLURM) == Layout(3, 1, "gpu08", 29500)
    step = SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[09-10]"}
    assert layout_of(Parallel(), environment=step) == Layout(2, 1, "gpu09", 29500)
    unlisted = {name: value for name, value in SLURM.items() if "LIST" not in name}
    assert layout_of(Parallel(), environment=unlisted).host == "10.0.0.1"
    assert layout_of(Parallel(), environment=TORCHRUN) == Layout(2, 1, "node-a", 6001)
    by_hand = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "NODE_RANK": "0", "MASTER_ADDR": "node-a"}
    assert layout_of(Parallel(), environment=by_hand) == Layout(2, 0, "node-a", 29500)


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_environment() -> None:
    recipe = Parallel(machines=4, main_address="recipe:1000")
    assert layout_of(recipe, LayoutOptions(rank=3), environment=SLURM) == Layout(4, 3, "recipe", 1000)
    assert layout_of(recipe, LayoutOptions(machines=5, rank=4, address="[fe80::1]:7"), environment=SLURM) == Layout(
        5, 4, "fe80::1", 7
    )
    assert layout_of(Parallel(machine_rank=2), environment=SLURM) == Layout(3, 2, "gpu08", 29500)


@pytest.mark.parametrize(
    ("parallel", "options", "environment", "message"),
    [
        (Parallel(machines=2), LayoutOptions(), {}, "machine_rank: expected 0 to 1, got none"),
        (Parallel(machines=2), LayoutOptions(rank=2), {}, "machine_rank: expected 0 to 1, since there are 2 machines, got 2"),
        (
            Parallel(machines=2),
            LayoutOptions(rank=-1),
            {},
            "machine_rank: expected 0 to 1, since there are 2 machines, got -1",
        ),
        (Parallel(), LayoutOptions(rank=1), {}, "machine_rank: expected 0, since there is one machine, got 1"),
        (
            Parallel(machines=2),
            LayoutOptions(rank=1),
            {},
            "main_address: expected HOST or HOST:PORT of the machine of rank 0, got none",
        ),
        (
            Parallel(),
            LayoutOptions(2, 1, "a:b"),
            {},
            "main_address: expected HOST or HOST:PORT of the machine of rank 0, got 'a:b'",
        ),
        (
            Parallel(),
            LayoutOptions(2, 1, "a:65535"),
            {},
            "main_address: expected HOST or HOST:PORT of the machine of rank 0, got 'a:65535'",
        ),
        (
            Parallel(machines=2, machine_rank=1, main_address="evil"),
            LayoutOptions(),
            {},
            "confirm it on the command line with --machine-rank 1",
        ),
        (Parallel(), LayoutOptions(), SLURM | {"SLURM_LOCALID": "1"}, "--ntasks-per-node=1"),
        (Parallel(), LayoutOptions(), TORCHRUN | {"LOCAL_RANK": "1"}, "--nproc-per-node 1"),
        (Parallel(), LayoutOptions(), {"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number, got 'two'"),
    ],
)
def test_a_missing_or_wrong_layout_is_refused(
    parallel: Parallel, options: LayoutOptions, environment: Any, message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        layout_of(parallel, options, environment=environment)
    assert message in str(error.value)


def test_node_lists_of_slurm_are_read() -> None:
    assert list(hosts_of("node[01-03,7],login")) == ["node01", "node02", "node03", "node7", "login"]
    assert list(hosts_of("a[1-2]-b[08-10]")) == ["a1-b08", "a1-b09", "a1-b10", "a2-b08", "a2-b09", "a2-b10"]
    assert list(hosts_of("one")) == ["one"]


def test_an_address_without_a_port_gets_the_default_one() -> None:
    assert split_address("node-1.example.org") == ("node-1.example.org", 29500)
    assert split_address("[::1]") == ("::1", 29500)


def test_variables_of_a_launcher_are_not_passed_to_the_processes_of_a_training() -> None:
    kept = {"PATH": "/bin", "SLURM_NNODES": "2", "MY_RANK": "3", "CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_LOG_LEVEL": "info"}
    removed = {
        "TORCHELASTIC_RUN_ID": "x",
        "NODE_RANK": "0",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_USE_FSDP": "true",
    }
    assert without_launcher(TORCHRUN | removed | kept) == kept
