"""NoGAN: what its feature loss compares, what each stage does, and what it says of mistakes."""

import re

import numpy as np
import pytest
import torch
import torchvision
from conftest import epochs
from PIL import Image

import data
import evaluate
import models
import train_nogan


@pytest.fixture
def imagenet(monkeypatch):
    """Random weights in the place of torchvision's download of 500 MB."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True)
    state = {f"features.{name}": value for name, value in layers.state_dict().items()}
    state["classifier.0.weight"] = torch.zeros(1)  # what is not wanted
    monkeypatch.setattr(torchvision.models.VGG16_BN_Weights, "get_state_dict",
                        lambda self, **kwargs: state)
    return state


def feature_network(name):
    torch.manual_seed(0)
    network = models.VGG16() if name == "vgg16_bn" else models.Classifier(10, width=8)
    if name == "vgg16_bn":
        network.load_imagenet()
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("color", ["rgb", "lab"])
@pytest.mark.parametrize("features", ["classifier", "vgg16_bn"])
def test_the_feature_loss_is_zero_for_the_same_and_grows_with_the_error_of_chroma(
    features, color, imagenet
):
    network = feature_network(features)
    images, _, _ = data.make_shapes(8, 32, seed=3)
    gray, target = data.to_gray_and_target(images, color)
    assert train_nogan.feature_loss(network, gray, target, target, color) == 0
    colorless = gray.expand_as(target) if color == "rgb" else torch.zeros_like(target)
    losses = [train_nogan.feature_loss(network, gray, target + share * (colorless - target),
                                       target, color).item() for share in (0.25, 0.5, 0.75, 1)]
    assert 0 < losses[0] and losses == sorted(losses)
    with_pixels = torch.nn.functional.l1_loss(colorless, target).item()
    assert losses[-1] > 1.01 * with_pixels  # the maps count


@pytest.mark.parametrize("features", ["classifier", "vgg16_bn"])
def test_the_gradient_of_the_feature_loss_reaches_the_generator_alone(features, imagenet):
    network, generator = feature_network(features), models.UNet(3, width=4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, _, _ = data.make_shapes(4, 32, seed=3)
    gray, target = data.to_gray_and_target(images, "rgb")
    train_nogan.feature_loss(network, gray, generator(gray), target, "rgb").backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters()
               if p.ndim == 4)
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_vgg16_is_torchvisions_before_its_last_three_poolings(imagenet):
    network = feature_network("vgg16_bn")
    with torch.device("meta"):
        whole = torchvision.models.vgg16_bn().features
    assert all(isinstance(whole[i + 1], torch.nn.MaxPool2d) for i in network.map_layers)
    whole = whole.to_empty(device="cpu").eval()
    whole.load_state_dict({name.removeprefix("features."): value for name, value
                           in imagenet.items() if name.startswith("features.")})
    rgb = torch.rand(2, 3, 32, 32)
    x = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(rgb)
    for i, map_ in zip(network.map_layers, network.maps(rgb), strict=True):
        assert torch.allclose(map_, whole[: i + 1](x), atol=1e-5)


def test_the_stages_are_twenty_epochs_with_the_classifier_on_top():
    args = train_nogan.build_parser().parse_args([])
    assert args.generator_epochs + args.critic_epochs + args.gan_epochs == 20
    assert args.gan_epochs < args.generator_epochs / 3


def test_each_stage_is_announced_and_has_its_own_numbers(tiny, capsys):
    run = tiny(train_nogan.main, *epochs(train_nogan.main, 2))
    _, *lines = capsys.readouterr().out.splitlines()
    numbers = {
        "classifier": ["cross_entropy", "validation accuracy"],
        "generator": ["feature", "validation psnr", "colorfulness_ratio"],
        "critic": ["d_real", "d_fake", "validation accuracy"],
        "gan": ["d_real", "d_fake", "adversarial", "feature", "validation psnr",
                "colorfulness_ratio"],
    }
    for i, (stage, names) in enumerate(numbers.items()):
        assert lines[3 * i].startswith(f"{stage}, epochs {2 * i + 1} to {2 * i + 2}: ")
        for epoch in (2 * i + 1, 2 * i + 2):
            line = lines[3 * i + epoch - 2 * i]
            pattern = "".join(rf"  {name} [\d.e-]+" for name in names)
            assert re.search(rf"^epoch {epoch}/8{pattern}  [\d,]+ pictures/s  \d+m\d\ds left$", line)
    rows = (run / "log.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [
        [str(i + 1), stage] for i, stage in enumerate(sorted([*numbers] * 2, key=list(numbers).index))]
    samples = sorted(path.name for path in (run / "samples").iterdir())
    assert samples == [f"epoch_00{i}.png" for i in (3, 4, 7, 8)]


def saved_states(monkeypatch):
    """What each later run saves: a list of (stage, epoch, state_dicts by name)."""
    saves, save = [], evaluate.Run.save

    def spy(self, epoch, **state):
        copies = {name: {key: value.clone() if torch.is_tensor(value) else value
                         for key, value in state[name].state_dict().items()}
                  for name in ("generator", "critic", "features")}
        saves.append((self.stage, epoch, copies))
        save(self, epoch, **state)

    monkeypatch.setattr(evaluate.Run, "save", spy)
    return saves


def test_each_stage_trains_its_networks_and_leaves_the_others_bit_identical(tiny, monkeypatch):
    saves = saved_states(monkeypatch)
    tiny(train_nogan.main)
    assert [(stage, epoch) for stage, epoch, _ in saves] == [
        (None, 0), ("classifier", 1), ("generator", 2), ("critic", 3), ("gan", 4)]
    changed = []
    for (_, _, before), (_, _, after) in zip(saves, saves[1:]):
        changed.append({name for name in after if not all(
            torch.equal(before[name][key], after[name][key]) for key in after[name])})
    assert changed == [{"features"}, {"generator"}, {"critic"}, {"generator", "critic"}]


def test_the_critic_learns_from_pictures_of_the_generator_in_eval_mode(tiny, monkeypatch):
    modes, forward = [], models.UNet.forward

    def spy(self, gray):
        modes.append(("painting", self.training) if stage() == "critic" else stage())
        return forward(self, gray)

    runs, begin = [], evaluate.Run.begin_stage
    monkeypatch.setattr(evaluate.Run, "begin_stage",
                        lambda self, *args: runs.append(self) or begin(self, *args))
    stage = lambda: runs[-1].stage  # noqa: E731
    monkeypatch.setattr(models.UNet, "forward", spy)
    tiny(train_nogan.main, "--critic-epochs", 3)
    assert modes.count(("painting", False)) == 2  # training and validation pictures, once each
    assert ("painting", True) not in modes


def test_the_critics_accuracy_is_on_batches_as_in_training_and_leaves_it_unchanged():
    torch.manual_seed(0)
    critic = models.Discriminator(3, width=4)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    images = torch.randint(256, (23, 3, 32, 32), dtype=torch.uint8)
    real, fake = (data.Batches(x, "rgb", 8, 0) for x in (images, 255 - images))
    accuracy = train_nogan.critic_accuracy(critic, real.epoch(1), fake.epoch(1))
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    right = []
    for (gray, target), (_, painted) in zip(real.epoch(1), fake.epoch(1)):
        right += (critic(gray, target) > 0).flatten().tolist()  # in training mode
        right += (critic(gray, painted) <= 0).flatten().tolist()
    assert len(right) == 46
    assert accuracy == pytest.approx(np.mean(right))


def test_a_critic_that_tells_little_is_warned_of(tiny, capsys, monkeypatch):
    for accuracy, warned in ((0.79, True), (0.81, False)):
        monkeypatch.setattr(train_nogan, "critic_accuracy", lambda *args: accuracy)
        tiny(train_nogan.main, out=str(accuracy))
        assert ("raise --critic-epochs" in capsys.readouterr().err) == warned


def test_imagenet_features_are_kept_in_the_checkpoint(tiny, imagenet, monkeypatch):
    run = tiny(train_nogan.main, "--features", "vgg16_bn", "--limit", 20, "--batch-size", 8)
    checkpoint = models.load_checkpoint(run / "last.pt")
    assert checkpoint["stage"] == "gan" and checkpoint["epoch"] == 3
    kept = checkpoint["features"]["layers.40.weight"]
    assert torch.equal(kept, imagenet["features.40.weight"])
    monkeypatch.setattr(models.VGG16, "load_imagenet", None)  # not needed again
    train_nogan.main(["--resume", str(run / "last.pt"), "--gan-epochs", "2"])
    assert models.load_checkpoint(run / "last.pt")["epoch"] == 4


def test_imagenet_features_that_cannot_be_had_are_one_line(tiny, tmp_path, fails, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    file = tmp_path / "torch" / "hub" / "checkpoints" / "vgg16_bn-6c64b313.pth"
    flags = ["--features", "vgg16_bn"]
    line = fails(lambda argv: tiny(train_nogan.main, *argv), flags)
    assert str(file) in line and "https://download.pytorch.org/models/vgg16_bn" in line
    assert not (tmp_path / "run").exists() and not list(file.parent.iterdir())
    file.write_bytes(b"half a download")
    assert str(file) in fails(lambda argv: tiny(train_nogan.main, *argv), flags)


def test_pictures_without_labels_need_another_feature_network(tmp_path, fails, imagenet):
    for side in ("train", "test"):
        (tmp_path / side).mkdir()
        for i in range(8):
            pixels = np.random.RandomState(i).randint(256, size=(32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / side / f"{i}.png")
    command = ["--dataset", "folder", "--data-dir", tmp_path, "--width", 2, "--out",
               tmp_path / "run", *epochs(train_nogan.main, 1)]
    assert "--features vgg16_bn" in fails(train_nogan.main, command)
    assert not (tmp_path / "run").exists()
    train_nogan.main([*map(str, command), "--features", "vgg16_bn"])
    assert (tmp_path / "run" / "last.pt").exists()


def test_a_stage_that_is_over_cannot_be_prolonged(tiny, fails):
    run = tiny(train_nogan.main)
    before = (run / "last.pt").read_bytes()
    resume = ["--resume", run / "last.pt"]
    line = fails(train_nogan.main, [*resume, "--generator-epochs", 2])
    assert "--generator-epochs cannot be raised" in line
    assert (run / "last.pt").read_bytes() == before
    train_nogan.main([*map(str, resume), "--gan-epochs", "2"])
    assert models.load_checkpoint(run / "last.pt")["epoch"] == 5
