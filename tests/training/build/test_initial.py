"""Initial weights from real files of every supported kind, and files that must be refused."""

import hashlib
import os
import pickle
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor

from distributed.checkpoint.store import Checkpoint, Snapshot, write_snapshot
from runtime.checkout import CHECKOUT
from tests.helpers.jobs import make_clips, start_training
from tests.helpers.official_reference import Official, OnlineMobileNet, randomise
from tests.helpers.worlds import World, available
from training.build.init_weights import InitialWeights, find_initial_weights, load_initial_weights, saved_classes
from training.build.model import network_of
from training.build.recipe import recipe_of
from training.config.checks import check
from training.config.schema import Config, ModelConfig
from training.errors import ConfigError
from tsm.networks import BACKBONES, TemporalNetwork
from tsm.official import from_official

CLASSES = 5


pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(init: object, **changes: Any) -> ModelConfig:
    return replace(ModelConfig(backbone="resnet18", num_frames=4, init=str(init)), **changes)


def new_network(model: ModelConfig, classes: int = CLASSES) -> TemporalNetwork:
    torch.manual_seed(0)
    return network_of(model, classes)


def start(init: object, classes: int = CLASSES, **changes: Any) -> tuple[TemporalNetwork, str]:
    """Build a new network with its initial weights; return it and the log line."""
    model = model_of(init, **changes)
    network = new_network(model, classes)
    return network, load_initial_weights(network, model, find_initial_weights(model, CHECKOUT, None))


