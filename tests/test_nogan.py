"""NoGAN: what its feature loss compares, what each stage does, and what it says of mistakes."""

import copy
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import epochs
from PIL import Image

import data
import models
import train_nogan


@pytest.fixture
def imagenet(monkeypatch):
    """Random weights in the place of torchvision's download of 500 MB, of 2017 as that is."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True)
    state = {f"features.{name}": value for name, value in layers.state_dict().items()
             if not name.endswith("num_batches_tracked")}
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
    weights = [20, 70, 10] if features == "vgg16_bn" else [1, 1, 1]
    maps = [network.maps(data.to_rgb(gray, x, color)) for x in (colorless, target)]
    by_hand = (colorless - target).abs().mean() + sum(
        weight * (a - b).abs().mean() for weight, a, b in zip(weights, *maps))
    assert losses[-1] == pytest.approx(by_hand.item(), rel=1e-4)


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


@pytest.mark.parametrize("features", ["classifier", "vgg16_bn"])
def test_training_never_gives_the_feature_network_a_gradient(features, tiny, imagenet, monkeypatch):
    networks, feature_loss = [], train_nogan.feature_loss

    def spy(network, *args):
        networks.append(network)
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        return feature_loss(network, *args)

    monkeypatch.setattr(train_nogan, "feature_loss", spy)
    tiny(train_nogan.main, "--features", features, "--limit", 7, "--batch-size", 2)
    assert len(networks) == 6  # three steps in each of two stages


def test_vgg16_is_torchvisions_before_its_last_three_poolings(imagenet):
    network = feature_network("vgg16_bn")
    with torch.device("meta"):
        whole = torchvision.models.vgg16_bn().features
    assert all(isinstance(whole[i + 1], torch.nn.MaxPool2d) for i in network.map_layers)
    whole = whole.to_empty(device="cpu").eval()
    whole.load_state_dict({name.removeprefix("features."): value for name, value
                           in imagenet.items() if name.startswith("features.")}, strict=False)
    assert all(int(value) == 0 for name, value in network.state_dict().items() if "batches" in name)
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
            assert re.search(rf"^epoch {epoch}/8{pattern}  [\d,]+ pictures/s  "
                             r"\d+m\d\ds left in this stage$", line)
    rows = (run / "log.csv").read_text().splitlines()
    stages = [stage for stage in numbers for _ in range(2)]
    assert [row.split(",")[:2] for row in rows[1:]] == [
        [str(i), stage] for i, stage in enumerate(stages, 1)]
    samples = sorted(path.name for path in (run / "samples").iterdir())
    assert samples == [f"epoch_00{i}.png" for i in (3, 4, 7, 8)]


def saved_states(monkeypatch):
    """What each later run saves: a list of (stage, epoch, state_dicts by name)."""
    saves, save = [], models.save_checkpoint

    def spy(path, script, args, epoch, history, **state):
        copies = {name: {key: value.clone() if torch.is_tensor(value) else value
                         for key, value in state[name].state_dict().items()}
                  for name in ("generator", "discriminator", "feature_network")}
        saves.append((state["stage"], epoch, copies))
        save(path, script, args, epoch, history, **state)

    monkeypatch.setattr(models, "save_checkpoint", spy)
    return saves


def test_each_stage_trains_its_networks_and_leaves_the_others_bit_identical(tiny, monkeypatch):
    saves = saved_states(monkeypatch)
    tiny(train_nogan.main)
    assert [(stage, epoch) for stage, epoch, _ in saves] == [
        ("classifier", 0), ("classifier", 1), ("generator", 2), ("critic", 3), ("gan", 4)]
    changed = []
    for (_, _, before), (_, _, after) in zip(saves, saves[1:]):
        changed.append({name for name in after if not all(
            torch.equal(before[name][key], after[name][key]) for key in after[name])})
    assert changed == [{"feature_network"}, {"generator"}, {"discriminator"},
                       {"generator", "discriminator"}]


def test_the_gan_starts_from_the_generator_whose_pictures_the_critic_knows(tiny, monkeypatch):
    saves, starts, forward = saved_states(monkeypatch), [], models.UNet.forward

    def spy(self, gray):
        if self.training and saves[-1][:2] == ("critic", 3):
            starts.append(copy.deepcopy(self.state_dict()))
        return forward(self, gray)

    monkeypatch.setattr(models.UNet, "forward", spy)
    tiny(train_nogan.main)
    averaged = saves[-2][2]["generator"]
    assert all(torch.equal(starts[0][name], value) for name, value in averaged.items())


def test_the_critic_alone_teaches_the_generator_too(tiny, monkeypatch):
    saves = saved_states(monkeypatch)
    tiny(train_nogan.main, "--feature-weight", 0)
    before, after = (states["generator"]["head.weight"] for _, _, states in saves[-2:])
    assert not torch.equal(before, after)


def test_the_critic_learns_from_pictures_of_the_generator_in_eval_mode(tiny, monkeypatch):
    paintings, forward = [], models.UNet.forward
    losses = train_nogan.discriminator_losses

    def paint(self, gray):
        paintings.append((self.training, forward(self, gray)))
        return paintings[-1][1]

    def judge(discriminator, gray, target, fake, autocast):
        in_training, painted = paintings[-1]
        judged.append(in_training)
        assert torch.equal(fake, data.keep_gray(gray, painted, "rgb"))  # not clipped, nor rounded
        both = losses(discriminator, gray, target, fake, autocast)
        if fake.requires_grad:  # the loss is D's alone: nothing of it reaches G
            assert torch.autograd.grad(
                sum(both), fake, retain_graph=True, allow_unused=True) == (None,)
        return both

    judged = []
    monkeypatch.setattr(models.UNet, "forward", paint)
    monkeypatch.setattr(train_nogan, "discriminator_losses", judge)
    tiny(train_nogan.main, "--critic-epochs", 3)
    assert judged == [False] * 12 + [True] * 4  # the critic alone, then both together


def test_each_loss_has_the_target_of_its_formula(tiny, monkeypatch):
    targets, cross_entropy = [], torch.nn.functional.binary_cross_entropy_with_logits

    def spy(logits, target):
        targets.append(target.unique().tolist())
        return cross_entropy(logits, target)

    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy_with_logits", spy)
    tiny(train_nogan.main)
    smoothed = pytest.approx([train_nogan.REAL_LABEL])
    assert 0.5 < train_nogan.REAL_LABEL < 1
    # The critic alone: real, generated. Both: the same, then generated as if real for G.
    assert targets == [smoothed, [0]] * 4 + [smoothed, [0], [1]] * 4


def test_real_and_painted_pictures_come_with_the_same_gray_and_never_in_one_batch(
    tiny, monkeypatch
):
    judged, forward = [], models.Discriminator.forward

    def spy(self, gray, color):
        if torch.is_grad_enabled():
            judged.append((gray, color.detach()))
        return forward(self, gray, color)

    monkeypatch.setattr(models.Discriminator, "forward", spy)
    # A generator whose red is the gray: what is painted must be of the gray beside it.
    monkeypatch.setattr(models.UNet, "forward", lambda self, gray: torch.cat(
        [gray, 0 * gray, 0 * gray], dim=1) + 0 * sum(p.sum() for p in self.parameters()))

    def red(color):  # over green: a difference that no luma changes
        return color[:, :1] - color[:, 1:2]

    tiny(train_nogan.main)
    alone, together = judged[:8], judged[8:]
    assert [len(gray) for gray, _ in judged] == [16] * 6 + [6] * 2 + [16] * 9 + [6] * 3
    for (gray, real), (same_gray, fake) in zip(alone[::2], alone[1::2]):
        assert torch.equal(gray, same_gray)
        assert (data.luma(real) - gray).abs().max() < 1e-5
        assert torch.allclose(red(fake), gray, atol=1e-6)
    assert all(torch.allclose(red(fake), gray, atol=1e-6) for gray, fake in together[1::3])


def test_a_critic_learns_to_tell_a_pale_generators_pictures(tmp_path):
    flags = "--dataset shapes --limit 400 --width 8 --batch-size 32".split()
    train_nogan.main([*flags, *epochs(train_nogan.main, 1), "--critic-epochs", "4",
                      "--out", str(tmp_path)])
    rows = models.load_checkpoint(tmp_path / "last.pt")["history"]
    assert [row["accuracy"] for row in rows if row["stage"] == "critic"][-1] > 0.9


@pytest.mark.parametrize("flag, low, high", [
    ("--feature-weight", 0, 300), ("--gan-lr", 1e-5, 1e-3), ("--lr", 1e-5, 1e-3),
])
def test_a_flag_of_the_method_changes_what_is_learned(flag, low, high, tiny):
    runs = [tiny(train_nogan.main, flag, value, out=f"{value}") for value in (low, high)]
    one, two = (models.load_checkpoint(run / "last.pt")["generator"] for run in runs)
    assert not all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_the_feature_weight_keeps_the_generator_near_the_truth(tiny):
    losses = []
    for weight in (0, 300):
        flags = ["--feature-weight", weight, "--gan-epochs", 8, "--gan-lr", 1e-3]
        run = tiny(train_nogan.main, *flags, out=f"{weight}")
        losses.append(models.load_checkpoint(run / "last.pt")["history"][-1]["feature"])
    assert losses[1] < 0.9 * losses[0]


def test_the_gan_stage_trains_at_its_own_rate_with_fresh_moments(tiny, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        step(self, *args, **kwargs)
        group = self.param_groups[0]
        rates.append((group["lr"], int(self.state[group["params"][0]]["step"])))

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    tiny(train_nogan.main, "--lr", 0.01, "--gan-lr", 0.001)
    alone, falling = [1, 1, 1, 0.5], [0.01, 0.01, 0.01, 0.005]  # constant, then down to 0
    assert [rate for rate, _ in rates[:8]] == pytest.approx(falling * 2)
    assert [rate for rate, _ in rates[8:12]] == pytest.approx([0.0002] * 4)
    assert [rate for rate, _ in rates[12::2]] == pytest.approx([0.0002 * x for x in alone])
    assert [rate for rate, _ in rates[13::2]] == pytest.approx([0.001 * x for x in alone])
    assert [count for _, count in rates[12::2]] == [5, 6, 7, 8]  # the critic goes on
    assert [count for _, count in rates[13::2]] == [1, 2, 3, 4]  # the generator starts anew


def test_the_critics_accuracy_is_on_batches_as_in_training_and_leaves_it_unchanged():
    torch.manual_seed(0)
    critic, generator = models.Discriminator(3, width=4), models.UNet(3, width=4).eval()
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    images = torch.randint(256, (23, 3, 32, 32), dtype=torch.uint8)
    batches = data.Batches(images, "rgb", 8, 0)
    accuracy = train_nogan.discriminator_accuracy(critic, generator, batches, 1)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    right = []
    for gray, target in batches.epoch(1):
        right += (critic(gray, target) > 0).flatten().tolist()  # in training mode
        fake = data.keep_gray(gray, generator(gray), "rgb")
        right += (critic(gray, fake) <= 0).flatten().tolist()
    assert len(right) == 46
    assert accuracy == pytest.approx(np.mean(right))


def test_a_critic_that_tells_little_is_warned_of(tiny, capsys, monkeypatch):
    for accuracy, warned in ((0.79, True), (0.81, False)):
        monkeypatch.setattr(train_nogan, "discriminator_accuracy", lambda *args: accuracy)
        tiny(train_nogan.main, out=str(accuracy))
        assert ("raise --critic-epochs" in capsys.readouterr().err) == warned


def test_imagenet_features_are_kept_in_the_checkpoint(tiny, imagenet, monkeypatch):
    run = tiny(train_nogan.main, "--features", "vgg16_bn", "--limit", 7, "--batch-size", 2)
    checkpoint = models.load_checkpoint(run / "last.pt")
    assert checkpoint["stage"] == "gan" and checkpoint["epoch"] == 3
    kept = checkpoint["feature_network"]["layers.40.weight"]
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
    for side in ("train", "test"):  # one class is no better
        (tmp_path / "one" / side).mkdir(parents=True)
        shutil.copytree(tmp_path / side, tmp_path / "one" / side / "class")
    one_class = ["--data-dir", tmp_path / "one"]
    assert "--features vgg16_bn" in fails(train_nogan.main, [*command, *one_class])
    assert not (tmp_path / "run").exists()
    train_nogan.main([*map(str, command), "--features", "vgg16_bn"])
    assert (tmp_path / "run" / "last.pt").exists()


def test_pictures_of_other_classes_do_not_fit_on_resuming(tiny, tmp_path, fails):
    run = tiny(train_nogan.main)
    for name in "abcd":
        (tmp_path / "classes" / "train" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (50 * i, 90, 0)).save(
                tmp_path / "classes" / "train" / name / f"{i}.png")
    checkpoint = models.load_checkpoint(run / "last.pt")
    checkpoint["args"].update(dataset="folder", limit=None)
    del checkpoint["pictures"]  # by which they would be known
    torch.save(checkpoint, run / "last.pt")
    line = fails(train_nogan.main, ["--resume", run / "last.pt", "--gan-epochs", 2, "--data-dir",
                                    tmp_path / "classes"])
    assert "feature_network does not fit" in line


def test_a_stage_that_is_over_cannot_be_prolonged(tiny, fails):
    run = tiny(train_nogan.main)
    before = (run / "last.pt").read_bytes()
    resume = ["--resume", run / "last.pt"]
    line = fails(train_nogan.main, [*resume, "--generator-epochs", 2])
    assert "--generator-epochs 2 contradicts" in line and "past that stage" in line
    assert (run / "last.pt").read_bytes() == before
    train_nogan.main([*map(str, resume), "--gan-epochs", "2"])
    assert models.load_checkpoint(run / "last.pt")["epoch"] == 5
