"""Ranks that come to a store which is not theirs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import free_port

from posttrain.parallel import rendezvous
from posttrain.parallel.launched import Launch


@pytest.mark.parametrize(("rank", "world_size"), [(1, 2), (1, 4), (2, 4)])
def test_a_second_run_on_the_same_port_leaves_the_first_alone(rank, world_size):
    """Its rank 0 cannot listen, and its other ranks must not be taken for the first run's: they end, and with them that run would."""
    port = free_port()

    def meet(rank: int, world_size: int):
        return rendezvous.meet(20.0, Launch(rank, world_size, port=port))

    with ThreadPoolExecutor(2) as pool:
        first = list(pool.map(lambda one: meet(one, 2), range(2)))
    before = first[0].num_keys()
    with pytest.raises(ValueError, match=f"rank {rank} on .* of {world_size} finds another run at .* of 2 ranks.* --master_port"):
        meet(rank, world_size)
    with pytest.raises(ValueError, match="cannot listen on port"):
        meet(0, world_size)
    assert first[0].num_keys() == before
    assert not first[0].check(["posttrain/here/2"])