def official(backbone: str = "resnet18", **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return randomise(Official(backbone, CLASSES, 4, **options)).state_dict()


def image_classifier(backbone: str = "resnet18", classes: int = 1000) -> dict[str, Tensor]:
    """State dict as in torchvision's files."""
    return randomise(torchvision.models.get_model(backbone, num_classes=classes)).state_dict()


def saved(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_holds(network: TemporalNetwork, expected: dict[str, Tensor], but: str = "(nothing)") -> None:
    """Assert that the network has the expected values, except for names that match `but`, which keep new values."""
    state_dict = network.state_dict()
    assert {name for name in state_dict if not re.search(but, name)} == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state_dict[name], tensor.to(state_dict[name].dtype)), name


# --- Kinds of files ---------------------------------------------------------------------------------------------------


def test_random_reads_nothing() -> None:
    network, said = start("random")
    assert said == "random"
    assert_holds(network, new_network(model_of("random")).state_dict())


@pytest.mark.parametrize("wrap", ["plain", "released", "before torch 1.6"])
def test_the_authors_file(tmp_path: Path, wrap: str) -> None:
    tensors = official()
    released = {
        "epoch": 50,
        "arch": "resnet18",
        "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.02, "params": [0]}]},
        "best_prec1": torch.tensor(71.2),
    }
    if wrap == "before torch 1.6":
        old = {name: tensor for name, tensor in released["state_dict"].items() if "num_batches" not in name}  # type: ignore[union-attr, attr-defined]
        file = saved(tmp_path / "tsm.pth.tar", {**released, "state_dict": old}, _use_new_zipfile_serialization=False)
    else:
        file = saved(tmp_path / "tsm.pth", tensors if wrap == "plain" else released)
    network, said = start(file)
    expected = from_official(tensors)
    if wrap == "before torch 1.6":
        assert_holds(network, {n: t for n, t in expected.items() if "num_batches" not in n}, but="num_batches_tracked")
    else:
        assert_holds(network, expected)
    assert said.startswith(f"{file} (sha256:{sha256(file)[:8]}...): ")
    assert "left new" not in said and "trained with" not in said


def test_mmactions_file(tmp_path: Path) -> None:
    renamed = {}
    for name, tensor in official().items():
        name = name.replace("base_model.", "backbone.").replace("new_fc", "cls_head.fc_cls")
        name = re.sub(r"\bbn(\d)\.", r"conv\1.bn.", re.sub(r"\bconv(\d)\.", r"conv\1.conv.", name))
        renamed[name.replace("downsample.0", "downsample.conv").replace("downsample.1", "downsample.bn")] = tensor
    file = saved(tmp_path / "tsm_r18.pth", {"meta": {"epoch": 50, "config": "model = dict()"}, "state_dict": renamed})
    assert_holds(start(file)[0], from_official(official()))


def test_the_online_demos_file(tmp_path: Path) -> None:
    demo = randomise(OnlineMobileNet(CLASSES)).state_dict()
    file = saved(tmp_path / "mobilenetv2_jester_online.pth.tar", demo)
    assert_holds(start(file, backbone="mobilenet_v2", direction="past")[0], from_official(demo))


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_torchvisions_file(tmp_path: Path, backbone: str) -> None:
    tensors = image_classifier(backbone)
    network, said = start(saved(tmp_path / "image.pth", tensors), backbone=backbone)
    body = {name: tensor for name, tensor in from_official(tensors).items() if name.startswith("backbone.")}
    assert_holds(network, body, but="^classifier")
    assert torch.equal(network.classifier.weight, new_network(model_of("random", backbone=backbone)).classifier.weight)
    assert f"{len(body)} tensors taken; classifier left new (5 classes, the file has 1000)" in said


def test_imagenets_classes_are_not_a_data_sets_though_as_many(tmp_path: Path) -> None:
    network, said = start(saved(tmp_path / "image.pth", image_classifier()), classes=1000)
    assert "classifier left new (the file's is for ImageNet's classes)" in said
    assert network.classifier.weight.std() < 0.002


@pytest.mark.parametrize("names", ["ours", "official"])
def test_safetensors(tmp_path: Path, names: str) -> None:
    tensors = official()
    file = tmp_path / "network.safetensors"
    save_file(from_official(tensors) if names == "ours" else tensors, file)
    assert_holds(start(file)[0], from_official(tensors))


def own_checkpoint(folder: Path, tensors: dict[str, Tensor], classes: list[str] | None = None, **model: Any) -> Path:
    state: dict[str, Any] = {"step": 7, "recipe": {"model": {"shift": "residual", "num_frames": 4} | model}}
    if classes is not None:
        state["classes"] = classes
    saved = Checkpoint(tensors, {"x.momentum_buffer": torch.ones(2)}, state)
    return write_snapshot(folder, Snapshot().take(saved), keep=1)


def test_a_checkpoint_of_ours(tmp_path: Path) -> None:
    tensors = from_official(official())
    folder = own_checkpoint(tmp_path, tensors)
    network, said = start(folder)
    assert_holds(network, tensors)
    assert "trained with" not in said
    model = model_of(folder)
    digest = sha256(folder / "network.safetensors")
    assert find_initial_weights(model, CHECKOUT, None).identity == f"sha256:{digest}"
    assert_holds(start(folder / "network.safetensors")[0], tensors)


NAMES = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("ours", "rows", "note"),
    [
        (NAMES, [0, 1, 2, 3, 4], None),
        (
            ["c", "a", "b", "e", "d"],
            [2, 0, 1, 4, 3],
            "classes mapped by name: the rows of the classifier were reordered",
        ),
        (["a", "b", "x", "d", "e"], None, "classifier left new (class 2 is 'x' in the data, 'c' in the file)"),
    ],
    ids=["same", "another order", "other names"],
)
def test_the_classifier_of_a_checkpoint_follows_the_names(
    tmp_path: Path, ours: list[str], rows: list[int] | None, note: str | None
) -> None:
    tensors = from_official(official())
    folder = own_checkpoint(tmp_path, tensors, classes=NAMES)
    model = model_of(folder)
    network = new_network(model)
    said = load_initial_weights(network, model, find_initial_weights(model, CHECKOUT, None), ours)
    if rows is None:
        body = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
        assert_holds(network, body, but="^classifier")
        assert torch.equal(network.classifier.weight, new_network(model).classifier.weight)
    else:
        taken = {name: t[rows] if name.startswith("classifier") else t for name, t in tensors.items()}
        assert_holds(network, taken)
    assert (note in said) if note else ("by name" not in said and "by number" not in said and "left new" not in said)
    assert saved_classes(folder) == saved_classes(folder / "network.safetensors") == NAMES
    assert saved_classes(folder / "optimizer.safetensors") is None


