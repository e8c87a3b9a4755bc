"""A store of 80 MB that is given 200 MB: `python small_store.py spills | full`; see test_object_store.py."""

import sys

import numpy as np
import ray

from sdft_dist.diagnosis import explain
from sdft_dist.pieces import fetch
from sdft_dist.types import Piece, SampleKey, TeacherTargets


@ray.remote(num_cpus=0)
class Writer:
    """Answers with targets as a teacher does."""

    def write(self, first):
        rows = [np.full((10_000, 250), first + i, np.float32) for i in range(2)]  # 10 MB each
        return first, *(
            [TeacherTargets(key=SampleKey(0, first + i, 0), teacher_version=0, dtype="float32", states=row)]
            for i, row in enumerate(rows)
        )  # fmt: skip


@ray.remote(num_cpus=0)
class Reader:
    """Fetches them as a learner's rank does."""

    def read(self, pieces):
        for i, piece in enumerate(pieces):
            (targets,) = fetch([piece])
            assert targets.key.problem == i
            assert (targets.states == i).all()
            del targets
        return len(pieces)


def main(full):
    disk = {"local_fs_capacity_threshold": 1e-6} if full else {}
    ray.init(object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False, _system_config=disk)
    writer, reader, pieces = Writer.remote(), Reader.remote(), []
    try:
        for first in range(0, 20, 2):
            answer, *lists = writer.write.options(num_returns=3).remote(first)
            assert ray.get(answer, timeout=60) == first
            pieces += [Piece(own, 0) for own in lists]
        number = ray.get(reader.read.remote(pieces), timeout=60)
    except Exception as error:
        print(repr(explain(error, [writer, reader])))
        return
    print(f"{number} targets came back whole")


if __name__ == "__main__":
    main(sys.argv[1] == "full")
