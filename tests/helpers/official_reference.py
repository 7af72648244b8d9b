"""The authors' networks in a second, plain implementation with the tensor names of their checkpoint files.

Written from the definition of mit-han-lab/temporal-shift-module (ops/models.py, ops/temporal_shift.py,
ops/non_local.py, archs/mobilenet_v2.py, online_demo/mobilenet_v2_tsm.py) and independent of this project's code, so
that tests can compare the two.
"""

import torch
import torchvision
from torch import Tensor, nn


class Shifted(nn.Module):
    """A shift by one frame before a module: 1/8 of the channels from the next frame, 1/8 from the previous frame."""

    def __init__(self, net: nn.Module, frames: int, parts: int = 8) -> None:
        super().__init__()
        self.net = net
        self.frames, self.parts = frames, parts

    def forward(self, x: Tensor) -> Tensor:
        clips = x.reshape(-1, self.frames, *x.shape[1:])
        fold = x.shape[1] // self.parts
        out = torch.zeros_like(clips)
        out[:, :-1, :fold] = clips[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
        return self.net(out.reshape(x.shape))  # type: ignore[no-any-return]


class Pooled(nn.Module):
    """A maximum over three frames, at every second frame, before a stage; the number of frames is even."""

    def __init__(self, net: nn.Module, frames: int) -> None:
        super().__init__()
        self.net = net
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        clips = x.reshape(-1, self.frames, *x.shape[1:])
        kept = [clips[:, max(0, t - 1) : t + 2].amax(1) for t in range(0, self.frames, 2)]
        return self.net(torch.stack(kept, 1).flatten(0, 1))  # type: ignore[no-any-return]


class NonLocal(nn.Module):
    """Attention from every position to every second position in height and width, with half the channels inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.g = nn.Sequential(nn.Conv3d(channels, half, 1), nn.MaxPool3d((1, 2, 2)))
        self.W = nn.Sequential(nn.Conv3d(half, channels, 1), nn.BatchNorm3d(channels))
        self.theta = nn.Conv3d(channels, half, 1)
        self.phi = nn.Sequential(nn.Conv3d(channels, half, 1), nn.MaxPool3d((1, 2, 2)))

    def forward(self, x: Tensor) -> Tensor:
        clip, half = len(x), x.shape[1] // 2
        values = self.g(x).reshape(clip, half, -1).permute(0, 2, 1)
        queries = self.theta(x).reshape(clip, half, -1).permute(0, 2, 1)
        weights = torch.softmax(torch.matmul(queries, self.phi(x).reshape(clip, half, -1)), dim=-1)
        mixed = torch.matmul(weights, values).permute(0, 2, 1).reshape(clip, half, *x.shape[2:])
        return x + self.W(mixed)  # type: ignore[no-any-return]


class Attended(nn.Module):
    """A residual block followed by a non-local block."""

    def __init__(self, block: nn.Module, frames: int) -> None:
        super().__init__()
        self.block = block
        self.nl = NonLocal(block.bn3.num_features)  # type: ignore[union-attr, arg-type]
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        clips = out.reshape(-1, self.frames, *out.shape[1:]).transpose(1, 2)
        return self.nl(clips).transpose(1, 2).reshape(out.shape)  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """The block of MobileNetV2 as one sequence: expand (unless the factor is 1), depthwise, project."""

    def __init__(self, inside: int, outside: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = inside * factor
        expand = [] if factor == 1 else [nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        project = nn.Conv2d(wide, outside, 1, bias=False)
        self.conv = nn.Sequential(
            *expand, depthwise, nn.BatchNorm2d(wide), nn.ReLU6(), project, nn.BatchNorm2d(outside)
        )
        self.identity = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.identity else self.conv(x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """MobileNetV2; factor, channels, blocks and first stride of each stage from Sandler et al., arXiv:1801.04381, table 2."""

    STAGES = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    )  # fmt: skip

    def __init__(self, classes: int) -> None:
        super().__init__()
        features: list[nn.Module] = [self._simple(3, 32, 3, 2)]
        inside = 32
        for factor, outside, count, stride in self.STAGES:
            for index in range(count):
                features.append(InvertedResidual(inside, outside, stride if index == 0 else 1, factor))
                inside = outside
        features.append(self._simple(320, 1280, 1, 1))
        self.features = nn.Sequential(*features)
        self.classifier: nn.Module = nn.Linear(1280, classes)

    @staticmethod
    def _simple(inside: int, outside: int, kernel: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU6())

    def shifted_blocks(self) -> list[InvertedResidual]:
        blocks = [module for module in self.features if isinstance(module, InvertedResidual)]
        return [block for block in blocks if block.identity and len(block.conv) == 8]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(3).mean(2))  # type: ignore[no-any-return]


class OnlineMobileNet(MobileNetV2):
    """The online demo: one frame at a time; the first eighth of the channels is kept for the next frame."""

    def step(self, frame: Tensor, caches: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Return the logits of a frame (N, 3, H, W) and the caches for the next call; no caches means the first frame."""
        kept: list[Tensor] = []
        shifted = self.shifted_blocks()
        x = frame
        for module in self.features:
            if module in shifted:
                eighth = x.shape[1] // 8
                before = torch.zeros_like(x[:, :eighth]) if caches is None else caches[len(kept)]
                kept.append(x[:, :eighth])
                x = x + module.conv(torch.cat([before, x[:, eighth:]], 1))  # type: ignore[operator]
            else:
                x = module(x)
        return self.classifier(x.mean(3).mean(2)), kept


class Official(nn.Module):
    """A network whose call maps clips (N, T, 3, H, W), or of flow (N, T, 10, H, W), to logits (N, classes)."""

    def __init__(
        self,
        backbone: str,
        classes: int,
        frames: int,
        shift: str = "residual",
        temporal_pool: bool = False,
        non_local: bool = False,
        dropout: float = 0.5,
        modality: str = "rgb",
    ) -> None:
        super().__init__()
        self.frames = frames // 2 if temporal_pool else frames
        if backbone == "mobilenet_v2":
            self.base_model: nn.Module = self._mobilenet(frames, shift)
            features, head = 1280, "classifier"
        else:
            self.base_model = torchvision.models.get_model(backbone, weights=None)
            features, head = self.base_model.fc.in_features, "fc"  # type: ignore[union-attr, assignment]
            self._shift_resnet(frames, shift)
            if non_local:
                for stage, index in (("layer2", 0), ("layer2", 2), ("layer3", 0), ("layer3", 2), ("layer3", 4)):
                    blocks = getattr(self.base_model, stage)
                    blocks[index] = Attended(blocks[index], frames)
            if temporal_pool:
                self.base_model.layer2 = Pooled(self.base_model.layer2, frames)  # type: ignore[arg-type]
        if modality == "flow":
            self._see_flow()
        setattr(self.base_model, head, nn.Dropout(dropout))
        self.new_fc = nn.Linear(features, classes)

    def _see_flow(self) -> None:
        """Five pairs of flow images instead of red, green and blue; the weights are random."""
        if isinstance(self.base_model, MobileNetV2):
            self.base_model.features[0] = MobileNetV2._simple(2 * 5, 32, 3, 2)
        else:
            self.base_model.conv1 = nn.Conv2d(2 * 5, 64, 7, 2, 3, bias=False)  # type: ignore[assignment]

    @staticmethod
    def _mobilenet(frames: int, shift: str) -> MobileNetV2:
        network = MobileNetV2(1)
        if shift != "none":
            for block in network.shifted_blocks():
                block.conv[0] = Shifted(block.conv[0], frames)
        return network

    def _shift_resnet(self, frames: int, shift: str) -> None:
        every = 2 if shift == "residual" and len(self.base_model.layer3) >= 23 else 1  # type: ignore[arg-type]
        for number in (1, 2, 3, 4):
            blocks = getattr(self.base_model, f"layer{number}")
            inside = frames if number == 1 else self.frames
            for index in range(0, len(blocks), every):
                if shift == "residual":
                    blocks[index].conv1 = Shifted(blocks[index].conv1, inside)
                elif shift == "block":
                    blocks[index] = Shifted(blocks[index], inside)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.reshape(-1, *x.shape[2:])
        logits = self.new_fc(self.base_model(frames))
        return logits.reshape(-1, self.frames, logits.shape[1]).mean(1)  # type: ignore[no-any-return]


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Fill statistics, scales and biases with random values, so that none is 0 or 1 or equals its neighbour."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            random = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith(("running_var",)) or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.copy_(0.5 + random)
            elif tensor.dim() == 1:
                tensor.copy_(0.2 * random - 0.1)
            elif tensor.dim() == 0:
                tensor.fill_(7)
    return network
