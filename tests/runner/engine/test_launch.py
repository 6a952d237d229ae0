"""The environment of the processes of a stage."""

from runner.engine.launch import without_launcher

TORCHRUN = {
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "1",
    "RANK": "1",
    "LOCAL_RANK": "0",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "6000",
}


def test_variables_of_a_launcher_are_not_passed_to_the_processes_of_a_training() -> None:
    kept = {"PATH": "/bin", "SLURM_NNODES": "2", "MY_RANK": "3", "CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_LOG_LEVEL": "info"}
    removed = {
        "TORCHELASTIC_RUN_ID": "x",
        "NODE_RANK": "0",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_USE_FSDP": "true",
    }
    assert without_launcher(TORCHRUN | removed | kept) == kept
