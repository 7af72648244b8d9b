"""Check the pinned versions, the choices of the Horovod build, and the report of skipped tests."""

import ast
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tools.horovod import build, choose, commands, prove, recipe, toolkits
from tools.requirements import name_of, normalized, requirements

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED_PYTHON = (3, 11)
GROUPS = ["core", *PROJECT["project"]["optional-dependencies"]]

# Names on PyPI that belong to other projects than they seem to.
NOT_WHAT_THEY_SEEM = {"apex", "nvidia-dali"}

# Folders of this project's Python code ("" is the top), modules that the operator installs, and packages whose import
# name differs from the name they are installed by.
CODE = ("", "benchmarks", "distributed", "launch", "pipelines", "runtime", "slurm", "tests", "tools", "training", "tsm")
OPERATORS_OWN = {"apex", "nvidia", "decord"}
# In the folder that tools/fetch_litert.py makes, for a process of its own.
CONVERTERS_OWN = {"ai_edge_quantizer", "litert_torch"}
# torch's CUDA build installs the version that it needs; other builds do not need it.
TORCHS_OWN = {"triton"}
NOT_OURS_TO_NAME = OPERATORS_OWN | CONVERTERS_OWN | TORCHS_OWN
DISTRIBUTION = {"PIL": "pillow", "cv2": "opencv-contrib-python-headless", "hydra": "hydra-core", "yaml": "pyyaml"}


def pins() -> dict[str, str]:
    """Return the version of each package in constraints.txt."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    matches = [(line, re.fullmatch(r"([a-z0-9-]+)==(\S+)", line)) for line in lines if line]
    assert all(match for _, match in matches), [line for line, match in matches if not match]
    return {match.group(1): match.group(2) for _, match in matches if match}


# --- Dependencies -----------------------------------------------------------------------------------------------------


def test_every_requirement_is_pinned() -> None:
    assert {name_of(line) for line in requirements(GROUPS)} <= pins().keys()


def test_pins_lie_in_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    for line in requirements(GROUPS):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins()[name_of(line)], prereleases=True), line


def test_one_package_of_opencv() -> None:
    """Pin one of OpenCV's packages at most: they share the folder cv2, and pip lets each overwrite the others' files."""
    named = {name_of(line) for line in requirements(GROUPS)} | pins().keys()
    assert {name for name in named if name.startswith("opencv-")} == {"opencv-contrib-python-headless"}


def test_misleading_names_are_nowhere() -> None:
    named = {name_of(line) for line in requirements(GROUPS)} | pins().keys()
    assert not named & NOT_WHAT_THEY_SEEM


def test_the_environment_is_the_pinned_one() -> None:
    """Fail on a version other than the pinned one: a test here would cover a version that users do not install."""
    from importlib.metadata import version

    if sys.version_info[:2] != PINNED_PYTHON:
        pytest.skip(f"constraints.txt pins versions for Python {'.'.join(map(str, PINNED_PYTHON))}")
    core = {name_of(line) for line in requirements(["core"])}
    # Without a tag such as +cpu.
    here = {name: version(name).split("+")[0] for name in core}
    assert here == {name: pins()[name] for name in core}


def test_the_environment_lies_in_the_declared_ranges() -> None:
    """Accept any version in the declared ranges, on any Python, even if it is not the pinned one."""
    from importlib.metadata import version

    from packaging.requirements import Requirement

    for line in requirements(["core"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name).split("+")[0], prereleases=True), line


def test_nothing_is_ever_installed_into_site_packages() -> None:
    assert PROJECT["tool"]["setuptools"]["packages"] == []


def test_no_folder_of_tests_hides_a_package() -> None:
    """Keep tests/ off sys.path, where tests/distributed could shadow distributed."""
    assert (ROOT / "tests").resolve() not in {Path(folder).resolve() for folder in sys.path}
    for folder in ("distributed", "pipelines", "runtime", "tests", "tools", "training", "tsm"):
        spec = importlib.util.find_spec(folder)
        # A set: a namespace package names its folder once for each time that it stands in sys.path.
        assert spec is not None and set(spec.submodule_search_locations or ()) == {str(ROOT / folder)}


def imported_packages(source: str) -> set[str]:
    """Return the top-level names that a source file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_every_import_is_named_in_pyproject() -> None:
    """Require every import in pyproject.toml; otherwise it works only while another package installs it."""
    ours = {path.stem if path.is_file() else path.name for path in ROOT.iterdir()}
    named = {name_of(line) for line in requirements(GROUPS)}
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py") if folder else ROOT.glob("*.py"):
            foreign = imported_packages(path.read_text()) - sys.stdlib_module_names - ours - NOT_OURS_TO_NAME
            unnamed = {name for name in foreign if normalized(DISTRIBUTION.get(name, name)) not in named}
            assert not unnamed, f"{path.relative_to(ROOT)} imports {unnamed}, which pyproject.toml does not name"


