"""The peer of benchmarks/end_to_end.py: a plain DDP loop in the style of torchvision's video references. Run it under torchrun.

torchrun --standalone --nproc-per-node 2 benchmarks/ddp_peer.py SEED EPOCHS RECORDS

It takes from this project only what the comparison must share: the list of clips and the network. All the rest is torch's and
torchvision's own: Dataset, DistributedSampler, DataLoader, transforms, DistributedDataParallel, local batch norm, SGD, LambdaLR.
"""
# ruff: noqa: E402  (the packages of the checkout can be imported only after sys.path is set below)

import json
import math
import random
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # the checkout instead of this folder

import av
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from pipelines.manifest import Manifest
from runtime.checkout import CHECKOUT
from tsm.networks import build_network

ROOT = CHECKOUT / "data/shapes"
# As in conf/experiment/smoke.yaml.
FRAMES, SIZE, BATCH, WORKERS, EVALUATION_BATCH = 8, 32, 16, 1, 24
RATE, MOMENTUM, WEIGHT_DECAY, WARMUP_EPOCHS, DROPOUT = 0.03, 0.9, 1e-4, 1, 0.2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Clips(Dataset[tuple[Tensor, int]]):
    """Clips of a split as (T, C, H, W) tensors: a random frame of each of 8 segments in training, else the middle one."""

    def __init__(self, split: str, train: bool) -> None:
        manifest = Manifest.open(ROOT / f"{split}.arrow")
        self._clips = [(ROOT / row.path, row.label) for row in (manifest.row(at) for at in range(len(manifest)))]
        self._train = train
        crop = v2.RandomResizedCrop(SIZE, scale=(0.56, 1.0), ratio=(0.75, 1.33), antialias=True)
        resize = v2.Resize((SIZE, SIZE), antialias=True)
        # No flip: it would turn a move to the left into one to the right.
        self._transform = v2.Compose(
            [crop if train else resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        path, label = self._clips[at]
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        chosen = [int((segment + self._offset()) * len(frames) / FRAMES) for segment in range(FRAMES)]
        video_THWC = torch.from_numpy(np.stack([frames[index] for index in chosen]))
        return self._transform(video_THWC.permute(0, 3, 1, 2)), label

    def _offset(self) -> float:
        return random.random() if self._train else 0.5


def loader_of(clips: Clips, batch: int, seed: int) -> DataLoader[tuple[Tensor, int]]:
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(clips, shuffle=clips._train, seed=seed)
    return DataLoader(
        clips, batch, sampler=sampler, num_workers=WORKERS, drop_last=clips._train, persistent_workers=True
    )


def rate_factor(step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate relative to its peak: a linear warm-up, then a cosine."""
    warmup = WARMUP_EPOCHS * steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, epochs * steps_per_epoch - warmup)))


def evaluate(network: nn.Module, loader: DataLoader[tuple[Tensor, int]]) -> float:
    """Return top-1 in percent over all processes."""
    network.eval()
    counts = torch.zeros(2)
    with torch.inference_mode():
        for video_NTCHW, label_N in loader:
            right = (network(video_NTCHW).argmax(1) == label_N).sum().item()
            counts += torch.tensor([right, len(label_N)])
    dist.all_reduce(counts)
    network.train()
    return 100 * (counts[0] / counts[1]).item()


def main() -> int:
    seed, epochs, records = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    training, validation = Clips("train", train=True), Clips("val", train=False)
    loader = loader_of(training, BATCH // world, seed)
    validation_loader = loader_of(validation, EVALUATION_BATCH, seed)
    classes = len(Manifest.open(ROOT / "train.arrow").classes)
    network = DistributedDataParallel(build_network("resnet18", classes, num_frames=FRAMES, dropout=DROPOUT))
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, len(loader), epochs))
    criterion = nn.CrossEntropyLoss()
    for epoch in range(epochs):
        assert isinstance(loader.sampler, DistributedSampler)
        loader.sampler.set_epoch(epoch)
        for video_NTCHW, label_N in loader:
            optimizer.zero_grad(set_to_none=True)
            criterion(network(video_NTCHW), label_N).backward()
            optimizer.step()
            schedule.step()
        top1_percent = evaluate(network.module, validation_loader)
        if rank == 0:
            record = {"kind": "evaluation", "time_s": time.time(), "step": (epoch + 1) * len(loader)}
            with records.open("a") as file:
                file.write(json.dumps(record | {"top1_percent": top1_percent}) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
