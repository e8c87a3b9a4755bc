"""Imports point one way: sdft_dist's pure modules <- actors, learner <- fleet, cluster, which alone see both."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PURE = {
    "types",
    "config",
    "errors",
    "prompts",
    "data",
    "records",
    "batching",
    "wire",
    "remote",
    "pieces",
    "logits",
    "watch",
}
PURE |= {"memory", "vector_math", "last_words"}  # of a process
PURE |= {"adapters", "transport", "problems", "inputs", "recipe"}
MAY_IMPORT_ACTORS = {"cluster", "fleet"}
HEAVY = {"vllm", "deepspeed"}


def imports(path, *, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def test_actors_and_learner_import_only_pure_modules_and_never_each_other():
    for package, other in (("actors", "learner"), ("learner", "actors")):
        for path in modules(package):
            for name in imports(path):
                top, _, rest = name.partition(".")
                assert top != other, f"{path} imports {name}"
                if top == "sdft_dist":
                    assert rest.split(".")[0] in PURE, f"{path} imports {name}"


def test_pure_modules_import_only_pure_modules():
    for name in PURE:
        for imported in imports(ROOT / "sdft_dist" / f"{name}.py"):
            top, _, rest = imported.partition(".")
            assert top not in {"actors", "learner"}, f"{name} imports {imported}"
            assert top != "sdft_dist" or rest in PURE, f"{name} imports {imported}"


def test_only_cluster_and_fleet_import_actors():
    for path in modules("sdft_dist"):
        tops = {name.split(".")[0] for name in imports(path)}
        if "actors" in tops:
            assert path.stem in MAY_IMPORT_ACTORS, path


def test_no_heavy_import_at_module_level_of_the_product():
    for path in modules("sdft_dist"):
        assert not HEAVY & {n.split(".")[0] for n in imports(path, top_level_only=True)}, path


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom sdft_dist.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'pydantic', 'datasets', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "COMMAND" in done.stdout
