"""A store of 80 MB that is given 200 MB: `python small_store.py spills | full`; see test_object_store.py."""

import sys

import numpy as np
import ray

from sdft_dist.cluster import explain
from sdft_dist.pieces import fetch, put
from sdft_dist.types import SampleKey, TeacherTargets


@ray.remote(num_cpus=0)
class Writer:
    """Puts targets into the store as a teacher does."""

    def write(self, first):
        rows = [np.full((10_000, 250), first + i, np.float32) for i in range(2)]  # 10 MB each
        return put([
            TeacherTargets(key=SampleKey(0, first + i, 0), teacher_version=0, dtype="float32", states=row)
            for i, row in enumerate(rows)
        ])  # fmt: skip


def main(full):
    disk = {"local_fs_capacity_threshold": 1e-6} if full else {}
    ray.init(object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False, _system_config=disk)
    writer = Writer.remote()
    try:
        pieces = [piece for first in range(0, 20, 2) for piece in ray.get(writer.write.remote(first), timeout=60)]
    except Exception as error:
        print(repr(explain(error, [writer])))
        return
    for i, piece in enumerate(pieces):
        (targets,) = fetch([piece])
        assert targets.key.problem == i
        assert (targets.states == i).all()
        del targets
    print(f"{len(pieces)} targets came back whole")


if __name__ == "__main__":
    main(sys.argv[1] == "full")
