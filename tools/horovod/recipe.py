"""The Horovod release, the edits of its source, and the build settings. A hash of all of them is part of the wheel cache key."""

import hashlib

HOROVOD_VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

# (file in the source, text that must be there, replacement). {cxx} is the C++ standard that torch needs.
SOURCE_EDITS = (
    ("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD {cxx})"),
    ("horovod/torch/CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD {cxx})"),
    # Horovod's own kernels are plain C++11, but the newest nvcc's headers are not.
    ("horovod/common/ops/cuda/CMakeLists.txt", "set(CMAKE_CUDA_STANDARD 11)", "set(CMAKE_CUDA_STANDARD 17)"),
    # The driver installs libcuda.so.1. The plain name is a development link, which compute nodes and containers often lack:
    # without it every reduction ends with "Could not dlopen libcuda.so".
    ("horovod/torch/cuda_util.cc", 'dlopen("libcuda.so", RTLD_LAZY)', 'dlopen("libcuda.so.1", RTLD_LAZY)'),
)
# For a CPU build with a CUDA torch: otherwise CMake turns the CUDA build on wherever it finds an nvcc.
CPU_ONLY_EDIT = ("cmake/Modules/FindPytorch.cmake", "(CUDA_HOME is not None)", "False")

BUILD_SETTINGS = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    # setup.py passes make's flags.
    "CMAKE_GENERATOR": "Unix Makefiles",
    # Gloo's CMakeLists.txt asks for 2.8, which CMake 4 refuses.
    "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
}


def recipe_hash() -> str:
    """Hash the settings of this file: a change of any of them builds a new wheel."""
    text = repr((SDIST_SHA256, SOURCE_EDITS, CPU_ONLY_EDIT, sorted(BUILD_SETTINGS.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