def test_weights_that_name_no_classes_are_said(tmp_path: Path) -> None:
    tensors = from_official(official())
    model = model_of(own_checkpoint(tmp_path, tensors))
    network = new_network(model)
    said = load_initial_weights(network, model, find_initial_weights(model, CHECKOUT, None), NAMES)
    assert_holds(network, tensors)
    assert "the weights have no class names: classes matched by number" in said


def test_a_checkpoint_keeps_every_digit_in_float64(tmp_path: Path) -> None:
    tensors = from_official(randomise(Official("resnet18", CLASSES, 4).double()).state_dict())
    model = model_of(own_checkpoint(tmp_path, tensors))
    network = new_network(model).double()
    load_initial_weights(network, model, find_initial_weights(model, CHECKOUT, None))
    assert_holds(network, tensors)


def test_a_relative_path_starts_in_the_checkout(tmp_path: Path) -> None:
    file = saved(tmp_path / "tsm.pth", official())
    found = find_initial_weights(model_of("tsm.pth"), tmp_path, None)
    assert found == InitialWeights(f"sha256:{sha256(file)}", file)


# --- Modules left new, and the log line -------------------------------------------------------------------------------


def test_another_number_of_classes_replaces_the_classifier(tmp_path: Path) -> None:
    tensors = from_official(official())
    network, said = start(saved(tmp_path / "tsm.pth", official()), classes=7)
    body = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    assert_holds(network, body, but="^classifier")
    assert network.classifier.weight.shape == (7, 512)
    assert "classifier left new (7 classes, the file has 5)" in said


@pytest.mark.parametrize("partial_bn", [False, True])
def test_non_local_blocks_are_left_new(tmp_path: Path, partial_bn: bool) -> None:
    tensors = image_classifier("resnet50")
    file = saved(tmp_path / "image.pth", tensors)
    network, said = start(file, backbone="resnet50", non_local=True, partial_bn=partial_bn)
    body = {name: tensor for name, tensor in from_official(tensors).items() if name.startswith("backbone.")}
    assert_holds(network, body, but=r"^classifier|\.non_local\.")
    assert (network.get_submodule("backbone.layer2.0.non_local.W.1").weight == 0).all()  # type: ignore[operator, union-attr]
    assert "5 non_local blocks left new" in said
    assert ("stay the identity" in said) == partial_bn


def test_non_local_blocks_of_the_file_are_taken(tmp_path: Path) -> None:
    tensors = official("resnet50", non_local=True)
    network, said = start(saved(tmp_path / "nl.pth", tensors), backbone="resnet50", non_local=True)
    assert_holds(network, from_official(tensors))
    assert "left new" not in said


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({}, None),
        # The names in the file do not show the variant, as in torchvision's files.
        ({"shift": "none"}, None),
        ({"shift": "block"}, "they were trained with model.shift=block, it is residual here"),
        ({"temporal_pool": True}, "they were trained with model.temporal_pool=True, it is False here"),
    ],
)
def test_another_variant_of_the_same_tensors_is_said(tmp_path: Path, options: dict[str, Any], note: str | None) -> None:
    tensors = official(**options)
    network, said = start(saved(tmp_path / "tsm.pth", tensors))
    assert_holds(network, from_official(tensors))
    assert said.endswith(note) if note else "trained with" not in said


