"""Pools of ranks, one for each number of them, for all tests of a process."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import Pool

MOST_RANKS = 5  # at a time, of one process that tests
PoolOf = Callable[[int], Pool]


@pytest.fixture(scope="session")
def ranks() -> Iterator[PoolOf]:
    """Give the pool of a number of ranks; those used longest ago end: a rank takes most of a gigabyte."""
    pools: dict[int, Pool] = {}

    def pool_of(world_size: int) -> Pool:
        pools[world_size] = pools.pop(world_size, None) or Pool(world_size)  # the last in order
        for other in list(pools):
            if other != world_size and sum(pools) > MOST_RANKS:
                pools.pop(other).close()
        return pools[world_size]

    yield pool_of
    for pool in pools.values():
        pool.close()
