"""Pools of ranks, one for each number of them, for all tests of a process."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import Pool

MOST_RANKS = 5  # at a time, of one process that tests
# Of a rank, when a test begins: what it has, and what DeepSpeed's engines have reserved in it and not given
# back. Linux lets no process fork that has reserved more in one piece than the machine has.
MOST_BYTES, MOST_RESERVED = 3 * 2**30, 18 * 2**30
PoolOf = Callable[[int], Pool]


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
    """Keep pools by their numbers of ranks, and end them."""
    found: dict[int, Pool] = {}
    yield found
    for pool in found.values():
        pool.close()


@pytest.fixture(scope="session")
def ranks(pools: dict[int, Pool]) -> PoolOf:
    """Give the pool of a number of ranks; those used longest ago end: a rank takes most of a gigabyte."""

    def pool_of(world_size: int) -> Pool:
        pools[world_size] = pools.pop(world_size, None) or Pool(world_size)  # the last in order
        for other in list(pools):
            if other != world_size and sum(pools) > MOST_RANKS:
                pools.pop(other).close()
        return pools[world_size]

    return pool_of


@pytest.fixture(autouse=True)
def large_ranks_begin_anew(pools: dict[int, Pool]) -> None:
    """End ranks that have grown before a test begins; its first job starts others."""
    for pool in pools.values():
        has, reserved = pool.largest_bytes()
        if has > MOST_BYTES or reserved > MOST_RESERVED:
            pool.close()