def test_a_checkpoint_says_what_its_network_was(tmp_path: Path) -> None:
    folder = own_checkpoint(tmp_path, from_official(official()), shift="none", direction="both", fold_div=4)
    assert start(folder)[1].endswith(
        "they were trained with model.shift=none, it is residual here; they were trained with model.fold_div=4, it is 8 here"
    )


def test_partial_bn_at_random_weights_is_said() -> None:
    assert "model.partial_bn keeps all batch norms but the first at them" in start("random", partial_bn=True)[1]


# --- Modality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_image_weights_start_a_flow_network(tmp_path: Path, backbone: str) -> None:
    """The first convolution has the mean over red, green and blue in each of its ten channels."""
    tensors = image_classifier(backbone)
    network, said = start(saved(tmp_path / "image.pth", tensors), backbone=backbone, modality="flow")
    body = {name: tensor for name, tensor in from_official(tensors).items() if name.startswith("backbone.")}
    first = "backbone.conv1" if backbone == "resnet18" else "backbone.features.0.0"
    red, green, blue = body.pop(f"{first}.weight").double().unbind(1)
    assert_holds(network, body, but=rf"^classifier|^{first}\.weight")
    weight = network.get_parameter(f"{first}.weight")
    assert weight.shape[1] == 10
    for channel in range(10):
        torch.testing.assert_close(weight[:, channel].double(), (red + green + blue) / 3, rtol=1e-6, atol=1e-8)
    assert f"{first} takes the mean of the file's over RGB" in said


