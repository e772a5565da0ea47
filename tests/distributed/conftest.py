"""Pools of ranks, one for each number of them, for all tests of a process."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import Pool

PoolOf = Callable[[int], Pool]


@pytest.fixture(scope="session")
def ranks() -> Iterator[PoolOf]:
    """Give the pool of a number of ranks."""
    pools: dict[int, Pool] = {}

    def pool_of(world_size: int) -> Pool:
        return pools.setdefault(world_size, Pool(world_size))

    yield pool_of
    for pool in pools.values():
        pool.close()
