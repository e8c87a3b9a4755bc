"""The Kubernetes files: fields that exist, a command that the CLI knows, GPUs that add up."""

import json
import os
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from sdft_dist.cli import _parse
from sdft_dist.recipe import load_config
from sdft_dist.topology import lacking, needs

ROOT = Path(__file__).parent.parent
K8S = ROOT / "deploy" / "k8s"


def strict(required=(), **properties):
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": False
    }  # fmt: skip


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
AMOUNTS = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
CONTAINER = strict(
    ("name", "image", "resources"),
    name=TEXT, image=TEXT, resources=strict(requests=AMOUNTS, limits=AMOUNTS),
    env={"type": "array", "items": strict(("name", "value"), name=TEXT, value=TEXT)},
    lifecycle=strict(preStop=strict(exec=strict(("command",), command={"type": "array", "items": TEXT}))),
    volumeMounts={"type": "array", "items": strict(("name", "mountPath"), name=TEXT, mountPath={"pattern": "^/"})},
)  # fmt: skip
VOLUME = strict(
    ("name",), name=TEXT, persistentVolumeClaim=strict(("claimName",), claimName=TEXT),
    emptyDir=strict(medium={"const": "Memory"}, sizeLimit=TEXT),
)  # fmt: skip
POD = strict(
    ("containers",),
    securityContext=strict(runAsNonRoot={"const": True}, runAsUser=COUNT, fsGroup=COUNT),
    terminationGracePeriodSeconds=COUNT,
    containers={"type": "array", "items": CONTAINER, "minItems": 1},
    volumes={"type": "array", "items": VOLUME},
)
TEMPLATE = strict(("spec",), spec=POD)
WORKERS = strict(
    ("groupName", "template", "rayStartParams"),
    groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=TEXTS, template=TEMPLATE,
)  # fmt: skip
RAYJOB = strict(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"}, metadata=strict(("name",), name=TEXT, labels=TEXTS),
    spec=strict(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT, submissionMode={"const": "K8sJobMode"}, backoffLimit=COUNT,
        shutdownAfterJobFinishes={"const": True}, ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=strict(
            ("rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"),
            rayVersion=TEXT, authOptions=strict(("mode",), mode={"const": "token"}),
            headGroupSpec=strict(("rayStartParams", "template"), rayStartParams=TEXTS, template=TEMPLATE),
            workerGroupSpecs={"type": "array", "items": WORKERS},
        ),
    ),
)  # fmt: skip


def kueue(kind, **fields):
    version = {"const": "kueue.x-k8s.io/v1beta2"}  # since Kueue 0.15; v1beta1 is not served from 0.20 on
    return strict(("apiVersion", "kind", *fields), apiVersion=version, kind={"const": kind}, **fields)


QUOTA = strict(("name", "nominalQuota"), name=TEXT, nominalQuota={"type": ["string", "integer"]})
FLAVOR = strict(("name", "resources"), name=TEXT, resources={"type": "array", "items": QUOTA, "minItems": 1})
GROUP = strict(
    ("coveredResources", "flavors"), coveredResources={"type": "array", "items": TEXT, "minItems": 1},
    flavors={"type": "array", "items": FLAVOR, "minItems": 1},
)  # fmt: skip
QUEUES = (
    kueue("ResourceFlavor", metadata=strict(("name",), name=TEXT)),
    kueue(
        "ClusterQueue", metadata=strict(("name",), name=TEXT),
        spec=strict(
            ("namespaceSelector", "resourceGroups"),
            namespaceSelector=strict(),  # left out it would admit no namespace
            preemption=strict(withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]}),
            resourceGroups={"type": "array", "items": GROUP, "minItems": 1},
        ),
    ),
    kueue(
        "LocalQueue", metadata=strict(("name", "namespace"), name=TEXT, namespace=TEXT),
        spec=strict(("clusterQueue",), clusterQueue=TEXT),
    ),
)  # fmt: skip


@pytest.fixture
def job():
    return yaml.safe_load((K8S / "rayjob.yaml").read_text())


def test_fields_of_the_job(job):
    jsonschema.validate(job, RAYJOB)
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["continers"] = []
    with pytest.raises(jsonschema.ValidationError, match="continers"):
        jsonschema.validate(job, RAYJOB)


