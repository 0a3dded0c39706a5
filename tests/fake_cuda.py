"""The CUDA path on a machine without a card: shapes, types and devices on fake CUDA tensors.

A fake tensor has all but its numbers. An operation that mixes devices fails on it as on a card; one
that brings a number to the host, and so would wait for the card, is told by its name. Backward
needs a real card. That the loops read no loss at each step: see test_training.py.
"""

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import evaluate
import models
import train_nogan

pytestmark = pytest.mark.filterwarnings("ignore")


class NoWaiting(TorchDispatchMode):
    """Fails where a kernel's result is brought from the device to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        host = name == "_to_copy" and str(kwargs.get("device")) == "cpu"
        assert not host and name not in ("_local_scalar_dense", "nonzero", "equal"), name
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    # Without a card, torch.autocast would switch itself off.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    with FakeTensorMode(), NoWaiting():
        yield


def pictures(n=5, size=32):
    return torch.zeros(n, 3, size, size, dtype=torch.uint8, device="cuda")


def build(network, *args):
    with torch.device("cuda"):
        return network(*args)


def vgg():
    network = models.VGG16.__new__(models.VGG16)  # its __init__ leaves the weights for later
    torch.nn.Module.__init__(network)
    with torch.device("cuda"):
        network.layers = torchvision.models.vgg16_bn().features[: network.map_layers[-1] + 1]
        network.mean, network.std = torch.zeros(2, 1, 3, 1, 1)
    return network


def classifier():
    return build(models.Classifier, 10, 4)


def on_cuda(*tensors):
    return all(x.device.type == "cuda" and x.dtype == torch.float32 for x in tensors)


def test_what_waits_for_the_device_or_mixes_devices_fails_here():
    total = torch.zeros(3, device="cuda").sum()
    for wait in (total.item, total.cpu, total.nonzero):
        with pytest.raises(AssertionError):
            wait()
    with pytest.raises(RuntimeError, match="[dD]evice"):
        torch.zeros(3, device="cuda") + torch.zeros(3)


@pytest.mark.parametrize("color", data.CHANNELS)
def test_batches_are_made_on_the_device(color):
    labels = torch.zeros(5, dtype=torch.int64, device="cuda")
    steps = list(data.Batches(pictures(), color, 2, 0, labels, shift=3).epoch(1))
    assert len(steps) == 2
    for gray, target, _ in steps:
        assert on_cuda(gray, target) and target.shape[1] == data.CHANNELS[color]
        assert on_cuda(data.to_rgb(gray, target, color))


@pytest.mark.parametrize("color", data.CHANNELS)
@pytest.mark.parametrize("generator, head, features", [
    ("maxpool", "image", classifier), ("strided", "patch", vgg),
])
def test_the_losses_of_all_methods_are_computed_on_the_device(color, generator, head, features):
    generator = build(models.GENERATORS[generator], data.CHANNELS[color], 4)
    discriminator = build(models.Discriminator, data.CHANNELS[color], 4, head)
    autocast = torch.autocast("cuda", torch.bfloat16)
    gray, target = data.to_gray_and_target(pictures(), color)
    with autocast:
        output = generator(gray)
        fake = data.keep_gray(gray, output, color)
        logits = discriminator(gray, fake)
    losses = train_nogan.discriminator_losses(discriminator, gray, target, fake, autocast)
    l1 = torch.nn.functional.l1_loss(output, target)
    assert on_cuda(output, fake, logits, l1, *losses)
    with autocast:
        assert on_cuda(train_nogan.feature_loss(features(), gray, output, target, color))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("generator", models.GENERATORS)
def test_under_autocast_convolutions_take_and_give_16_bits(generator, dtype):
    network, taken, given = build(models.GENERATORS[generator], 3, 4), [], []
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            module.register_forward_hook(lambda module, inputs, output: (
                taken.append(inputs[0].dtype), given.append(output.dtype)) and None)
    with torch.autocast("cuda", dtype):
        assert on_cuda(network(torch.zeros(2, 1, 32, 32, device="cuda")))
    assert set(given) == set(taken[1:]) == {dtype}  # the first takes the gray picture


@pytest.mark.parametrize("color", data.CHANNELS)
def test_the_metrics_are_computed_on_the_device(color):
    generator = build(models.UNet, data.CHANNELS[color], 4)
    for saturation in (1, 2):
        for output, truth in evaluate.colorize(generator, pictures(), color, saturation=saturation):
            lab, true_lab = data.rgb_to_lab(output), data.rgb_to_lab(truth)
            assert on_cuda(
                evaluate.mse(output, truth), evaluate.psnr(output, truth),
                evaluate.ssim(output, truth), evaluate.mae_ab(lab, true_lab),
                evaluate.accuracy(lab, true_lab, 2), evaluate.colorfulness(output))


def test_the_classifier_classifies_on_the_device():
    assert on_cuda(classifier()(pictures() / 255))


def test_a_moving_average_stays_on_the_device():
    averaged, network = (build(models.UNet, 3, 4) for _ in range(2))
    models.update_average(averaged, network, 10)
    assert all(p.device.type == "cuda" for p in averaged.parameters())