def test_unknown_group_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no group nonsense.*core.*horovod"):
        requirements(["core", "nonsense"])


# --- Choices of the Horovod build -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_version", "standard"),
    [
        ("1.13.1+cu117", 14),
        ("2.0.1", 14),
        ("2.1.0", 17),
        ("2.9.0+cpu", 17),
        ("2.13.0+cpu", 17),
        ("2.14.1+cu130", 20),
        ("2.15.0.dev20260101", 20),
        ("3.0.0", 20),
    ],
)
def test_cxx_standard(torch_version: str, standard: int) -> None:
    assert choose.cxx_standard(torch_version) == standard


def test_cxx_standard_of_an_unreadable_version() -> None:
    with pytest.raises(commands.BuildError, match="cannot read"):
        choose.cxx_standard("nightly")


def example_key() -> choose.CacheKey:
    """Return a typical cache key."""
    return choose.CacheKey(
        horovod="0.28.1",
        torch="2.14.1+cu130",
        python_tag="cpython-311",
        platform="linux-x86_64-glibc-2.36",
        cxx11_abi=1,
        cxx_standard=20,
        compiler="g++ 12.2.0",
        cpu_flags="f16c,avx,fma",
        mpi="Open MPI 4.1.4",
        cuda="machine 13.0.88",
        cuda_archs="75,80,90",
        nccl="wheels 2.30.7",
        recipe="0123456789abcdef",
    )


@pytest.mark.parametrize("ingredient", [field.name for field in dataclasses.fields(choose.CacheKey)])
def test_cache_key_changes_with(ingredient: str) -> None:
    key = example_key()
    value = getattr(key, ingredient)
    change: dict[str, Any] = {ingredient: value + 1 if isinstance(value, int) else value + "x"}
    changed = dataclasses.replace(key, **change)
    assert changed.digest() != key.digest()
    assert example_key().digest() == key.digest()


def test_recipe_changes_with_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipe.recipe_hash()
    monkeypatch.setitem(recipe.BUILD_SETTINGS, "HOROVOD_WITH_GLOO", "0")
    assert recipe.recipe_hash() != before


def cuda_torch(folder: Path, cuda: str | None = "13.0") -> choose.Torch:
    """Return the description of a torch that is not installed."""
    return choose.Torch("2.14.1+cu130", cuda, 1, folder / "site-packages/torch")