def test_ray_is_the_pinned_one(job):
    pinned = (ROOT / "pyproject.toml").read_text()
    assert f"=={job['spec']['rayClusterSpec']['rayVersion']}" in pinned


def test_the_command_asks_for_what_the_groups_have(job):
    args = _parse(job["spec"]["entrypoint"].split()[1:])
    assert args.resume == "auto"
    recipe, *more = (word.replace("/opt/sdft", str(ROOT / "deploy"), 1) for word in (args.recipe, *args.overrides))
    config = load_config(Path(recipe), more)
    nodes = []
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        offers = json.loads(json.loads(group["rayStartParams"]["resources"]))  # quoted for a shell
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        nodes += [{"Alive": True, "Resources": {"GPU": gpus, **offers}}] * group["replicas"]
    wanted = needs(config, "cuda")
    assert lacking(wanted, nodes) is None
    assert sum(n.number * n.gpus for n in wanted) == sum(n["Resources"]["GPU"] for n in nodes), "none is idle"
    grace = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > config.checkpoint.grace_s


def test_pods_that_end_tell_the_driver_and_wait_until_it_and_its_actors_are_gone(job, tmp_path):
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    (hook,) = {tuple(own["lifecycle"]["preStop"]["exec"]["command"]) for own in containers}
    (wait_s,) = {own["env"][0]["value"] for own in containers}
    assert f"checkpoint.grace_s={wait_s} " in job["spec"]["entrypoint"]
    places = [path.read_text() for path in (ROOT / "learner" / "worker.py", *(ROOT / "actors").glob("*.py"))]
    for name in re.search(r"ray::\((.*)\)", hook[-1])[1].split("|"):
        assert any(f"\nclass {name}" in text for text in places)
    # The driver is there at two looks, an actor at one more.
    said = tmp_path / "said"
    (tmp_path / "pkill").write_text(f'#!/bin/sh\necho "$*" >> {said}\nexit 1\n')
    (tmp_path / "pgrep").write_text(
        f'#!/bin/sh\necho "$*" >> {said}\n'
        f'case "$1" in -x) [ $(grep -c "^-x" {said}) -le 2 ];; -f) [ $(grep -c "^-f" {said}) -le 1 ];; esac\n'
    )
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("pkill", "pgrep", "sleep"):
        (tmp_path / name).chmod(0o755)
    subprocess.run(hook, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True, timeout=60)
    actors = "-f ^ray::(LearnerRank|Generator|Teacher)"
    assert said.read_text().splitlines() == ["-TERM -x sdft", *["-x sdft"] * 3, actors, "-x sdft", actors]


def test_fields_of_the_queue():
    found = list(yaml.safe_load_all((K8S / "kueue.yaml").read_text()))
    for one, schema in zip(found, QUEUES, strict=True):
        jsonschema.validate(one, schema)
    quota = found[1]["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]
    quota["nominalQouta"] = quota.pop("nominalQuota")
    with pytest.raises(jsonschema.ValidationError, match="nominalQouta"):
        jsonschema.validate(found[1], QUEUES[1])


def test_the_queue_covers_what_the_job_asks_for(job):
    flavors, queue, local = yaml.safe_load_all((K8S / "kueue.yaml").read_text())
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    (group,) = queue["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == flavors["metadata"]["name"]
    assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]


def test_the_claim_is_the_one_that_all_pods_write_into(job):
    claim = yaml.safe_load((K8S / "volume.yaml").read_text())
    spec = strict(
        ("accessModes", "resources"), accessModes={"const": ["ReadWriteMany"]}, storageClassName=TEXT,
        resources=strict(("requests",), requests=strict(("storage",), storage={"pattern": "^[0-9]+Ti$"})),
    )  # fmt: skip
    whole = strict(
        ("apiVersion", "kind", "metadata", "spec"), apiVersion={"const": "v1"},
        kind={"const": "PersistentVolumeClaim"}, metadata=strict(("name",), name=TEXT), spec=spec,
    )  # fmt: skip
    jsonschema.validate(claim, whole)
    volumes = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    claimed = [v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v]
    assert claimed == [claim["metadata"]["name"]]