@pytest.mark.parametrize("names", ["official", "ours"])
def test_weights_of_a_flow_network_start_one(tmp_path: Path, names: str) -> None:
    tensors = official(modality="flow")
    of_flow = from_official(tensors)
    released = {"epoch": 50, "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}
    file = saved(tmp_path / "TSM_kinetics_Flow.pth", released if names == "official" else of_flow)
    network, said = start(file, modality="flow")
    assert_holds(network, of_flow)
    assert "mean" not in said


@pytest.mark.parametrize(
    ("of_file", "message"),
    [
        (
            "rgb",
            r"is of a network for rgb \(3 input channels\), and model\.modality=flow has 10\. "
            r"Fix: model\.init=imagenet, the file of a network for flow, or model\.modality=rgb",
        ),
        (
            "flow",
            r"is of a network for flow \(10 input channels\), and model\.modality=rgb has 3\. "
            r"Fix: the file of a network for rgb, or model\.modality=flow",
        ),
    ],
)
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_weights_for_the_other_modality_are_refused(tmp_path: Path, backbone: str, of_file: str, message: str) -> None:
    file = saved(tmp_path / "tsm.pth", official(backbone, modality=of_file))
    with pytest.raises(ConfigError, match=message):
        start(file, backbone=backbone, modality={"rgb": "flow", "flow": "rgb"}[of_file])
    start(file, backbone=backbone, modality=of_file)


# --- ImageNet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty weights folder of torch hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
    folder = tmp_path / "torch home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("backbone", BACKBONES)
def test_missing_imagenet_weights_name_path_and_command(cache: Path, backbone: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_initial_weights(model_of("imagenet", backbone=backbone), CHECKOUT, None)
    message = str(caught.value)
    url = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.url
    path = cache / url.split("/")[-1]
    assert f"in {path}" in message
    assert f"curl -fL -o {shlex.quote(str(path))} {url}" in message
    assert "model.init=FILE" in message and "model.init=random" in message


def test_imagenet_weights_are_held_against_the_hash_in_their_name(cache: Path) -> None:
    file = saved(cache / "resnet18-f37072fd.pth", image_classifier())
    with pytest.raises(ConfigError, match=rf"not what its name says: its sha256 is {sha256(file)}.*rm .*curl -fL"):
        find_initial_weights(model_of("imagenet"), CHECKOUT, None)


def test_imagenet_weights_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of random weights carries the name that its own hash gives it."""
    file = saved(cache / "new.pth", image_classifier())
    digest = sha256(file)
    named = file.rename(cache / f"resnet18-{digest[:8]}.pth")

    class Weights:
        class IMAGENET1K_V1:  # noqa: N801
            url = f"https://download.pytorch.org/models/{named.name}"

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: Weights)
    network, said = start("imagenet")
    body = {n: t for n, t in from_official(torch.load(named)).items() if n.startswith("backbone.")}
    assert_holds(network, body, but="^classifier")
    assert said.startswith(f"imagenet (sha256:{digest[:8]}...): {len(body)} tensors taken; classifier left new")
    assert find_initial_weights(model_of("imagenet"), CHECKOUT, None).identity == f"sha256:{digest}"


# --- Refused files ----------------------------------------------------------------------------------------------------


def refused(init: object, message: str, **changes: Any) -> str:
    with pytest.raises(ConfigError, match=message) as caught:
        start(init, **changes)
    assert re.search(r"model\.init", str(caught.value))
    assert "Fix" in str(caught.value)
    return str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", r"none\.pth does not exist.*Fix: model\.init=FILE")


def test_a_folder_that_is_no_checkpoint_names_the_one_inside(tmp_path: Path) -> None:
    refused(tmp_path, r"is not a checkpoint.*Fix: model\.init=outputs/RUN/checkpoints/step-XXXXXXXX")
    (tmp_path / "checkpoints").mkdir()
    step = own_checkpoint(tmp_path / "checkpoints", from_official(official()))
    refused(tmp_path, rf"is not a checkpoint.*Fix: model\.init={step}")


def test_the_wrong_sha256(tmp_path: Path) -> None:
    file = saved(tmp_path / "tsm.pth", official())
    assert_holds(start(file, init_sha256=sha256(file))[0], from_official(official()))
    other = hashlib.sha256(b"another").hexdigest()
    refused(file, f"has the sha256 {sha256(file)}, but model.init_sha256={other}", init_sha256=other)


def test_a_sha256_of_nothing_is_refused() -> None:
    config = Config(model=ModelConfig(init_sha256="0" * 64))
    config.data.num_classes = config.batch.global_batch = config.optimizer.base_batch = 1
    config.optimizer.lr = config.schedule.epochs = 1.0
    with pytest.raises(ConfigError, match="model.init=random reads no file"):
        check(config)


def test_an_unknown_tensor(tmp_path: Path) -> None:
    file = saved(tmp_path / "tsm.pth", {**official(), "base_model.layer1.0.se.weight": torch.ones(1)})
    refused(file, r"'base_model\.layer1\.0\.se\.weight'")


def test_a_missing_tensor(tmp_path: Path) -> None:
    tensors = official()
    del tensors["base_model.layer3.1.bn2.running_var"]
    refused(saved(tmp_path / "tsm.pth", tensors), r"1 missing: backbone\.layer3\.1\.bn2\.running_var")


def test_a_file_without_a_classifier(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in official().items() if not name.startswith("new_fc")}
    refused(saved(tmp_path / "tsm.pth", tensors), r"2 missing: classifier\.weight, classifier\.bias")


def test_another_shape(tmp_path: Path) -> None:
    tensors = official() | {"base_model.layer1.0.conv1.net.weight": torch.zeros(64, 10, 1, 1)}
    refused(saved(tmp_path / "other.pth", tensors), r"backbone\.layer1\.0\.conv1\.weight is \(64, 10, 1, 1\), not")


@pytest.mark.parametrize(
    ("theirs", "ours", "named"),
    [
        ("resnet18", "resnet50", r"missing: backbone\.layer1\.0\.conv3"),
        ("resnet50", "resnet18", r"too many: backbone\.layer1\.0\.conv3"),
        ("resnet18", "mobilenet_v2", r"missing: backbone\.features"),
        ("mobilenet_v2", "resnet18", r"too many: backbone\.features"),
        ("resnet50", "resnet101", r"missing: backbone\.layer3\.6"),
    ],
)
def test_another_backbone(tmp_path: Path, theirs: str, ours: str, named: str) -> None:
    file = saved(tmp_path / "tsm.pth", official(theirs))
    refused(file, rf"does not fit model\.backbone={ours}: .*{named}", backbone=ours)


def test_non_local_blocks_that_the_network_has_not(tmp_path: Path) -> None:
    file = saved(tmp_path / "nl.pth", official("resnet50", non_local=True))
    refused(file, r"too many: .*non_local.*Fix: set model\.backbone and model\.non_local", backbone="resnet50")


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file(tmp_path: Path, kind: str, part: float) -> None:
    file = tmp_path / ("tsm.safetensors" if kind == "safetensors" else "tsm.pth")
    if kind == "safetensors":
        save_file(official(), file)
    else:
        saved(file, official(), _use_new_zipfile_serialization=kind == "zip")
    os.truncate(file, int(file.stat().st_size * part))
    refused(file, "cannot be read|is damaged")


def test_a_checkpoint_with_a_broken_file(tmp_path: Path) -> None:
    folder = own_checkpoint(tmp_path, from_official(official()))
    content = bytearray((folder / "network.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "network.safetensors").write_bytes(content)
    refused(folder, "checksum differs")


class Trap:
    """Object whose unpickling runs code."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("kind", ["torch", "before torch 1.6", "pickle"])
def test_code_in_a_file_is_not_executed(tmp_path: Path, kind: str) -> None:
    witness = tmp_path / "executed"
    value = {"state_dict": official(), "meta": Trap(witness)}
    file = tmp_path / "trap.pth"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(value))
    else:
        saved(file, value, _use_new_zipfile_serialization=kind == "torch")
    refused(file, "holds more than tensors.*nothing in it was executed")
    assert not witness.exists()


@pytest.mark.slow
def test_the_command_for_a_trusted_file_works(tmp_path: Path) -> None:
    """Run the command that the error message gives."""
    file = saved(tmp_path / "trusted.pth", {"state_dict": official(), "meta": Trap(tmp_path / "executed")})
    message = refused(file, "holds more than tensors")
    command = message.split("Fix, if you trust where it is from: ")[1].split(", and model.init=")[0]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_holds(start(tmp_path / "TENSORS.pth")[0], from_official(official()))


def test_a_file_of_something_else(tmp_path: Path) -> None:
    refused(saved(tmp_path / "list.pth", [torch.ones(1)]), "holds a list, not tensors by name")
    refused(saved(tmp_path / "epoch.pth", {"epoch": 3}), "'epoch' is the name of no tensor")
    (tmp_path / "text.pth").write_text("not found\n")
    refused(tmp_path / "text.pth", "cannot be read|is damaged")


# --- Recipe and resuming ----------------------------------------------------------------------------------------------


def recipe_with(model: ModelConfig, identity: str) -> Any:
    config = Config(model=model)
    config.batch.global_batch = config.optimizer.base_batch = 4
    config.optimizer.lr, config.schedule.epochs = 0.1, 1.0
    return recipe_of(config, 40, "digest", identity)


def test_the_recipe_holds_the_content_and_not_the_path(tmp_path: Path) -> None:
    here, there = saved(tmp_path / "here.pth", official()), tmp_path / "there.pth"
    there.write_bytes(here.read_bytes())
    other = saved(tmp_path / "other.pth", image_classifier())
    recipes = []
    for file, check_it in ((here, False), (there, True), (other, False)):
        model = model_of(file, init_sha256=sha256(file) if check_it else None)
        recipes.append(recipe_with(model, find_initial_weights(model, CHECKOUT, None).identity))
    assert recipes[0].fingerprint == recipes[1].fingerprint != recipes[2].fingerprint
    assert recipes[0].model["init"] == f"sha256:{sha256(here)}"
    assert "init_sha256" not in recipes[0].model


def test_a_resumed_run_needs_no_file(tmp_path: Path, cache: Path) -> None:
    before = "sha256:" + "1" * 64
    for init in (tmp_path / "gone.pth", tmp_path / "gone folder", "imagenet"):
        assert find_initial_weights(model_of(init), CHECKOUT, before) == InitialWeights(before)


def test_a_resumed_run_takes_no_other_file_for_its_own(tmp_path: Path, cache: Path) -> None:
    """An existing file is compared by content; a missing one by model.init_sha256."""
    before = "sha256:" + "1" * 64
    file = saved(tmp_path / "other.pth", official())
    assert find_initial_weights(model_of(file), CHECKOUT, before).identity == f"sha256:{sha256(file)}"
    named = model_of(tmp_path / "gone.pth", init_sha256="2" * 64)
    assert find_initial_weights(named, CHECKOUT, before).identity == "sha256:" + "2" * 64
    assert find_initial_weights(model_of("random"), CHECKOUT, before).identity == "random"
    with pytest.raises(ConfigError, match=r"gone\.pth does not exist"):
        find_initial_weights(model_of(tmp_path / "gone.pth"), CHECKOUT, "random")


# --- Whole jobs -------------------------------------------------------------------------------------------------------

SMALL = (
    "experiment=smoke logger=disabled logger.every_steps=1 pipeline.size=32 model.num_frames=4 pipeline.decoder=pyav "
    "pipeline.workers=0 batch.global_batch=8 schedule.warmup_epochs=0 checkpoint.every_epochs=100 run_id=first"
).split()
WORLDS = [World("torchrun", 2), World("horovodrun", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_missing_weights_end_all_ranks_before_data_is_touched(tmp_path: Path, world: World) -> None:
    overrides = [*SMALL, f"outputs={tmp_path}", "data.root=no/such/folder", f"model.init={tmp_path}/none.pth"]
    ended = start_training(available(world), tmp_path / "log.txt", *overrides).wait(120)
    assert ended.exit_code != 0
    assert ended.left_running == []
    for rank in (0, 1):
        assert re.search(rf"error \(rank {rank} of 2.*none\.pth does not exist", ended.output), ended.output
    assert "no/such/folder" not in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_fine_tuning_with_frozen_batch_norms(tmp_path: Path, world: World) -> None:
    """A published file with other classes, two processes, and a resume from a checkpoint after the file is deleted."""
    world = available(world)
    make_clips(tmp_path / "clips")
    tensors = official()
    file = saved(tmp_path / "tsm.pth", {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}})
    overrides = [
        *SMALL,
        f"outputs={tmp_path}",
        f"data.root={tmp_path}/clips",
        f"model.init={file}",
        "model.partial_bn=true",
    ]
    first = start_training(world, tmp_path / "log.txt", *overrides, "max_steps=2").wait(120)
    assert first.exit_code == 0, first.output
    assert "classifier left new (10 classes, the file has 5)" in first.output
    file.unlink()
    second = start_training(world, tmp_path / "log.txt", *overrides, "max_steps=3").wait(120)
    assert second.exit_code == 0, second.output
    assert "resuming first from step 2" in second.output
    after = load_file(tmp_path / "first" / "checkpoints" / "step-00000003" / "network.safetensors")
    before = from_official(tensors)
    frozen = [name for name in before if re.search(r"bn\d\.|downsample\.1\.", name) and ".layer" in name]
    assert len(frozen) == 19 * 5
    for name in frozen:
        assert torch.equal(after[name], before[name]), name
    moved = [name for name in before if name not in frozen and name.startswith("backbone.")]
    assert {"backbone.bn1.weight", "backbone.bn1.running_mean"} <= set(moved)
    for name in moved:
        assert torch.equal(after[name], before[name]) == name.endswith("num_batches_tracked"), name
