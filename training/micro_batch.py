"""Find the largest micro-batch that a GPU's memory holds (`batch.micro_batch=auto`)."""

import torch

from distributed.backends.base import Backend
from distributed.backends.single import SingleBackend
from distributed.batch_norm.layer import convert_batch_norm
from distributed.topology import Topology
from training.build.model import network_of
from training.build.normalise import Normaliser
from training.build.numerics import autocast, place_network
from training.build.stream import stream_sampling_of
from training.config.schema import Config

from .errors import ConfigError
from .loss import clip_loss
from .out_of_memory import is_out_of_memory, micro_batch_advice
from .recipe import make_execution, micro_batches


def find_micro_batch(config: Config, num_classes: int, backend: Backend) -> int | None:
    """Return the limit of a micro-batch for `make_execution`: what is configured or, for auto, what the memory holds. Collective.

    On CPUs auto sets no limit. On GPUs each rank tries the allowed sizes, the largest first, and all agree on one that fits on
    every rank. Only sizes with the same BN groups over ranks are tried, because Horovod's groups are fixed when it starts.
    """
    batch, world = config.batch, backend.topology.size
    if not batch.is_auto or backend.device.type != "cuda":
        return batch.micro_batch_limit
    groups = batch.global_batch, batch.bn_clips, world
    rank_groups = make_execution(*groups).bn_rank_groups()
    sizes = [size for size in micro_batches(*groups) if make_execution(*groups, size).bn_rank_groups() == rank_groups]
    for size in sizes:
        if all(backend.all_gather_objects(fits(config, num_classes, size, backend))):
            return size
    raise ConfigError(
        f"batch.micro_batch=auto: not even a micro-batch of {sizes[-1]} clips fits into the GPU's memory. "
        f"Fix: {micro_batch_advice(batch, world, sizes[-1])}"
    )


def fits(config: Config, num_classes: int, clips: int, backend: Backend) -> bool:
    """Return whether a micro-step of so many clips fits into the device's memory. Changes nothing that training uses.

    Forward and backward run on a network of their own, with clips of zeros, because a rank that fails within a collective would
    leave the others waiting. Tensors stand for optimizer state, EMA, and the copies of the gradients that the reducer makes.
    """
    device = backend.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _try_step(config, num_classes, clips, device, backend.topology.size > 1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _try_step(config: Config, num_classes: int, clips: int, device: torch.device, reduces: bool) -> None:
    model, numerics, optimizer = config.model, config.numerics, config.optimizer
    network = network_of(model, num_classes)
    alone = SingleBackend(Topology("none", 0, 1, 0, 1, 0, "localhost"), device)
    convert_batch_norm(network, alone, max(1, clips // config.batch.bn_clips), [], 1)
    place_network(network, device, numerics)
    network.train()
    # SGD and LARS: momentum; LAMB: two moments; the EMA; the update's temporary values; what the reducer of several ranks sends.
    copies = (2 if optimizer.name == "lamb" else 1) + (optimizer.ema_decay is not None) + 1 + reduces
    held = [torch.empty_like(parameter) for _ in range(copies) for parameter in network.parameters()]
    # Gradients of earlier micro-steps.
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stream = stream_sampling_of(config.pipeline)
    frames = model.num_frames + (stream.burn_in if stream else 0)
    shape = (clips, frames, network.in_channels, config.pipeline.size, config.pipeline.size)
    video_NTCHW = Normaliser(device, numerics, model.modality)(torch.zeros(shape, dtype=torch.uint8))
    label_N = torch.zeros(clips, dtype=torch.int64, device=device)
    with autocast(device, numerics.amp):
        loss, _ = clip_loss(network, video_NTCHW, label_N, label_N, stream)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del held
