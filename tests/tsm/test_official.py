"""Our networks agree with the authors', reimplemented in official_reference.py; names in published files."""

import re
from functools import cache
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.helpers.official_reference import MobileNetV2, Official, OnlineMobileNet, randomise
from tsm.networks import BACKBONES, TemporalNetwork, build_network
from tsm.official import WeightsError, check_keys, from_official, to_official

CLASSES = 5

VARIANTS: dict[str, dict[str, Any]] = {
    "resnet18": {"backbone": "resnet18"},
    "resnet34_three_frames": {"backbone": "resnet34", "frames": 3},
    "resnet50": {"backbone": "resnet50", "frames": 8},
    "resnet50_16_frames": {"backbone": "resnet50", "frames": 16},
    "resnet101": {"backbone": "resnet101"},
    "resnet101_block": {"backbone": "resnet101", "shift": "block"},
    "tsn_resnet50": {"backbone": "resnet50", "shift": "none"},
    "block": {"backbone": "resnet50", "shift": "block"},
    "temporal_pool": {"backbone": "resnet50", "temporal_pool": True},
    "temporal_pool_block": {"backbone": "resnet18", "temporal_pool": True, "shift": "block"},
    "non_local": {"backbone": "resnet50", "non_local": True},
    "tsn_non_local": {"backbone": "resnet50", "non_local": True, "shift": "none"},
    "mobilenet_v2": {"backbone": "mobilenet_v2", "frames": 8},
    "mobilenet_v2_one_frame": {"backbone": "mobilenet_v2", "frames": 1},
    "tsn_mobilenet_v2": {"backbone": "mobilenet_v2", "shift": "none"},
    "resnext50": {"backbone": "resnext50_32x4d"},
    "flow_resnet18": {"backbone": "resnet18", "modality": "flow"},
    "flow_resnet50": {"backbone": "resnet50", "modality": "flow", "frames": 8},
    "flow_mobilenet_v2": {"backbone": "mobilenet_v2", "modality": "flow"},
}
QUICK = ("resnet18", "mobilenet_v2", "flow_resnet18")
# Compared by names only: each holds half a GB in float64.
LARGE: dict[str, dict[str, Any]] = {
    name: {"backbone": name}
    for name in ("resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
}
NAMED = VARIANTS | LARGE


pytestmark = pytest.mark.usefixtures("one_thread")


def theirs(variant: str) -> Official:
    torch.manual_seed(1)
    official = Official(**({"classes": CLASSES, "frames": 4} | VARIANTS[variant])).double()
    randomise(official)
    return official


def ours(variant: str, state_dict: dict[str, Tensor] | None = None) -> TemporalNetwork:
    """Our network of the same variant, with weights or on the meta device."""
    options = {"num_classes": CLASSES, "num_frames": 4} | NAMED[variant]
    options["num_frames"] = options.pop("frames", options["num_frames"])
    with torch.device("meta"):
        network = build_network(**options)
    if state_dict is not None:
        check_keys(state_dict, network.state_dict())
        network.load_state_dict({name: tensor.clone() for name, tensor in state_dict.items()}, assign=True)
        network.requires_grad_()
    return network


def clips(variant: str) -> Tensor:
    frames = VARIANTS[variant].get("frames", 4)
    channels = 10 if VARIANTS[variant].get("modality") == "flow" else 3
    return torch.randn(2, frames, channels, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def tiers(names: Any) -> list[Any]:
    """Mark the variants that take more than a second or two as slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


# --- The same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("variant", tiers(VARIANTS))
def test_logits_loss_and_every_gradient(variant: str, training: bool) -> None:
    official = theirs(variant).train(training)
    network = ours(variant, from_official(official.state_dict())).train(training)
    label_N = torch.tensor([1, 3])
    results = []
    for each in (official, network):
        # Seeds the dropout.
        torch.manual_seed(5)
        logit_NK = each(clips(variant))
        loss = nn.functional.cross_entropy(logit_NK, label_N)
        loss.backward()
        results.append((logit_NK.detach(), loss.item()))
    (their_logits, their_loss), (our_logits, our_loss) = results
    assert relative_error(our_logits, their_logits) < 1e-9
    assert our_loss == pytest.approx(their_loss, rel=1e-9)
    gradients = from_official({name: parameter.grad for name, parameter in official.named_parameters()})
    assert set(gradients) == {name for name, _ in network.named_parameters()}
    scale = max(gradient.norm().item() for gradient in gradients.values())
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        # In training, gradients before a batch norm cancel down to rounding error: hence the floor.
        floor = 1e-9 * scale * 1e-3
        assert (parameter.grad - gradients[name]).norm() < 1e-9 * gradients[name].norm() + floor, name
    statistics = from_official(official.state_dict())
    # Running statistics follow the same batches.
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, statistics[name], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("backbone", tiers(["resnet50", "mobilenet_v2"]))
def test_the_reference_feels_every_part(backbone: str) -> None:
    """Each difference between variants changes the logits, so the comparison can fail."""
    official = theirs(backbone).eval()
    weights = from_official(official.state_dict())
    changes: list[dict[str, Any]] = [{}, {"shift": "none"}, {"fold_div": 4}, {"direction": "past"}]
    errors = []
    for change in changes + [{"shift": "block"}] * (backbone == "resnet50"):
        with torch.device("meta"):
            network = build_network(backbone, CLASSES, 8, **change).eval()
        network.load_state_dict(weights, assign=True)
        errors.append(relative_error(network(clips(backbone)), official(clips(backbone))))
    assert errors[0] < 1e-9
    assert min(errors[1:]) > 1e-5, errors


@torch.no_grad()
def test_past_is_the_online_demo() -> None:
    demo = randomise(OnlineMobileNet(CLASSES).double()).eval()
    assert isinstance(demo, OnlineMobileNet)
    with torch.device("meta"):
        network = build_network("mobilenet_v2", CLASSES, 4, direction="past").eval()
    network.load_state_dict(from_official(demo.state_dict()), assign=True)
    x_NTCHW = clips("tsn_mobilenet_v2")
    caches: list[Tensor] | None = None
    logits = []
    for t in range(4):
        logit_NK, caches = demo.step(x_NTCHW[:, t], caches)
        logits.append(logit_NK)
    assert caches is not None
    # Cache sizes of the authors' demo.
    assert [cache.shape[1] for cache in caches] == [3, 4, 4, 8, 8, 8, 12, 12, 20, 20]
    assert relative_error(network(x_NTCHW), torch.stack(logits, 1).mean(1)) < 1e-9
    feature_NTC = network.backbone(x_NTCHW.flatten(0, 1)).unflatten(0, (2, 4))
    assert relative_error(network.classifier(feature_NTC), torch.stack(logits, 1)) < 1e-9


# --- Names ------------------------------------------------------------------------------------------------------------


@cache
def names_of(variant: str) -> dict[str, Tensor]:
    """Names and shapes of the authors' network, on the meta device."""
    with torch.device("meta"):
        return Official(**({"classes": CLASSES, "frames": 4} | NAMED[variant])).state_dict()


def keywords(variant: str) -> dict[str, Any]:
    return {name: value for name, value in NAMED[variant].items() if name not in ("frames", "modality")}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name] is second[name] for name in first)


