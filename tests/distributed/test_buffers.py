"""Running statistics of the heads' own norms."""

from distributed.ranks import run_ranks


def test_all_ranks_get_the_mean_weighted_by_batches() -> None:
    run_ranks("distributed.buffers_case", 2, timeout=120)