def write_nvcc(folder: Path, release: str) -> Path:
    """Write a CUDA toolkit whose nvcc only reports its version."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}, V{release}.88"; exit; fi\n'
        f"echo '#$ TOP={folder}' >&2\n"
    )
    nvcc.chmod(0o755)
    return folder


def test_the_named_toolkit_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOROVOD_CUDA", raising=False)
    monkeypatch.setenv("HOROVOD_CUDA_HOME", str(write_nvcc(tmp_path / "cuda", "13.1")))
    choice = choose.choose_cuda(cuda_torch(tmp_path))
    assert (choice.kind, choice.identity, choice.root) == ("machine", "machine 13.1.88", tmp_path / "cuda")


def test_a_toolkit_of_another_generation_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOROVOD_CUDA", raising=False)
    old = str(write_nvcc(tmp_path / "cuda", "12.4") / "bin/nvcc")
    monkeypatch.setattr(choose, "nvcc_candidates", lambda: iter([("named", old)]))
    monkeypatch.setattr(choose.importlib.metadata, "version", lambda name: "13.0.3")
    choice = choose.choose_cuda(cuda_torch(tmp_path))
    assert (choice.kind, choice.identity) == ("wheels", "wheels 13.0.3")
    assert "needs CUDA 13" in choice.why


@pytest.mark.parametrize(("cuda", "setting"), [(None, ""), ("13.0", "off")])
def test_cpu_only(cuda: str | None, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_CUDA", setting)
    torch = cuda_torch(tmp_path, cuda)
    choice = choose.choose_cuda(torch)
    assert choice.kind == "none"
    assert choose.choose_nccl(torch, choice).kind == "none"


def test_mpi_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose.shutil, "which", lambda name: f"/opt/bin/{name}")
    monkeypatch.setattr(choose, "first_line", lambda *command: "version 1")
    monkeypatch.setenv("HOROVOD_CUDA", "off")
    monkeypatch.delenv("HOROVOD_MPI", raising=False)
    with_mpi = choose.make_plan()
    monkeypatch.setenv("HOROVOD_MPI", "off")
    without = choose.make_plan()
    assert (with_mpi.mpicxx, without.mpicxx) == ("/opt/bin/mpicxx", None)
    assert without.key.mpi == "none"
    assert with_mpi.key.digest() != without.key.digest()


def test_torchs_nccl_comes_before_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOROVOD_NCCL_HOME", "NCCL_HOME", "NCCL_ROOT"):
        monkeypatch.delenv(name, raising=False)
    header = tmp_path / "site-packages/nvidia/nccl/include/nccl.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 30\n#define NCCL_PATCH 7\n")
    cuda = choose.Toolkit("machine", "machine 13.0", tmp_path, "")
    assert choose.choose_nccl(cuda_torch(tmp_path), cuda).identity == "wheels 2.30.7"
    monkeypatch.setenv("NCCL_HOME", str(tmp_path))
    with pytest.raises(commands.BuildError, match=r"NCCL_HOME=.*no include/nccl.h"):
        choose.choose_nccl(cuda_torch(tmp_path), cuda)


def test_half_toolkits_are_laid_out_as_one(tmp_path: Path) -> None:
    """Combine the compiler of one folder with the libraries of another, under the plain names that linkers search for."""
    for name in ("compiler/include/cuda.h", "compiler/bin/nvcc", "wheel/include/cuda.h", "wheel/lib/libcudart.so.13"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    home = toolkits.lay_out_cuda([tmp_path / "compiler", tmp_path / "wheel"], tmp_path / "cuda")
    assert (home / "include/cuda.h").read_text() == "compiler/include/cuda.h"
    # As nvcc searches for it.
    assert (home / "bin/../lib64/libcudart.so").read_text() == "wheel/lib/libcudart.so.13"
    assert (home / "bin/nvcc").read_text() == "compiler/bin/nvcc"
    assert (home / "lib64/libcudart.so").read_text() == "wheel/lib/libcudart.so.13"


def test_a_source_that_is_not_the_known_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text("set(CMAKE_CXX_STANDARD 23)\n")
    none = choose.Toolkit("none", "none", None, "")
    plan = choose.Plan(example_key(), cuda_torch(tmp_path), none, none, None)
    with pytest.raises(commands.BuildError, match=r"CMakeLists.txt .* does not hold"):
        build.edit_source(tmp_path, plan)


def test_every_edit_is_made(tmp_path: Path) -> None:
    """Apply every source edit, including the driver's library: compute nodes have libcuda.so.1 but often no libcuda.so."""
    for name, old, _ in recipe.SOURCE_EDITS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"before\n  {old}\nafter\n")
    toolkit = choose.Toolkit("machine", "machine 13.0", tmp_path, "")
    build.edit_source(tmp_path, choose.Plan(example_key(), cuda_torch(tmp_path), toolkit, toolkit, None))
    assert 'dlopen("libcuda.so.1", RTLD_LAZY)' in (tmp_path / "horovod/torch/cuda_util.cc").read_text()
    assert "set(CMAKE_CXX_STANDARD 20)" in (tmp_path / "CMakeLists.txt").read_text()