@pytest.mark.parametrize("variant", NAMED)
def test_round_trip(variant: str) -> None:
    official = names_of(variant)
    translated = from_official(official)
    check_keys(translated, ours(variant).state_dict())
    assert same(to_official(translated, **keywords(variant)), official)
    assert same(from_official(to_official(translated, **keywords(variant), prefix="module.")), translated)


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ("resnet50", "base_model.layer1.0.conv1.net.weight"),
        ("resnet50", "base_model.layer4.2.bn3.running_var"),
        ("resnet50", "new_fc.weight"),
        ("resnet101", "base_model.layer3.22.conv1.net.weight"),
        ("resnet101", "base_model.layer3.21.conv1.weight"),
        ("block", "base_model.layer1.0.net.conv1.weight"),
        ("temporal_pool", "base_model.layer2.net.0.conv1.net.weight"),
        ("temporal_pool", "base_model.layer2.net.0.downsample.1.running_mean"),
        ("temporal_pool_block", "base_model.layer2.net.1.net.bn2.bias"),
        ("non_local", "base_model.layer2.0.block.conv1.net.weight"),
        ("non_local", "base_model.layer2.0.nl.g.0.weight"),
        ("non_local", "base_model.layer3.4.nl.W.1.running_var"),
        ("non_local", "base_model.layer3.4.nl.theta.bias"),
        ("non_local", "base_model.layer2.2.nl.phi.0.bias"),
        ("mobilenet_v2", "base_model.features.3.conv.0.net.weight"),
        ("mobilenet_v2", "base_model.features.2.conv.0.weight"),
        ("mobilenet_v2", "base_model.features.1.conv.3.weight"),
        ("mobilenet_v2", "base_model.features.16.conv.7.num_batches_tracked"),
        ("flow_resnet50", "base_model.conv1.weight"),
        ("flow_resnet50", "base_model.layer1.0.conv1.net.weight"),
        ("resnext101_32x8d", "base_model.layer3.22.conv1.net.weight"),
        ("wide_resnet101_2", "base_model.layer3.21.conv1.weight"),
        ("resnet152", "base_model.layer2.7.conv1.weight"),
        ("wide_resnet50_2", "base_model.layer2.3.conv1.net.weight"),
    ],
)
def test_names_of_the_released_files(variant: str, key: str) -> None:
    assert key in to_official(ours(variant).state_dict(), **keywords(variant))


