"""Translation of tensor names between published weights (the authors', mmaction2's, torchvision's) and ours.

Sources: mit-han-lab/temporal-shift-module (ops/models.py, ops/temporal_shift.py, ops/non_local.py, archs/mobilenet_v2.py,
online_demo/mobilenet_v2_tsm.py), open-mmlab/mmaction2 (models/backbones/resnet_tsm.py, mobilenet_v2_tsm.py) and torchvision.
Their networks wrap a shifted module, which adds `.net` to the names of its tensors. Ours are torchvision's, prefixed with
`backbone.`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .networks import RESNETS, ShiftPlace, shift_places
from .non_local import PLACES


class WeightsError(ValueError):
    """Tensors that do not fit a network by name or shape; the message names them."""


def from_official(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Translate the tensor names of a published file to ours; the tensors are not copied.

    Accepts the saved object or its mapping of tensors: the authors' `{epoch, arch, state_dict, ...}` with its `module.` prefix,
    their online demo's bare names, ResNets and MobileNetV2 of mmaction2 and of torchvision, and our own names.

    Raises WeightsError that names the first tensor with an unknown name. `check_keys` checks that the tensors form a whole network.
    """
    tensors = tensors_in(state_dict)
    bare = {name: re.sub(r"^(module\.)?(base_model\.|backbone\.)?", "", name) for name in tensors}
    rules = _HEAD + _rules_for(bare.values())
    translated: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = _apply(rules, bare[name])
        if ours is None:
            raise WeightsError(f"{name!r} is the name of no tensor of a TSM on a ResNet or MobileNetV2{_hint(name)}")
        if not isinstance(tensor, Tensor):
            raise WeightsError(f"{name!r} is not a tensor but {type(tensor).__name__}")
        if ours in translated:
            raise WeightsError(f"{name!r} is {ours!r} once more")
        translated[ours] = tensor
    return translated


