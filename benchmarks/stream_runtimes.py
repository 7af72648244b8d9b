"""The runtimes that benchmarks/stream.py compares, each with a fixed number of threads, and the networks that they run."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.deploy.export.check import Run, logits_over, random_video
from training.deploy.export.formats import FORMATS, find_format
from training.deploy.export.forms import Exportable, Files, exportable
from training.deploy.export.litert import open_litert
from training.deploy.export.openvino import open_openvino
from training.errors import ConfigError
from tsm.networks import TemporalNetwork, build_network

NUM_CLASSES = 400
# Frames from which int8 takes its ranges.
_CALIBRATION_FRAMES = 16


@dataclass(frozen=True)
class Runtime:
    """A way to run an exported network; `open` takes its files, the network, and the number of threads."""

    open: Callable[[Files, Exportable, int], Run]
    format: str = ""
    """The format of its files (export.py); empty: it runs the module itself."""
    streams_only: bool = False
    layout: torch.memory_format = torch.contiguous_format
    """Of the frames that it is given."""

    @property
    def missing(self) -> str:
        """Why its files cannot be made or run here; empty: they can."""
        try:
            if self.format:
                find_format(self.format)
        except ConfigError as error:
            return str(error)
        return ""

    @property
    def precisions(self) -> tuple[str, ...]:
        has_int8 = bool(self.format) and FORMATS[self.format].quantize is not None
        return ("fp32", "int8") if has_int8 else ("fp32",)


def _open_eager(files: Files, network: Exportable, threads: int) -> Run:
    torch.set_num_threads(threads)
    module = copy.deepcopy(network.module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda inputs: list(module(*inputs))


def _open_compiled(files: Files, network: Exportable, threads: int) -> Run:
    """Compile what torch.export traced, with the weights as constants (freezing)."""
    import torch._inductor.config as inductor

    torch.set_num_threads(threads)
    # Inductor's cache may otherwise return code for another number of threads.
    inductor.freezing, inductor.cpp.threads = True, threads
    module = torch.compile(network.program(batch=1).module())
    return lambda inputs: list(module(*inputs))


def _open_onnx(files: Files, network: Exportable, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would otherwise spin for a while after each call, and slow down what is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(files["model.onnx"], options, providers=["CPUExecutionProvider"])
    outputs = list(network.outputs)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        named = dict(zip(network.inputs, (tensor.numpy() for tensor in inputs), strict=True))
        return [torch.from_numpy(output) for output in session.run(outputs, named)]

    return run


def _open_executorch(files: Files, network: Exportable, threads: int) -> Run:
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    _unsafe_reset_threadpool(threads)
    return FORMATS["executorch"].open(files, network)


RUNTIMES = {
    "eager": Runtime(_open_eager, layout=torch.channels_last),
    # Both take minutes for the windows, and XNNPACK cannot load those in int8.
    "compile": Runtime(_open_compiled, streams_only=True),
    "onnx": Runtime(_open_onnx, "onnx"),
    "executorch": Runtime(_open_executorch, "executorch", streams_only=True),
    "openvino": Runtime(open_openvino, "openvino"),
    "litert": Runtime(open_litert, "litert"),
}


def networks(backbone: str, size: int, num_frames: int) -> dict[str, Exportable]:
    """Return the networks to compare: `stream` (past-only, one frame), `plain` (the same without a shift, so without caches),
    `window` (the offline TSM on a clip) and `TSN` (the same without a shift)."""
    past = _settled(build_network(backbone, NUM_CLASSES, num_frames, direction="past"), size)
    both = _settled(build_network(backbone, NUM_CLASSES, num_frames), size)
    unshifted = _settled(build_network(backbone, NUM_CLASSES, num_frames, shift="none"), size)
    return {
        "stream": exportable(past, "stream", size),
        "plain": exportable(unshifted, "stream", size),
        "window": exportable(both, "clip", size),
        "TSN": exportable(unshifted, "clip", size),
    }


@torch.no_grad()
def _settled(network: TemporalNetwork, size: int) -> TemporalNetwork:
    """Give batch norm the statistics of a video: with the initial ones activations of random weights grow or vanish."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # The mean over the batches so far, and there is one.
            module.momentum = None
    network.train()(random_video(2, network.num_frames, size, seed=0))
    return network.eval()


@torch.no_grad()
def calibration_calls(network: Exportable) -> list[list[Tensor]]:
    """Return the inputs of calls that show a random video, a stream's caches carried."""
    calls: list[list[Tensor]] = []

    def run(inputs: list[Tensor]) -> list[Tensor]:
        calls.append(inputs)
        return network.run(inputs)

    logits_over(network, run, random_video(1, _CALIBRATION_FRAMES, network.size, seed=1))
    return calls


def calls_without_end(network: Exportable, layout: torch.memory_format) -> Iterator[Tensor]:
    """Repeat the first inputs of 8 calls, frames or clips of a random video, in a memory layout."""
    frames_BCHW = random_video(1, 8 * network.num_frames, network.size, seed=2)[0].contiguous(memory_format=layout)
    if network.form == "clip":
        return itertools.cycle([clip_TCHW[None] for clip_TCHW in frames_BCHW.split(network.num_frames)])
    return itertools.cycle(list(frames_BCHW.split(1)))
