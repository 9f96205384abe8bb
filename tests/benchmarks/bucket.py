"""Rates at which a data set in a bucket is read: directly, record by record, and from its local copy.

    python -m tests.benchmarks.bucket

The bucket is a server of Google Cloud Storage's protocol on this machine, so a request takes about a
millisecond. To a real bucket it takes tens of milliseconds, and the first rate is that much lower.
"""

import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow_datasets as tfds

from mcm_jax.data import layout, local_copy, preparation
from tests import buckets

_ROUNDS, _THREADS, _BATCH = 5, 8, 64


def _rate(records, count: int) -> float:
    """Records per second, read in batches at random by several threads, as in training."""
    order = np.random.default_rng(0).permutation(len(records))[:count]
    batches = [order[start : start + _BATCH].tolist() for start in range(0, count, _BATCH)]
    start = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(records.__getitems__, batches))
    return count / (time.perf_counter() - start)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, buckets.Bucket() as bucket, bucket.environment():
        os.environ.update(
            {"CLOUD_STORAGE_EMULATOR_ENDPOINT": bucket.url, layout.LOCAL_DATA: f"{directory}/copies"}
        )
        plan = preparation.plan(dataset="openmoji", resolution=16)
        info, _ = preparation.prepare(plan, data_dir=bucket.path / "data")
        start = time.perf_counter()
        copy = local_copy.local_copy(info.path)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in copy.iterdir())
        direct, local = (
            layout.stored_records(tfds.builder_from_directory(place), "train") for place in (info.path, copy)
        )
        rates = [(_rate(direct, 128), _rate(local, len(local))) for _ in range(_ROUNDS)]
    ratios = [after / before for before, after in rates]
    print(f"directly from the bucket   {statistics.median(rate for rate, _ in rates):8.0f} records/s")
    print(f"from the local copy        {statistics.median(rate for _, rate in rates):8.0f} records/s")
    print(
        f"ratio, median of {_ROUNDS} pairs  {statistics.median(ratios):8.1f} "
        f"(from {min(ratios):.1f} to {max(ratios):.1f})"
    )
    print(f"copying {size / 1e6:.1f} MB took {seconds:.2f} s")


if __name__ == "__main__":
    main()
