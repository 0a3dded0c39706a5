import copy
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import models

# --------------------------------------------------------------------------------------- networks


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_the_unet_has_the_parameters_of_the_paper_but_for_its_way_up():
    up = sum(channels * channels // 2 for channels in (1024, 512, 256, 128))
    with torch.device("meta"):
        assert parameters(models.UNet(3)) == pytest.approx(31.0e6 - (4 - 1) * up, rel=0.01)


def test_the_unet_goes_up_without_a_grid():
    unet = models.UNet(3, width=4)
    flat = torch.ones(1, 64, 4, 4)
    up = unet.up4(flat)
    assert up.shape == (1, 32, 8, 8)
    assert torch.allclose(up, up[:, :, :1, :1].expand_as(up), atol=1e-5)


def test_the_strided_unet_has_the_layers_of_the_paper():
    with torch.device("meta"):
        unet = models.StridedUNet(2)
    layers = [module for module in unet.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in layers] == [
        (64, 4, 1), (128, 4, 2), (256, 4, 2), (512, 4, 2), (512, 4, 2), (2, 1, 1)]
    layers = [module for module in unet.modules() if isinstance(module, torch.nn.ConvTranspose2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in layers] == [
        (512, 512, 4, 2), (1024, 256, 4, 2), (512, 128, 4, 2), (256, 64, 4, 2)]
    assert isinstance(unet.act1[1], torch.nn.ReLU)
    assert unet.act1[0].num_features == unet.head.in_channels == 128


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_of_2x2_maps_is_the_same_as_any_other(bias, monkeypatch):
    ours = models.Conv3x3(5, 7, 3, 1, 1, bias=bias).double()
    usual = torch.nn.Conv2d(5, 7, 3, padding=1, bias=bias).double()
    usual.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 2, 2, dtype=torch.double, requires_grad=True)
    x = x.contiguous(memory_format=torch.channels_last)
    gradients = []
    for network in (ours, usual):
        output = network(x)
        assert output.shape == (3, 7, 2, 2)
        assert output.is_contiguous(memory_format=torch.channels_last)  # BatchNorm's input stays so
        loss = (output * torch.arange(84.0).view_as(output)).sum()
        gradients.append([output, *torch.autograd.grad(loss, [x, *network.parameters()])])
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-12)
    convolutions = []
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: convolutions.append(x.shape))
    ours(x)
    assert not convolutions  # it was no convolution
    ours(torch.zeros(1, 5, 4, 4))
    ours(torch.zeros(1, 5, 2, 2, device="meta"))
    assert convolutions == [(1, 5, 4, 4), (1, 5, 2, 2)]


def test_a_strided_3x3_convolution_of_a_network_of_ones_own_is_strided_on_2x2_maps_too():
    assert models._convolution(4, 4, 3, stride=2)(torch.randn(2, 4, 2, 2)).shape == (2, 4, 1, 1)


UNETS = list(models.GENERATORS.values())


@pytest.mark.parametrize("network", UNETS)
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (48, 80)])
def test_the_unets_keep_the_picture_size_and_stay_within_tanh(network, size):
    output = network(2, width=4)(torch.randn(2, 1, *size) * 100)
    assert output.shape == (2, 2, *size)
    assert output.abs().max() <= 1


@pytest.mark.parametrize("network", UNETS)
def test_every_level_of_the_way_up_sees_that_of_the_way_down(network):
    unet = network(3, width=4).eval()
    on_the_way_down, on_the_way_up = {}, {}
    for level in "1234":
        after = getattr(unet, f"dec{level}" if network is models.UNet else f"act{level}")
        after.register_forward_pre_hook(
            lambda module, inputs, level=level: on_the_way_up.update({level: inputs[0]}))
        getattr(unet, f"enc{level}").register_forward_hook(
            lambda module, inputs, y, level=level: on_the_way_down.update({level: y}))
    unet(torch.rand(1, 1, 32, 32))
    for level in "1234":
        skip = on_the_way_down[level]
        assert torch.equal(on_the_way_up[level][:, -skip.shape[1]:], skip) and skip.std() > 0