def tensors_in(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tensors by name in a loaded file: its `state_dict`, or the file's top level."""
    wrapped = saved.get("state_dict")
    return wrapped if isinstance(wrapped, Mapping) else saved


def trained_with(names: Iterable[str]) -> dict[str, Any]:
    """Infer `shift` and `temporal_pool` (as for `build_network`) from tensor names; empty if the names do not show them."""
    names = list(names)
    if not any(".net." in name for name in names):
        # A TSN, or a network that does not wrap modules.
        return {}
    pooled = any(re.search(r"layer2\.net\.\d", name) for name in names)
    in_block = any(re.search(r"layer\d\.\d+\.net\.", name) for name in names)
    in_branch = any(re.search(r"conv\d?\.(conv\.|0\.)?net\.", name) for name in names)
    place = "block" if in_block else "residual" if in_branch else "none"
    return {"shift": place, "temporal_pool": pooled}


def to_official(
    state_dict: Mapping[str, Tensor],
    backbone: str,
    shift: ShiftPlace = "residual",
    temporal_pool: bool = False,
    non_local: bool = False,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Translate our tensor names to the authors'; the other arguments are those of `build_network`.

    These are the names in the authors' network. A file for their test_models.py is `{"state_dict": ...}` with names that have
    the `prefix` `module.`.

    Raises WeightsError for a tensor that is not in such a network, ValueError for a network that the authors' code cannot build.
    """
    if non_local and shift == "block":
        raise ValueError("the authors' code has no non-local blocks in a network with shift='block'")
    shifted = set(shift_places(backbone, shift))
    official: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        theirs = _apply(_TO_HEAD, name)
        if theirs is None and name.startswith("backbone."):
            inner = name.removeprefix("backbone.")
            if backbone in RESNETS:
                theirs = _to_resnet(inner, shifted, temporal_pool, non_local)
            else:
                theirs = _to_mobilenet(inner, shifted)
        if theirs is None:
            raise WeightsError(
                f"{name!r} is not a tensor of a {backbone} with {shift=}, {temporal_pool=}, {non_local=}"
            )
        official[prefix + theirs] = tensor
    return official


def check_keys(translated: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise WeightsError, with names, unless `translated` has exactly the tensors of `expected`, in the same shapes.

    `num_batches_tracked` may be missing: files from before torch 0.4.1 have none, and nothing uses it.
    """
    missing = [name for name in expected if name not in translated and not name.endswith(".num_batches_tracked")]
    unknown = [name for name in translated if name not in expected]
    differing = [
        f"{name} is {_shape(tensor)}, not {_shape(expected[name])}"
        for name, tensor in translated.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    faults = [
        f"{len(names)} {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("too many", unknown), ("of another shape", differing))
        if names
    ]
    if faults:
        raise WeightsError("; ".join(faults))


# --- Names ------------------------------------------------------------------------------------------------------------

Rules = tuple[tuple[str, str], ...]

_T = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
# `.net` after the stage marks temporal pooling, after the block the shift.
_BLOCK = r"layer([1-4])\.(?:net\.)?(\d+)\.(?:net\.|block\.)?"

_HEAD: Rules = ((r"(?:new_fc|fc|classifier|classifier\.1|cls_head\.fc_cls)\.(weight|bias)", r"classifier.\1"),)
_TO_HEAD: Rules = ((r"classifier\.(weight|bias)", r"new_fc.\1"),)

_RESNET: Rules = (
    (rf"(conv1|bn1)\.{_T}", r"backbone.\1.\2"),
    (rf"{_BLOCK}(conv|bn)(\d)\.(?:net\.)?{_T}", r"backbone.layer\1.\2.\3\4.\5"),
    (rf"{_BLOCK}downsample\.([01])\.{_T}", r"backbone.layer\1.\2.downsample.\3.\4"),
    (rf"{_BLOCK}(?:nl|non_local)\.(theta|phi\.0|g\.0|W\.[01])\.{_T}", r"backbone.layer\1.\2.non_local.\3.\4"),
    # mmaction2 puts a convolution and its batch norm into one module.
    (rf"conv1\.(conv|bn)\.{_T}", r"backbone.\g<1>1.\2"),
    (rf"{_BLOCK}conv(\d)\.(conv|bn)\.(?:net\.)?{_T}", r"backbone.layer\1.\2.\4\3.\5"),
    (rf"{_BLOCK}downsample\.conv\.{_T}", r"backbone.layer\1.\2.downsample.0.\3"),
    (rf"{_BLOCK}downsample\.bn\.{_T}", r"backbone.layer\1.\2.downsample.1.\3"),
)

_MOBILENET_ENDS: Rules = ((rf"features\.(0|18)\.([01])\.{_T}", r"backbone.features.\1.\2.\3"),)
_NESTED = r"features\.\d+\.conv\.\d\.\d\."
_MOBILENET_NESTED: Rules = (
    *_MOBILENET_ENDS,
    (rf"features\.(\d+)\.conv\.(\d\.\d|\d)\.{_T}", r"backbone.features.\1.conv.\2.\3"),
)

# An inverted residual's convolutions and batch norms: index in the authors' flat sequence -> in torchvision's nested ones. The
# first inverted residual has no expansion.
_FLAT_FIRST = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
_FLAT = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}


def _flat_rules() -> Rules:
    first = [
        (rf"features\.1\.conv\.{n}\.{_T}", rf"backbone.features.1.conv.{ours}.\1") for n, ours in _FLAT_FIRST.items()
    ]
    others = [
        (rf"features\.(?!1\.)(\d+)\.conv\.{n}\.(?:net\.)?{_T}", rf"backbone.features.\1.conv.{ours}.\2")
        for n, ours in _FLAT.items()
    ]
    return (*_MOBILENET_ENDS, *first, *others)


def _mmaction_mobilenet_rules() -> Rules:
    """Return the rules for mmaction2: stages of inverted residuals, each with up to three pairs of convolution, batch norm."""
    rules = [
        (rf"conv{end}\.{kind}\.{_T}", rf"backbone.features.{index}.{place}.\1")
        for end, index in ((1, 0), (2, 18))
        for place, kind in enumerate(("conv", "bn"))
    ]
    index = 0
    for stage, count in enumerate((1, 2, 3, 4, 3, 3, 1), 1):
        for block in range(count):
            index += 1
            places = list((_FLAT_FIRST if index == 1 else _FLAT).values())
            rules += [
                (
                    rf"layer{stage}\.{block}\.conv\.{pair}\.(?:net\.)?{kind}\.{_T}",
                    rf"backbone.features.{index}.conv.{places[2 * pair + offset]}.\1",
                )
                for pair in range(len(places) // 2)
                for offset, kind in enumerate(("conv", "bn"))
            ]
    return tuple(rules)


def _rules_for(names: Iterable[str]) -> Rules:
    """Return the rules of the layout that the names belong to: one name can mean different tensors in two layouts."""
    names = list(names)
    if any(name.startswith("features.") for name in names):
        return _MOBILENET_NESTED if any(re.match(_NESTED, name) for name in names) else _flat_rules()
    if any(re.match(r"layer\d\.\d\.conv\.", name) for name in names):
        return _mmaction_mobilenet_rules()
    return _RESNET


def _apply(rules: Rules, name: str) -> str | None:
    for pattern, template in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(template)
    return None


def _to_resnet(name: str, shifted: set[str], temporal_pool: bool, non_local: bool) -> str | None:
    match = re.fullmatch(rf"layer([1-4])\.(\d+)\.(.+)\.{_T}", name)
    if match is None:
        return f"base_model.{name}" if re.fullmatch(rf"(conv1|bn1)\.{_T}", name) else None
    stage, index, module, kind = match.groups()
    block = f"layer{stage}.{index}"
    attended = non_local and (f"layer{stage}", int(index)) in PLACES
    if module.startswith("non_local."):
        module = f"nl.{module.removeprefix('non_local.')}" if attended else ""
    elif re.fullmatch(r"(conv|bn)\d|downsample\.[01]", module):
        wrapper = "net." if block in shifted else "block." if attended else ""
        module = wrapper + module + (".net" if f"{block}.{module}" in shifted else "")
    else:
        return None
    pooled = "net." if temporal_pool and stage == "2" else ""
    return f"base_model.layer{stage}.{pooled}{index}.{module}.{kind}" if module else None


def _to_mobilenet(name: str, shifted: set[str]) -> str | None:
    match = re.fullmatch(rf"features\.(\d+)\.conv\.(\d\.\d|\d)\.{_T}", name)
    if match is None:
        return f"base_model.{name}" if re.fullmatch(rf"features\.(0|18)\.[01]\.{_T}", name) else None
    index, place, kind = match.groups()
    flat = {ours: n for n, ours in (_FLAT_FIRST if index == "1" else _FLAT).items()}
    if place not in flat:
        return None
    wrapper = ".net" if f"features.{index}.conv.{place}" in shifted else ""
    return f"base_model.features.{index}.conv.{flat[place]}{wrapper}.{kind}"


def _hint(name: str) -> str:
    # mmaction2 has three forms of attention, and two of them use the same names.
    if "non_local_block" in name:
        return ": mmaction2's non-local blocks are not the authors', and their names do not tell which form they are"
    return ""


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