def test_a_failed_command_shows_log_and_fix(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    script = "print('fatal error: Python.h: No such file or directory'); raise SystemExit(3)"
    with pytest.raises(commands.BuildError, match="status 3") as caught:
        commands.run_logged([sys.executable, "-c", script], log, dict(os.environ))
    assert str(log) in str(caught.value)
    assert "python3.11-dev" in str(caught.value)


def test_a_failed_build_leaves_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no partial wheel after a failed build, so that the next caller does not find one."""

    def fail(work: Path, log: Path) -> Path:
        (work / "wheel").mkdir()
        (work / "wheel/horovod-0.28.1-half.whl").write_text("half")
        raise BuildInterruptedError

    class BuildInterruptedError(Exception):
        pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "install_build_requirements", lambda log: None)
    monkeypatch.setattr(build, "fetch_source", fail)
    none = choose.Toolkit("none", "none", None, "")
    plan = choose.Plan(example_key(), cuda_torch(tmp_path), none, none, None)
    with pytest.raises(BuildInterruptedError):
        build.wheel_for(plan)
    assert not list(tmp_path.rglob("*.whl"))


def test_a_wheel_without_its_compiled_part_is_refused(tmp_path: Path) -> None:
    """Refuse a wheel without the compiled library, which Horovod's build produces if a path contains a plus sign."""
    log = tmp_path / "build.log"
    log.write_text("all went well\n")
    wheel = tmp_path / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    for name, complete in (("horovod/torch/mpi_ops.py", False), ("horovod/torch/mpi_lib_v2.cpython-311.so", True)):
        with zipfile.ZipFile(wheel, "a") as archive:
            archive.writestr(name, "")
        if complete:
            build.check_wheel(wheel, log)
        else:
            with pytest.raises(commands.BuildError, match="holds no compiled"):
                build.check_wheel(wheel, log)


def test_a_cache_path_that_breaks_the_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/c++")
    with pytest.raises(commands.BuildError, match="XDG_CACHE_HOME"):
        build.cache_root()
    assert "+" not in example_key().digest()


@pytest.mark.slow
def test_installed_horovod_reduces_over_two_processes() -> None:
    if importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed; make horovod")
    proof = prove.prove(choose.make_plan())
    assert "gloo ok (2 processes)" in proof


@pytest.mark.slow
def test_installed_horovod_opens_the_drivers_own_library() -> None:
    """Check the edit of horovod/torch/cuda_util.cc in the installed binary."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        pytest.skip("Horovod is not installed; make horovod")
    (library,) = (Path(spec.origin).parent / "torch").glob("mpi_lib_v2*.so")
    compiled = library.read_bytes()
    if b"cuCtxGetDevice\0" not in compiled:
        pytest.skip("Horovod is built for CPUs only")
    assert b"libcuda.so.1\0" in compiled
    assert b"\0libcuda.so\0" not in compiled


# --- Report of skipped tests ------------------------------------------------------------------------------------------


def inner_pytest(folder: Path, test: str, forbid: bool) -> subprocess.CompletedProcess[str]:
    """Run pytest on one file, with the plugin and without this project's settings."""
    (folder / "test_inner.py").write_text(test)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: g\n    slow: s\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FORBID_SKIPS": "1" if forbid else "0"}
    # Loads only this plugin and starts quickly.
    environment |= {"PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.helpers.skip_report",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


SKIPS = 'import pytest\n\ndef test_a(): pass\n\n@pytest.mark.skip(reason="no moon tonight")\ndef test_b(): pass\n'
PASSES = "import pytest\n\ndef test_a(): pass\n\n@pytest.mark.xfail\ndef test_b(): assert False\n"
SLOW = PASSES + "\n@pytest.mark.slow\ndef test_c(): pass\n"


@pytest.mark.parametrize(
    ("test", "forbid", "status"),
    [(SKIPS, False, 0), (SKIPS, True, 1), (PASSES, True, 0), (SLOW, True, 0)],
    ids=["skip", "skip-forbidden", "no-skip-forbidden", "deselected-forbidden"],
)
def test_skips_are_listed_and_can_be_forbidden(test: str, forbid: bool, status: int, tmp_path: Path) -> None:
    done = inner_pytest(tmp_path, test, forbid)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("test_b: no moon tonight" in done.stdout) == (test is SKIPS)
    assert ("SKIPPED (not run on this machine)" in done.stdout) == (test is not PASSES)
    assert ("this run FAILS" in done.stdout) == (status == 1)
    assert ("1 slow tests: left out" in done.stdout) == (test is SLOW)


def test_a_whole_skipped_file_counts(tmp_path: Path) -> None:
    done = inner_pytest(tmp_path, 'import pytest\npytest.importorskip("no_such_module_here")\n', forbid=True)
    assert done.returncode != 0
    assert "test_inner.py: could not import" in done.stdout


def test_a_run_without_tests_fails(tmp_path: Path) -> None:
    assert inner_pytest(tmp_path, "", forbid=False).returncode == pytest.ExitCode.NO_TESTS_COLLECTED


# --- What git ignores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "symlink"])
def test_git_ignores_the_environment(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    environment = tmp_path / ".venv"
    environment.mkdir() if kind == "folder" else environment.symlink_to("elsewhere")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    assert subprocess.run(["git", "check-ignore", "--quiet", ".venv"], cwd=tmp_path).returncode == 0


# --- Layout -----------------------------------------------------------------------------------------------------------

# A comment after a closing bracket on its own line, or after the only line within brackets: the formatter split the
# code because of it.
COMMENT = r"  # (?!type:|noqa|fmt:).*"
SPLIT_BY_A_COMMENT = re.compile(rf"^\s*[])}}]+[:,]?{COMMENT}|[\[({{]\n[^\n#]*[^\s,]{COMMENT}\n\s*[])}}]", re.MULTILINE)


def test_no_trailing_comment_splits_code() -> None:
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(files.split()) > 100
    found = {
        f"{name}: {match.group().strip()}"
        for name in files.split()
        if (ROOT / name).exists()
        for match in SPLIT_BY_A_COMMENT.finditer((ROOT / name).read_text())
    }
    assert found == set(), "Fix: put the comment above the line"


def test_a_comment_that_splits_code_is_found() -> None:
    comment = "  " + "# why"
    for split in (f"f(\n    a\n){comment}\n", f"if (\n    a\n):{comment}\n", f"x = (\n    1{comment}\n)\n"):
        assert SPLIT_BY_A_COMMENT.search(split)
    for whole in (
        f"f(a){comment}\n",
        f"x = [\n    1,{comment}\n    2,{comment}\n]\n",
        "x = (\n    1  # noqa: E501\n)\n",
    ):
        assert not SPLIT_BY_A_COMMENT.search(whole)