def test_the_average_forgets_over_a_tenth_of_the_steps():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    averaged = copy.deepcopy(network).eval().requires_grad_(False)
    assert not averaged.training and not any(p.requires_grad for p in averaged.parameters())

    def state(net):
        return {name: value.double() for name, value in net.state_dict().items()
                if value.is_floating_point()}

    for step in (0, 1, 90, 10**6):
        with torch.no_grad():
            for value in network.parameters():
                value.normal_()
        network(torch.randn(8, 1, 4, 4))  # moves BatchNorm's statistics
        before, other = state(averaged), state(network)
        models.update_average(averaged, network, step)
        decay = min(0.999, (1 + step) / (10 + step))
        for name, value in state(averaged).items():
            expected = decay * before[name] + (1 - decay) * other[name]
            assert torch.allclose(value, expected, atol=1e-6), name


@pytest.mark.parametrize("head, size, shape", [
    ("image", 32, (2, 1)), ("image", 64, (2, 1)), ("patch", 32, (2, 1, 14, 14)),
])
def test_the_discriminator_judges_pictures_or_patches(head, size, shape):
    judge = models.Discriminator(2, width=4, head=head)
    assert judge(torch.rand(2, 1, size, size), torch.rand(2, 2, size, size)).shape == shape


@pytest.mark.parametrize("head, side", [("image", 32), ("patch", 16)])
def test_a_verdict_sees_the_stated_receptive_field(head, side):
    judge = models.Discriminator(3, width=4, head=head).eval()
    gray = torch.rand(1, 1, 32, 32, requires_grad=True)
    color = torch.rand(1, 3, 32, 32, requires_grad=True)
    logits = judge(gray, color)
    verdict = logits[0, 0, 7, 7] if head == "patch" else logits[0, 0]
    for seen in torch.autograd.grad(verdict, [gray, color]):
        rows, columns = torch.nonzero(seen[0].abs().sum(0)).unbind(1)
        assert rows.max() - rows.min() + 1 == side
        assert columns.max() - columns.min() + 1 == side


def test_networks_return_float32_under_autocast():
    judge, classifier = models.Discriminator(3, width=4), models.Classifier(10, width=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [network(3, width=4)(torch.rand(2, 1, 32, 32)) for network in UNETS]
        outputs += [judge(torch.rand(2, 1, 32, 32), outputs[0]), classifier(outputs[0])]
        outputs += classifier.maps(outputs[0])
    assert {output.dtype for output in outputs} == {torch.float32}


# ------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("device, amp, has_bf16, dtype", [
    ("cuda", "auto", True, torch.bfloat16), ("cuda", "auto", False, torch.float16),
    ("cuda", "on", False, torch.float16), ("cuda", "off", True, None), ("cpu", "auto", True, None),
    ("cpu", "on", False, torch.bfloat16), ("mps", "auto", True, None),
])
def test_amp_is_bfloat16_where_the_card_has_it_and_else_float16(
    device, amp, has_bf16, dtype, monkeypatch
):
    device, asked = torch.device(device, 0), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: (
        asked.append(card) or ((8, 0) if has_bf16 else (7, 5))))
    assert models.amp_dtype(device, amp) == dtype
    assert set(asked) <= {device}  # not whichever card is the current one


