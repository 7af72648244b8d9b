"""Modules under their former names give the same objects, and nothing here uses them."""

from importlib import import_module

import pytest

from runtime.checkout import CHECKOUT

FORMER = {
    "pipelines.decode": {"decode_clip": "pipelines.decoding.decode"},
    "pipelines.dali": {"DaliLoader": "pipelines.loading.dali_loader"},
    "pipelines.loader": {
        "ClipLoader": "pipelines.loading.worker_loader",
        "ClipSource": "pipelines.loading.clips",
        "EvaluationClips": "pipelines.loading.clips",
        "TrainingClips": "pipelines.loading.clips",
    },
    "pipelines.views": {"Protocol": "pipelines.stream.eval_views"},
}


@pytest.mark.parametrize("module", FORMER)
def test_a_former_name_leads_to_the_same_object(module: str) -> None:
    for name, today in FORMER[module].items():
        same = "EvalProtocol" if name == "Protocol" else name
        assert getattr(import_module(module), name) is getattr(import_module(today), same)


@pytest.mark.parametrize("module", FORMER)
def test_the_project_does_not_use_it(module: str) -> None:
    users = [
        path
        for folder in ("training", "pipelines", "tsm", "distributed", "runtime", "benchmarks", "tools", "tests")
        for path in (CHECKOUT / folder).rglob("*.py")
        if f"from {module} import" in path.read_text()
    ]
    assert users == []
