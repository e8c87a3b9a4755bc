from sdft_dist.config import parse_config
from sdft_dist.topology import Need, lacking, needs


def config(**sections):
    return parse_config({"model": {"path": "m"}, "data": {"train": "d"}} | sections)


def node(gpus, alive=True, **offers):
    return {"Alive": alive, "Resources": {"CPU": 8, **({"GPU": gpus} if gpus else {}), **offers}}


def test_every_role_of_the_method_is_asked_for():
    sizes = {"learner": {"ranks": 4}, "cluster": {"generators": 3, "teachers": 2}}
    assert needs(config(**sizes), "cuda") == [
        Need("learner ranks", 4, 1.0), Need("generators", 3, 1.0), Need("teachers", 2, 1.0)
    ]  # fmt: skip
    assert needs(config(method="sft", **sizes), "cuda") == [Need("learner ranks", 4, 1.0)]
    evaluated = {"eval": {"every": 5, "sets": {"new": "file"}}}
    assert [n.role for n in needs(config(method="sft", **sizes, **evaluated), "cuda")] == [
        "learner ranks",
        "generators",
    ]


def test_what_is_missing_is_told_in_numbers():
    wanted = needs(config(learner={"ranks": 4}, cluster={"generators": 3}), "cuda")
    assert lacking(wanted, [node(8)]) is None
    assert lacking(wanted, [node(4), node(4)]) is None
    assert lacking(wanted, [node(4), node(2), node(0), node(8, alive=False)]) == (
        "needs 8 GPUs (learner ranks 4 × 1, generators 3 × 1, teachers 1 × 1), the cluster has 6 on 3 nodes"
    )


def test_an_actor_must_find_all_its_gpus_on_one_node():
    wanted = [Need("generators", 1, 2.0), Need("teachers", 1, 1.0)]
    assert lacking(wanted, [node(1), node(2)]) is None
    assert "generators 1 × 2" in lacking(wanted, [node(1), node(1), node(1)])


def test_cpu_runs_ask_for_no_gpu():
    assert lacking(needs(config(), "cpu"), [node(0)]) is None


def test_a_pinned_role_goes_only_where_its_resource_is():
    wanted = needs(config(learner={"ranks": 2}, cluster={"pin_roles": True}), "cuda")
    groups = [node(2, sdft_learner=1), node(1, sdft_generator=1), node(1, sdft_teacher=1)]
    assert lacking(wanted, groups) is None
    assert lacking(wanted, groups[:2]) == "no node offers sdft_teacher, which cluster.pin_roles asks for teachers"
    short = [node(1, sdft_learner=1), node(4, sdft_generator=1), node(1, sdft_teacher=1)]
    assert lacking(wanted, short).endswith("the cluster has 6 on 3 nodes; 0 are left for learner ranks")