@pytest.mark.parametrize("processes, device", [(1, "mps"), (2, "cpu")])
def test_several_processes_on_a_mac_use_the_cpu(processes, device, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device: SimpleNamespace(
        device=torch.device(device)) if device == "mps" else zeros(n, device=device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(models, "PROCESSES", processes)
    assert models.choose_device("auto").type == device


@pytest.mark.parametrize("cuda, nccl, backends", [
    (True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, True, "gloo"),
])
def test_processes_talk_by_nccl_where_it_is(cuda, nccl, backends, monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", used.append)
    monkeypatch.setattr(models, "PROCESSES", 2)
    models.join_processes()
    assert used == [backends]


@pytest.mark.parametrize("dtype, scales", [
    (torch.float16, True), (torch.bfloat16, False), (None, False),
])
def test_only_float16_has_a_gradient_scaler(dtype, scales, monkeypatch):
    made = []
    monkeypatch.setattr(models, "amp_dtype", lambda device, amp: dtype)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: made.append(kwargs))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: made.append(kwargs))
    models.mixed_precision(torch.device("cuda"), "auto")
    assert made == [{"dtype": dtype, "enabled": dtype is not None}, {"enabled": scales}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_step_runs_under_autocast():
    device = models.choose_device("auto")
    autocast, scaler = models.mixed_precision(device, "auto")
    unet = models.UNet(3, width=8).to(device)
    with autocast:
        assert unet.head(torch.rand(1, 8, 4, 4, device=device)).dtype != torch.float32
        output = unet(torch.rand(2, 1, 32, 32, device=device))
    loss = F.mse_loss(output, torch.zeros_like(output))
    scaler.scale(loss).backward()
    assert all(p.grad.isfinite().all() for p in unet.parameters())


def test_a_two_class_softmax_is_the_sigmoid_of_the_logits_difference():
    two = torch.randn(64, 2, dtype=torch.float64)
    labels = torch.randint(2, (64,))
    one = two[:, 1] - two[:, 0]
    expected = F.cross_entropy(two, labels)
    assert torch.allclose(F.binary_cross_entropy_with_logits(one, labels.double()), expected)


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("name", models.GENERATORS)
def test_a_checkpoint_says_which_unet_it_holds(name, tmp_path):
    generator, path = models.GENERATORS[name](2, width=4).eval(), tmp_path / "last.pt"
    args = {"width": 4, "generator": name}
    models.save_checkpoint(path, "train_unet", args, 0, [], generator=generator)
    gray = torch.rand(1, 1, 32, 32)
    assert torch.equal(models.load_generator(path)(gray), generator(gray))


@pytest.fixture
def checkpoint(tmp_path):
    """A saved checkpoint and the generator in it."""
    generator = models.UNet(2, width=4)
    args = {"generator": "maxpool", "width": 4, "color": "lab"}
    models.save_checkpoint(tmp_path / "last.pt", "train_unet", args, 3, [], generator=generator)
    return tmp_path / "last.pt", generator.eval()


def test_one_file_rebuilds_its_generator(checkpoint):
    path, generator = checkpoint
    gray = torch.rand(1, 1, 32, 32)
    assert torch.equal(models.load_generator(path, "cpu")(gray), generator(gray))
    loaded = models.load_checkpoint(path)
    assert (loaded["script"], loaded["epoch"], loaded["args"]["color"]) == ("train_unet", 3, "lab")


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(checkpoint, monkeypatch):
    path, generator = checkpoint
    before = path.read_bytes()

    def full_disk(contents, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(models.RunError, match="cannot write .*last.pt: .*No space left"):
        models.save_checkpoint(path, "train_unet", {}, 4, [], generator=generator)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.pt"]


def test_two_writers_of_one_process_number_do_not_meet(tmp_path):
    with models.replacing(tmp_path / "a") as a, models.replacing(tmp_path / "b") as b:
        a.write(b"of a")
        b.write(b"of b")
    assert (tmp_path / "a").read_bytes() == b"of a" and (tmp_path / "b").read_bytes() == b"of b"


def test_a_folder_or_a_device_is_never_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe") if hasattr(os, "mkfifo") else (tmp_path / "pipe").mkdir()
    for path in (tmp_path, tmp_path / "pipe", "."):
        with pytest.raises(models.RunError, match="it is a folder or a device"):
            with models.replacing(path) as file:
                file.write(b"something")
    assert not (tmp_path / "pipe").is_file()
