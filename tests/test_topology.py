import pytest
from helpers import config_of

from sdft_dist import placement
from sdft_dist.errors import ConfigError
from sdft_dist.placement import Places
from sdft_dist.topology import CPU_SHARE, Need, bundles, lacking, needs, placed_on, push_transport, spot_of


def node(gpus, alive=True, **offers):
    return {"Alive": alive, "Resources": {"CPU": 8, **({"GPU": gpus} if gpus else {}), **offers}}


def test_every_role_of_the_method_is_asked_for():
    sizes = {"learner": {"ranks": 4}, "cluster": {"generators": 3, "teachers": 2, "generator_tensor_parallel": 2}}
    assert needs(config_of(**sizes), "cuda") == [
        Need(("learner",), 4, 1), Need(("generator",), 3, 2), Need(("teacher",), 2, 1)
    ]  # fmt: skip
    assert needs(config_of(method="sft", **sizes), "cuda") == [Need(("learner",), 4, 1)]
    evaluated = {"eval": {"every": 5, "sets": {"new": "file"}}}
    assert [n.roles for n in needs(config_of(method="sft", **sizes, **evaluated), "cuda")] == [
        ("learner",),
        ("generator",),
    ]
    for method in ("sdft", "sft"):
        assert needs(config_of(method=method, **sizes), "cuda", ["generator"]) == [Need(("generator",), 3, 2)], (
            "serving"
        )


def test_roles_that_share_gpus_share_bundles():
    together = config_of(cluster={"generators": 2, "teachers": 2, "colocate": "teachers"}, learner={"ranks": 3})
    wanted = needs(together, "cuda")
    assert wanted == [Need(("learner",), 3, 1), Need(("generator", "teacher"), 2, 1)]
    assert [b["GPU"] for b in bundles(wanted)] == [1] * 5
    assert (spot_of(wanted, "generator", 1), spot_of(wanted, "teacher", 1)) == ((4, 0.5), (4, 0.5))
    wanted = needs(config_of(cluster={"colocate": "all"}), "cuda")
    assert wanted == [Need(("learner", "generator", "teacher"), 1, 1)]
    assert {spot_of(wanted, role, 0).gpus for role in wanted[0].roles} == {0.3333}
    assert bundles(wanted) == [{"GPU": 1, "CPU": 0.03}]


def test_where_each_role_is_is_told():
    wanted = [Need(("learner",), 3, 1), Need(("generator", "teacher"), 2, 1)]
    told = placed_on(wanted, ["a", "b", "a", "b", "b"])
    assert told == "learner ranks: 2 on a, 1 on b; generators + teachers: 2 on b"


def test_every_actor_fits_into_its_bundle():
    for colocate in ("none", "teachers", "all"):
        for device in ("cpu", "cuda"):
            wanted = needs(config_of(cluster={"colocate": colocate}), device)
            left = [dict(b) for b in bundles(wanted)]
            for role in ("learner", "generator", "teacher"):
                spot = spot_of(wanted, role, 0)
                left[spot.bundle]["CPU"] -= CPU_SHARE
                left[spot.bundle]["GPU"] = left[spot.bundle].get("GPU", 0) - spot.gpus
            assert all(value > -1e-9 for bundle in left for value in bundle.values())


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"cluster": {"colocate": "all", "generators": 2}},
            "generators=2, cluster.teachers=1, learner.ranks=1",
        ),
        ({"cluster": {"colocate": "teachers", "teachers": 2}}, "they must be equal"),
        ({"cluster": {"colocate": "all", "teacher_tensor_parallel": 2}}, "shares single GPUs"),
        ({"cluster": {"colocate": "all", "pin_roles": True}}, "keeps roles apart"),
        ({"cluster": {"sleep": True}}, "cluster.sleep: needs cluster.colocate=all"),
        ({"cluster": {"sleep": True, "colocate": "all"}, "rollout": {"max_staleness": 1}}, "rollout.max_staleness=0"),
        ({"learner": {"offload": "optimizer", "zero_stage": 0}}, "learner.offload: needs learner.zero_stage"),
    ],
)
def test_what_cannot_share_is_refused(sections, words):
    with pytest.raises(ConfigError, match=words):
        config_of(**sections)


