"""Scores of tasks whose answers are code; the harness loads this file by name."""

from typing import Any

from sdft_dist.harness.sandbox import passes


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether prompt and completion pass the problem's own tests."""
    program = "\n".join([doc["prompt"] + results[0], doc["test"], f"check({doc['entry_point']})"])
    return {"pass@1": float(passes(program))}