def test_a_released_file_is_unwrapped() -> None:
    tensors = names_of("resnet50")
    released = {
        "epoch": 100,
        "arch": "resnet50",
        "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "best_prec1": torch.tensor(74.1),
    }
    assert same(from_official(released), from_official(tensors))


@pytest.mark.parametrize("head", ["fc", "base_model.fc"])
def test_other_names_of_the_classifier(head: str) -> None:
    renamed = {name.replace("new_fc", head): tensor for name, tensor in names_of("resnet18").items()}
    assert same(from_official(renamed), from_official(names_of("resnet18")))


def test_the_online_demos_names() -> None:
    with torch.device("meta"):
        demo = OnlineMobileNet(CLASSES).state_dict()
    assert {"features.3.conv.0.weight", "classifier.weight"} <= demo.keys()
    check_keys(from_official(demo), ours("mobilenet_v2").state_dict())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_torchvisions_names(backbone: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(backbone, num_classes=CLASSES).state_dict()
        network = build_network(backbone, CLASSES)
    translated = from_official(theirs)
    check_keys(translated, network.state_dict())
    inner = {name: tensor for name, tensor in translated.items() if name.startswith("backbone.")}
    assert all(theirs[name.removeprefix("backbone.")] is tensor for name, tensor in inner.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_own_names_stay(variant: str) -> None:
    state_dict = ours(variant).state_dict()
    assert same(from_official(state_dict), state_dict)


def test_both_layouts_of_mobilenet_mean_the_same_tensors() -> None:
    """Compare by values, not by names, because the two definitions order their layers differently."""
    flat = randomise(MobileNetV2(CLASSES).double()).eval()
    nested = torchvision.models.mobilenet_v2(num_classes=CLASSES).double().eval()
    translated = from_official(flat.state_dict())
    names = {name: name.removeprefix("backbone.").replace("classifier", "classifier.1") for name in translated}
    nested.load_state_dict({names[name]: tensor for name, tensor in translated.items()})
    with torch.no_grad():
        frame = clips("mobilenet_v2")[:, 0]
        assert relative_error(nested(frame), flat(frame)) < 1e-9


def mmaction_resnet(names: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' ResNet tensors as mmaction2 does: convolution and batch norm share a module."""
    renamed = {}
    for name, tensor in names.items():
        name = name.replace("base_model.", "backbone.").replace("new_fc", "cls_head.fc_cls")
        name = re.sub(r"\bconv(\d)\.", r"conv\1.conv.", name)
        name = re.sub(r"\bbn(\d)\.", r"conv\1.bn.", name)
        name = name.replace("downsample.0", "downsample.conv").replace("downsample.1", "downsample.bn")
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("variant", ["resnet18", "resnet50", "resnet101", "block", "temporal_pool", "tsn_resnet50"])
def test_mmactions_resnet_names(variant: str) -> None:
    renamed = mmaction_resnet(names_of(variant))
    assert "backbone.conv1.bn.weight" in renamed
    if variant == "resnet50":
        assert {"backbone.layer1.0.conv1.conv.net.weight", "backbone.layer1.0.downsample.bn.weight"} <= renamed.keys()
    assert same(from_official({"meta": {}, "state_dict": renamed}), from_official(names_of(variant)))


def test_mmactions_mobilenet_names() -> None:
    """Stages of blocks with up to three pairs of convolution and batch norm each; the shift wraps the first pair."""
    blocks = iter(range(1, 18))
    renamed = {}
    official = names_of("mobilenet_v2")
    ends = {0: "conv1", 18: "conv2"}
    for index, end in ends.items():
        for name, tensor in official.items():
            if name.startswith(f"base_model.features.{index}."):
                place, kind = name.split(".")[3:]
                renamed[f"backbone.{end}.{('conv', 'bn')[int(place)]}.{kind}"] = tensor
    for stage, count in enumerate((1, 2, 3, 4, 3, 3, 1), 1):
        for block in range(count):
            index = next(blocks)
            for name, tensor in official.items():
                if name.startswith(f"base_model.features.{index}."):
                    place, *_, kind = name.split(".")[4:]
                    pair, offset = divmod(int(place), 3)
                    wrapper = (
                        "net." if f"base_model.features.{index}.conv.0.net.weight" in official and pair == 0 else ""
                    )
                    renamed[f"backbone.layer{stage}.{block}.conv.{pair}.{wrapper}{('conv', 'bn')[offset]}.{kind}"] = (
                        tensor
                    )
    renamed |= {f"cls_head.fc_cls.{kind}": official[f"new_fc.{kind}"] for kind in ("weight", "bias")}
    assert {"backbone.layer2.1.conv.0.net.conv.weight", "backbone.layer2.1.conv.0.net.bn.bias"} <= renamed.keys()
    assert len(renamed) == len(official)
    assert same(from_official(renamed), from_official(official))


# --- Mismatched files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ("resnet18", "base_model.layer1.0.conv1.net.net.weight"),
        ("resnet18", "base_model.layer5.0.conv1.weight"),
        ("resnet18", "base_model.layer1.0.se.weight"),
        ("resnet18", "consensus.weight"),
        ("resnet50", "base_model.layer2.0.non_local_block.g.conv.weight"),
        ("mobilenet_v2", "base_model.features.3.conv.8.weight"),
        ("mobilenet_v2", "base_model.features.19.0.weight"),
        ("mobilenet_v2", "base_model.features.1.conv.7.weight"),
    ],
)
def test_an_unknown_name_is_refused(variant: str, key: str) -> None:
    with pytest.raises(WeightsError, match=re.escape(f"'{key}'")):
        from_official({**names_of(variant), key: torch.zeros(1)})


def test_two_names_of_one_tensor_are_refused() -> None:
    with pytest.raises(WeightsError, match="'fc.weight' is 'classifier.weight' once more"):
        from_official({**names_of("resnet18"), "fc.weight": torch.zeros(1)})


def test_what_is_not_a_tensor_is_refused() -> None:
    with pytest.raises(WeightsError, match="'new_fc.bias' is not a tensor but float"):
        from_official({**names_of("resnet18"), "new_fc.bias": 1.0})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_missing_tensor_is_named(variant: str) -> None:
    expected = ours(variant).state_dict()
    for name in list(expected)[:: max(1, len(expected) // 9)]:
        translated = {other: tensor for other, tensor in expected.items() if other != name}
        if name.endswith("num_batches_tracked"):
            check_keys(translated, expected)
        else:
            with pytest.raises(WeightsError, match=re.escape(f"1 missing: {name}") + "$"):
                check_keys(translated, expected)


def test_old_files_have_no_counts_of_batches() -> None:
    old = {name: tensor for name, tensor in names_of("resnet50").items() if not name.endswith("num_batches_tracked")}
    translated = from_official(old)
    check_keys(translated, ours("resnet50").state_dict())
    assert same(to_official(translated, **keywords("resnet50")), old)


def test_unknown_names_and_other_shapes_are_named() -> None:
    expected = ours("resnet18").state_dict()
    with pytest.raises(WeightsError, match=r"1 too many: backbone\.extra"):
        check_keys({**expected, "backbone.extra": torch.zeros(1)}, expected)
    wrong = torch.zeros(64, 3, 3, 3)
    with pytest.raises(WeightsError, match=r"backbone\.conv1\.weight is \(64, 3, 3, 3\), not \(64, 3, 7, 7\)"):
        check_keys({**expected, "backbone.conv1.weight": wrong}, expected)


def test_other_variants_do_not_take_the_names() -> None:
    state_dict = ours("non_local").state_dict()
    with pytest.raises(WeightsError, match=r"non_local\.theta\.weight.*non_local=False"):
        to_official(state_dict, "resnet50")
    with pytest.raises(WeightsError, match=r"backbone\.conv1\.weight.*mobilenet_v2"):
        to_official(state_dict, "mobilenet_v2")
    with pytest.raises(ValueError, match="no non-local blocks in a network with shift='block'"):
        to_official(state_dict, "resnet50", shift="block", non_local=True)
