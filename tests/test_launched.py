"""What the environment says about the ranks: launchers' variables, left-over ones, empty ones, and those that do not belong together."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import free_port, last_of_each, python, rank_environment
from test_runs import sft_arguments
from torch import distributed as dist

from posttrain.parallel import rendezvous
from posttrain.parallel.launched import Launch, read_launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PET_NPROC_PER_NODE")
PLACE = {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
DEEPSPEED = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8", **PLACE}
TORCHRUN = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none", **PLACE}
TORCHRUN |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.fixture
def environment(monkeypatch):
    """Call it with the variables that a launcher, or nobody, has set."""

    def make(values: dict[str, str]) -> None:
        for name in (*NAMES, *TORCHRUN):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "3", **PLACE}, Launch()),
        (dict.fromkeys(NAMES, ""), Launch()),
        ({"RANK": "0"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1", **PLACE}, Launch()),
        (DEEPSPEED, Launch(9, 16, 1, 8, "deepspeed", "node-1", 29500)),
        (TORCHRUN, Launch(9, 16, 1, 8, "torchrun", "node-1", 29500, meets_at_agent=True, attempt="2")),
        ({"RANK": "1", "WORLD_SIZE": "2", **PLACE}, Launch(1, 2, 0, 1, None, "node-1", 29500, is_alone_here=True)),
    ],
)
def test_a_launch_is_read_from_the_environment(environment, values, expected):
    environment(values)
    assert read_launch() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "one"}, "RANK=one, which should be a number"),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0, which should be a number.*unset WORLD_SIZE"),
        ({"RANK": "2"}, r"RANK=2 and WORLD_SIZE=\(unset\), but ranks count from 0.*left over, unset them"),
        ({**DEEPSPEED, "RANK": "16"}, "RANK=16 and WORLD_SIZE=16, but"),
        ({**DEEPSPEED, "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1, which"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 and WORLD_SIZE=2, but not MASTER_ADDR and MASTER_PORT.*unset them"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": ""}, "but not MASTER_PORT, the host and port"),
        ({"RANK": "1", "WORLD_SIZE": "16", "PET_NPROC_PER_NODE": "8", **PLACE}, "PET_NPROC_PER_NODE=8 asks.*torchrun instead of python"),
    ],
)
def test_variables_that_do_not_belong_together_are_named(environment, values, message):
    environment(values)
    with pytest.raises(ValueError, match=message) as error:
        read_launch()
    assert len(str(error.value)) < 400


def test_ranks_of_one_machine_must_know_which_is_which():
    """Without LOCAL_RANK both would take its first GPU; on machines of their own, as in Kubeflow's pods, each is alone there."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        met = [pool.submit(rendezvous.meet, 20.0, Launch(rank, 2, port=port, is_alone_here=True)) for rank in range(2)]
        for one in met:
            with pytest.raises(ValueError, match=r"is one of 2 ranks of this machine \(ranks 0, 1\), and LOCAL_RANK.* is not set"):
                one.result()


def test_a_restart_of_torchrun_does_not_meet_the_start_before():
    """Its agent holds the store, in which the seats of the start before are taken."""
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(2) as pool:
        for attempt in ("0", "1"):
            launches = [Launch(rank, 2, launcher="torchrun", port=port, meets_at_agent=True, attempt=attempt) for rank in range(2)]
            met = [pool.submit(rendezvous.meet, 20.0, launch) for launch in launches]
            assert [one.exception() for one in met] == [None, None]
    assert agent.num_keys() > 0


@pytest.mark.slow
def test_a_process_alone_trains_by_its_own_count(tiny, tmp_path):
    """Left over from a launcher, WORLD_SIZE would multiply batch_size; RANK and MASTER_ADDR without LOCAL_RANK are Kubeflow's."""
    short = sft_arguments(tiny, tmp_path / "run", "--max_iters=1", "--eval_interval=0", "--save_interval=0", "--warmup_iters=0")
    short = [one for one in last_of_each([*short, "--batch_size=2", "--gradient_accumulation_steps=1"]) if "global_batch" not in one]
    for left_over in ({"WORLD_SIZE": "4", "RANK": ""}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}):
        arguments = last_of_each([*short, f"--out_dir={tmp_path}/{len(left_over)}"])
        done = python("posttrain/sft.py", *arguments, env=rank_environment() | left_over)
        assert done.returncode == 0, done.stdout
        assert "\nstep       2 examples x" in done.stdout
