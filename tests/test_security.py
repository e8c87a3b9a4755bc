"""What the trust table of SECURITY.md rests on."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("sdft_dist", "actors", "learner") for p in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize(
    "word", ["trust_remote_code", "VLLM_ALLOW_INSECURE_SERIALIZATION", "import pickle", "torch.load"]
)
def test_no_source_runs_code_from_data(word):
    assert len(SOURCES) > 50
    assert not [str(p) for p in SOURCES if word in p.read_text()]


def test_insecure_serialization_is_not_switched_on_by_imports():
    import sdft_dist.train  # noqa: F401

    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in os.environ


@pytest.mark.e2e
def test_a_local_ray_has_no_dashboard(ray_cluster):
    import ray

    assert ray.get_runtime_context().gcs_address.startswith(ray.util.get_node_ip_address())
    assert not ray._private.worker.global_worker.node.webui_url


def test_no_setting_holds_a_secret():
    """Configurations are saved and shown as they are; what is secret belongs into the environment."""
    import re

    from sdft_dist.config import Config

    def names(schema):
        for name, field in schema.get("properties", {}).items():
            yield name
            yield from names(field)
        for part in schema.get("$defs", {}).values():
            yield from names(part)

    found = set(names(Config.model_json_schema()))
    assert {"learning_rate", "push_bucket_mib"} <= found
    assert not [name for name in found if re.search(r"secret|passw|credential|api_?key|token$", name)]
