"""Provide the CUDA and NCCL folders to build with: the machine's, or folders of links to the files of pip packages."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from .choose import Plan, Torch
from .commands import pip, run_logged


def link_missing(sources: Sequence[Path], target: Path) -> None:
    """Link every entry of the source folders into target; the first source that has a name wins."""
    target.mkdir(parents=True, exist_ok=True)
    for source in sources:
        for entry in sorted(source.iterdir()) if source.is_dir() else []:
            link = target / entry.name
            if not link.is_symlink():
                link.symlink_to(entry.resolve())


def add_plain_names(folder: Path) -> None:
    """Link libcudart.so to libcudart.so.13 and so on: pip packages hold versioned names, linkers want the plain one."""
    for library in sorted(folder.glob("lib*.so.*")):
        plain = folder / f"{library.name.split('.so.')[0]}.so"
        if not plain.is_symlink():
            plain.symlink_to(library.name)


def lay_out_cuda(roots: Sequence[Path], folder: Path) -> Path:
    """Link several partial toolkits into one folder: the programs of the first, the headers and libraries of all."""
    link_missing([root / "include" for root in roots], folder / "include")
    link_missing([root / lib for root in roots for lib in ("lib64", "lib")], folder / "lib64")
    add_plain_names(folder / "lib64")
    (folder / "lib").symlink_to("lib64")
    (folder / "nvvm").symlink_to(roots[0] / "nvvm")
    # A copy: nvcc finds everything else by bin/.., which through a link would lead back into the partial toolkit.
    shutil.copytree(roots[0] / "bin", folder / "bin")
    # nvcc looks for its own headers and libraries here.
    target = folder / "targets" / ("sbsa-linux" if platform.machine() == "aarch64" else f"{platform.machine()}-linux")
    target.mkdir(parents=True)
    for name, to in (("include", "include"), ("lib", "lib64")):
        (target / name).symlink_to(folder / to)
    return folder


def nvidia_folders(torch: Torch) -> list[Path]:
    """List torch's CUDA packages with headers (one for CUDA 13, many for CUDA 12), without NCCL."""
    return sorted(
        include.parent for include in torch.folder.parent.glob("nvidia/*/include") if include.parent.name != "nccl"
    )


def cuda_home(plan: Plan, work: Path, log: Path) -> Path:
    """Return the machine's toolkit if it is complete, else one laid out in the work folder."""
    root = plan.cuda.root
    if root is not None and (root / "include/cublas_v2.h").is_file() and (root / "lib64/libcudart.so").exists():
        return root
    if root is None:
        version = importlib.metadata.version("cuda-toolkit")
        fetched = work / "nvcc"
        run_logged([*pip("install"), "--target", fetched, f"cuda-toolkit[nvcc,cccl]=={version}"], log, dict(os.environ))
        root = next(fetched.glob("nvidia/cu*/bin/nvcc")).parent.parent
    return lay_out_cuda([root, *nvidia_folders(plan.torch)], work / "cuda")


def nccl_home(plan: Plan, work: Path) -> Path:
    """Return the machine's NCCL folder, or links to torch's NCCL with a plain libnccl.so."""
    assert plan.nccl.root is not None
    if plan.nccl.kind == "machine":
        return plan.nccl.root
    folder = work / "nccl"
    link_missing([plan.nccl.root / "include"], folder / "include")
    link_missing([plan.nccl.root / "lib"], folder / "lib")
    add_plain_names(folder / "lib")
    return folder
