"""The streaming form of a past-only network: logits for each frame as it arrives (TSM, arXiv:1811.08383, section 3.3).

The offline network shifts channels along the frames of a clip. Here the shift takes them from a cache: the same channels of the
frame before. Each frame passes the 2D backbone once, and nothing is computed twice.
"""

import copy

import torch
from torch import Tensor, nn

from .networks import PoolInput, ShiftInput, TemporalNetwork, without_autocast
from .non_local import NonLocalBlock

Caches = tuple[Tensor, ...]


def streaming_network(network: TemporalNetwork) -> "StreamingNetwork":
    """Return a copy of `network`, in evaluation mode, that takes one frame at a time.

    Takes any network of `build_network` in which no frame needs a later one: `direction='past'`, or `shift='none'`, which has no
    caches. The mean of its logits over the frames of a clip, starting from `initial_caches`, is the offline network's output
    for a clip of as many frames. Raises ValueError, with the reason, for other networks.
    """
    for name, module in network.named_modules():
        if isinstance(module, NonLocalBlock):
            raise ValueError(
                f"{name} attends to all frames of a clip, and a stream has no last frame. "
                "Fix: train a network with model.non_local=false"
            )
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, PoolInput):
                raise ValueError(
                    f"temporal pooling before {name} takes the maximum with a later frame, which a stream does not have yet. "
                    "Fix: train a network with model.temporal_pool=false"
                )
            if isinstance(hook, ShiftInput) and hook.direction != "past":
                raise ValueError(
                    f"{name} shifts in direction {hook.direction!r}: it needs a later frame, which a stream does not have yet. "
                    "Fix: train a network with model.direction=past"
                )
    return StreamingNetwork(copy.deepcopy(network))


class StreamingNetwork(nn.Module):
    """A 2D backbone and a linear classifier for one frame, with the shifted channels of the frame before in caches.

    Parameters have the offline network's names, so its weights load into this module too. It keeps no caches between calls:
    one module serves any number of streams. Within one call it does, so two threads must not call it at the same time.
    """

    def __init__(self, network: TemporalNetwork) -> None:
        super().__init__()
        self.backbone = network.backbone
        self.classifier = network.classifier
        self.in_channels = network.in_channels
        shifts = {name: _replace_shift(module) for name, module in self.backbone.named_modules()}
        self._shifts = [shift for shift in shifts.values() if shift]
        self.cache_names = tuple(name for name, shift in shifts.items() if shift)
        """The modules whose input is shifted, in the order of the caches."""
        self.eval()

    def initial_caches(self, batch: int, frame_size: tuple[int, int] | None = None) -> Caches:
        """Return the caches before the first frame of `batch` streams: zeros, as before the first frame of a clip.

        Their height and width are 1, and `stream` expands them to those of its frames. Give `frame_size` (height, width) for
        full shapes, (batch, channels, height, width), where shapes must not change between calls: for torch.export, or buffers
        that are allocated once.
        """
        weight = self.classifier.weight
        caches = tuple(weight.new_zeros(batch, shift.fold, 1, 1) for shift in self._shifts)
        if frame_size is None or batch == 0:
            return caches
        with torch.no_grad():
            _, caches = self.stream(
                weight.new_zeros(1, self.in_channels, *frame_size), tuple(cache[:1] for cache in caches)
            )
        return tuple(weight.new_zeros(batch, *cache.shape[1:]) for cache in caches)

    def stream(self, x_NCHW: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        """Return the logits (N, num_classes) of one frame of each of N streams, and the caches for their next frames."""
        if x_NCHW.dim() != 4 or x_NCHW.shape[1] != self.in_channels:
            raise ValueError(
                f"stream takes one frame of each stream, (N, {self.in_channels}, H, W), got {tuple(x_NCHW.shape)}"
            )
        if len(caches) != len(self._shifts):
            raise ValueError(
                f"the network has {len(self._shifts)} caches, got {len(caches)}. "
                "Fix: pass those of initial_caches, or of the previous call"
            )
        for shift, cache in zip(self._shifts, caches, strict=True):
            shift.cache = cache
        try:
            feature_NC = self.backbone(x_NCHW)
            kept = tuple(shift.kept() for shift in self._shifts)
        finally:
            for shift in self._shifts:
                shift.cache = None
        with without_autocast(feature_NC.device.type):
            return self.classifier(feature_NC.to(self.classifier.weight.dtype)), kept

    def forward(self, x_NCHW: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        """Call `stream`, so that torch.export and torch.compile take the module itself."""
        return self.stream(x_NCHW, caches)


class _CachedShift:
    """A forward pre-hook that takes a module's first `fold` input channels from the cache, and caches this frame's."""

    def __init__(self, fold: int) -> None:
        self.fold = fold
        self.cache: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x_NCHW, before_NCHW = args[0], self.kept()
        if before_NCHW.shape[2:] != x_NCHW.shape[2:]:
            before_NCHW = before_NCHW.expand(-1, -1, *x_NCHW.shape[2:])
        moved_NCHW = x_NCHW[:, : self.fold]
        # Copied, because a slice would keep all channels alive. Compilers plan their memory themselves.
        self.cache = moved_NCHW if torch.compiler.is_compiling() else moved_NCHW.clone()
        return (torch.cat((before_NCHW, x_NCHW[:, self.fold :]), 1),)

    def kept(self) -> Tensor:
        assert self.cache is not None, "a shifted module runs once per frame, within stream()"
        return self.cache


def _replace_shift(module: nn.Module) -> _CachedShift | None:
    """Replace a module's ShiftInput by a _CachedShift, and return it; remove it if no channel moves."""
    hooks = module._forward_pre_hooks
    key = next((key for key, hook in hooks.items() if isinstance(hook, ShiftInput)), None)
    if key is None:
        return None
    shift: ShiftInput = hooks.pop(key)  # type: ignore[assignment]
    convolution = module if isinstance(module, nn.Conv2d) else module.get_submodule("conv1")
    assert isinstance(convolution, nn.Conv2d)
    fold = convolution.in_channels // shift.fold_div
    if fold == 0:
        return None
    cached = _CachedShift(fold)
    module.register_forward_pre_hook(cached)
    return cached
