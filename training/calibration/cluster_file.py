"""Write a cluster's description: what was measured, and for the rest the figures of another cluster, or guesses."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.atomic_write import write_text
from training.errors import ConfigError
from training.planning.simulator.figures import Cluster, read_cluster

Figures = dict[str, Any]

_FIRST_LINE = "# Written by plan.py calibrate={name}."
_BY_PRECISION = ("peak_tflop_s", "achieved_tflop_s")


def figure(value: Any, source: str, sure: str) -> dict[str, Any]:
    return {"value": value, "source": source, "sure": sure}


def _guess(value: Any, why: str) -> dict[str, Any]:
    return figure(value, f"not measured by calibrate: {why}", "guess")


GUESSES: Figures = {
    "nodes": _guess(1000, "as many as a sweep may ask for"),
    "compute_spread": _guess(0.03, "the spread between runs on a machine that was measured"),
    "node_link": _guess("pcie", "unknown"),
    "node_gb_s": _guess(10, "PCIe 3.0 x16 in practice"),
    "network_gb_s": _guess(3.125, "25 Gbit/s"),
    "decode_raw_s": _guess(0.0505, "docs/benchmarks.md, on an AMD core"),
    "decode_prepared_s": _guess(0.0136, "docs/benchmarks.md, key frame every 16, on an AMD core"),
    "read_gb_s": _guess(0.5, "a network file system"),
    "evaluation_s": _guess(0.5, "statistics of batch norm, and the first batch"),
    "node_power_w": _guess(1000, "unknown"),
    "experience": _guess(1.0, "0.914 on other clusters (docs/scaling.md)"),
    "experience_spread": _guess(0.03, "unknown"),
}
"""Of what calibrate cannot measure, if no cluster is given as a base."""


def cluster_path(folder: Path, name: str) -> Path:
    """Return the file of a calibrated cluster. Raises ConfigError for a bad name or a file that calibrate did not write."""
    if not re.fullmatch(r"[a-z0-9_]{1,64}", name) or name == "schema":
        raise ConfigError(
            f"calibrate={name}: a name has lowercase letters, digits and underscores. Fix: calibrate=my_cluster"
        )
    path = folder / f"{name}.yaml"
    if path.exists() and not path.read_text().startswith(_FIRST_LINE.format(name=name)):
        raise ConfigError(f"{path} was not written by calibrate, and stays as it is. Fix: another name")
    return path


def with_base(measured: Figures, base: Figures) -> Figures:
    """Return the measured figures, and those of `base`, or guesses, for all others. Rates in other precisions are dropped."""
    return GUESSES | {key: value for key, value in base.items() if key not in _BY_PRECISION} | measured


def write_cluster(path: Path, name: str, figures: Figures, summary: str) -> Cluster:
    """Write the description, after reading it as plan.py will. Raises ConfigError for an invalid figure."""
    cluster = read_cluster(name, figures)
    lines = [_FIRST_LINE.format(name=name), f"# {summary}", "defaults: [schema]", f"name: {name}", "figures:"]
    for key, value in figures.items():
        lines += _entry(key, value)
    write_text(path, "\n".join(lines) + "\n")
    return cluster


def _entry(key: str, fields: Mapping[str, Any]) -> list[str]:
    if key in _BY_PRECISION:
        inner = [f"    {precision}: {_flow(each)}" for precision, each in fields.items()]
        return [f"  {key}:", *inner]
    return [f"  {key}: {_flow(fields)}"]


def _flow(value: Any) -> str:
    """Return a value in YAML's flow style. Numbers have no exponent, which YAML 1.1 may take for text."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float):
        return np.format_float_positional(float(f"{value:.5g}"), trim="0")
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)