def test_what_is_missing_is_told_in_numbers():
    wanted = needs(config_of(learner={"ranks": 4}, cluster={"generators": 3}), "cuda")
    assert lacking(wanted, [node(8)]) is None
    assert lacking(wanted, [node(4), node(4)]) is None
    assert lacking(wanted, [node(4), node(2), node(0), node(8, alive=False)]) == (
        "needs 8 GPUs (learner ranks 4 × 1, generators 3 × 1, teachers 1 × 1), the cluster has 6 on 3 nodes"
    )


def test_an_actor_must_find_all_its_gpus_on_one_node():
    wanted = [Need(("generator",), 1, 2), Need(("teacher",), 1, 1)]
    assert lacking(wanted, [node(1), node(2)]) is None
    assert lacking(wanted, [node(1), node(1), node(1)]) == (
        "needs 3 GPUs (generators 1 × 2, teachers 1 × 1), 2 of them on one node, the cluster has 3 on 3 nodes; "
        "3 are left for generators"
    )


def test_cpu_runs_ask_for_no_gpu():
    assert lacking(needs(config_of(), "cpu"), [node(0)]) is None


def test_a_cluster_without_nodes_lacks_no_resource_that_nobody_asked_for():
    assert lacking(needs(config_of(), "cpu"), []).endswith("the cluster has 0 on 0 nodes")


def test_a_pinned_role_goes_only_where_its_resource_is():
    wanted = needs(config_of(learner={"ranks": 2}, cluster={"pin_roles": True}), "cuda")
    groups = [node(2, sdft_learner=1), node(1, sdft_generator=1), node(1, sdft_teacher=1)]
    assert lacking(wanted, groups) is None
    assert lacking(wanted, groups[:2]) == "no node offers sdft_teacher, which cluster.pin_roles asks for teachers"
    short = [node(1, sdft_learner=1), node(4, sdft_generator=1), node(1, sdft_teacher=1)]
    assert lacking(wanted, short).endswith("the cluster has 6 on 3 nodes; 0 are left for learner ranks")


@pytest.mark.parametrize(
    ("device", "fields", "expected"),
    [
        ("cpu", {}, "gloo"),
        ("cpu", {"push_transport": "ipc"}, "ipc"),
        ("cuda", {}, "nccl"),
        ("cuda", {"colocate": "teachers"}, "nccl"),
        ("cuda", {"colocate": "all"}, "ipc"),
        ("cuda", {"colocate": "all", "ranks": 2}, "gloo"),
        ("cuda", {"push_transport": "gloo"}, "gloo"),
    ],
)
def test_weights_travel_the_shortest_way_there_is(device, fields, expected):
    assert push_transport(travelling(**fields), device) == expected


@pytest.mark.parametrize(
    ("device", "fields", "says"),
    [
        ("cpu", {"push_transport": "nccl"}, "nccl needs GPUs that the learner shares with no engine"),
        ("cuda", {"push_transport": "nccl", "colocate": "all"}, "nccl needs GPUs that the learner shares with no"),
        ("cuda", {"push_transport": "ipc"}, "ipc needs one GPU that holds all roles"),
        ("cuda", {"push_transport": "ipc", "colocate": "all", "ranks": 2}, "ipc needs one GPU that holds all roles"),
    ],
)
def test_a_way_that_there_is_not_is_refused(device, fields, says):
    with pytest.raises(ConfigError, match=says):
        push_transport(travelling(**fields), device)


def travelling(*, ranks=1, **cluster):
    return config_of(learner={"ranks": ranks}, cluster={"generators": ranks, "teachers": ranks, **cluster})


def test_a_learners_memory_grows_in_place_where_no_engine_maps_it(monkeypatch):
    settings = config_of(learner={"ranks": 2}, cluster={"device": "cuda"})

    def variables(role, transport):
        options = Places(needs(settings, "cuda"), None, 0, "cuda", transport).options(role, 0, 1)
        return options.get("runtime_env", {}).get("env_vars")

    exact = "pinned_max_round_threshold_mb:64"
    for torch, there in (("2.13.0+cu130", [exact]), ("2.11.0", [])):
        monkeypatch.setattr(placement, "version", lambda name, found=torch: found)
        assert variables("learner", "nccl") == {"PYTORCH_ALLOC_CONF": ",".join(["expandable_segments:True", *there])}
        assert variables("learner", "ipc") == ({"PYTORCH_ALLOC_CONF": ",".join(there)} if there else None)
    assert variables("generator", "nccl") is None
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    assert variables("learner", "nccl") == {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}
