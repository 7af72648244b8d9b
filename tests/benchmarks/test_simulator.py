"""benchmarks/simulator.py: any file of MLPerf's form is predicted, c0 is what the fit gives, and missed targets are marked."""

from pathlib import Path

import pytest

from benchmarks.simulator import SCALINGS, Target, mlperf, predicted_efficiency
from benchmarks.simulator_mlperf import C0_MS, DATA, MANY_GPUS, MORE, fit_c0_ms, predicted_ms, read_systems, references


def test_mlperf_is_predicted_within_the_targets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also from a file that has only systems of many nodes: one node's then come from the project's file."""
    lines = DATA.read_text().splitlines()
    header = lines[0].split(",").index("gpus")
    many = [line for line in lines[1:] if int(line.split(",")[header]) >= MANY_GPUS]
    file = tmp_path / "many.csv"
    file.write_text("\n".join([lines[0], *many]) + "\n")
    rows, targets = mlperf(file)
    assert len(rows) == len(many) == 30
    assert all(target.is_met for target in targets), capsys.readouterr().out


def test_c0_is_what_the_fit_gives() -> None:
    systems = [*read_systems(DATA), *read_systems(MORE)]
    for generation in ("H100", "L40S"):
        own = [system for system in systems if system.like == generation]
        assert fit_c0_ms(own) == {generation: pytest.approx(C0_MS[generation], abs=0.05)}


def test_one_node_of_the_same_maker_is_the_reference() -> None:
    systems = read_systems(DATA)
    (eos,) = [system for system in systems if system.name == "eos_n316_ngc24.04_mxnet"]
    assert [node.name for node in references(eos, systems)] == ["eos_ngc24.04_mxnet"]
    assert predicted_ms(eos, systems, 0.0) < predicted_ms(eos, systems, 3.5)


def test_published_scaling_is_overestimated_by_about_a_tenth() -> None:
    (goyal,) = [case for case in SCALINGS if case.title.startswith("Goyal")]
    assert 0 < predicted_efficiency(goyal) - goyal.published < 0.12


def test_a_missed_target_is_marked() -> None:
    assert str(Target("error %", 7.0, 6.0)).startswith("MISSED")
    assert str(Target("error %", 5.0, 6.0)).startswith("met")
