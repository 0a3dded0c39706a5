import colorsys
import hashlib
import http.server
import importlib.util
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import lab_by_the_book
from PIL import Image, ImageCms

import data
import train_unet

# ----------------------------------------------------------------------------------------- colour


def as_pictures(colors):  # (N, 3) -> (N, 3, 1, 1)
    return torch.as_tensor(colors)[:, :, None, None]


def all_kinds_of_colors():
    corners = np.array(np.meshgrid([0, 1], [0, 1], [0, 1])).reshape(3, -1).T
    dark = np.random.RandomState(1).rand(10_000, 3) * 0.06  # where the formulas change branch
    return np.concatenate([corners, dark, np.random.RandomState(0).rand(200_000, 3)])


def test_lab_agrees_with_the_formulas_in_float64_over_the_whole_cube():
    colors = all_kinds_of_colors()
    lab = data.rgb_to_lab(as_pictures(colors.astype(np.float32)))
    assert np.abs(lab.flatten(1).numpy() - lab_by_the_book(colors)).max() < 1e-3


def test_rgb_comes_back_from_lab_within_half_a_byte():
    rgb = as_pictures(all_kinds_of_colors().astype(np.float32))
    assert (data.lab_to_rgb(data.rgb_to_lab(rgb)) - rgb).abs().max() < 0.5 / 255


def test_gray_has_no_chroma():
    gray = torch.linspace(0, 1, 256).view(-1, 1, 1, 1).expand(-1, 3, -1, -1)
    assert data.rgb_to_lab(gray)[:, 1:].abs().max() < 1e-4


def test_colors_outside_the_gamut_are_clipped_into_it():
    lab = as_pictures([[50.0, 110, -110], [0, -110, 110], [100, 110, 110], [100, -110, -110]])
    rgb = data.lab_to_rgb(lab)
    assert rgb.min() >= 0 and rgb.max() <= 1


@pytest.mark.parametrize("color", ["rgb", "lab"])
def test_to_rgb_has_finite_gradients_for_every_output(color):
    grid = torch.linspace(-1, 1, 21)
    gray, *output = torch.cartesian_prod(*[grid] * (1 + data.CHANNELS[color])).unbind(1)
    output = torch.stack(output, dim=1)[:, :, None, None].requires_grad_()
    data.to_rgb(gray.view(-1, 1, 1, 1), output, color).sum().backward()
    assert output.grad.isfinite().all()
    assert output.grad.abs().max() > 0


@pytest.mark.parametrize("color", ["rgb", "lab"])
def test_a_perfect_output_gives_the_picture_back(color):
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    gray, target = data.to_gray_and_target(images, color)
    assert gray.shape == (4, 1, 16, 16) and target.shape == (4, data.CHANNELS[color], 16, 16)
    assert gray.abs().max() <= 1 and target.abs().max() <= 1
    assert (data.to_rgb(gray, target, color) - images / 255).abs().max() < 0.5 / 255


def test_a_picture_keeps_the_luma_that_was_given():
    gray = 2 * torch.rand(4, 1, 16, 16) - 1
    output = 2 * torch.rand(4, 3, 16, 16) - 1
    rgb = data.to_rgb(gray, output, "rgb")
    assert rgb.min() >= 0 and rgb.max() <= 1
    inside = ((rgb > 0) & (rgb < 1)).all(dim=1, keepdim=True)
    assert 0.2 < inside.float().mean() < 0.9
    not_clipped = data.keep_gray(gray, output, "rgb")
    for picture, where in ((2 * rgb - 1, inside), (not_clipped, inside | True)):
        r, g, b = picture.split(1, dim=1)
        luma = 0.299 * r + 0.587 * g + 0.114 * b
        assert torch.allclose(luma[where], gray[where], atol=1e-5)
    ab = output[:, :2]
    assert data.keep_gray(gray, ab, "lab") is ab  # it has no L*
    differences = rgb[:, 1:] - rgb[:, :1]  # the colours' differences are the output's
    expected = (output[:, 1:] - output[:, :1]) / 2
    assert torch.allclose(differences[inside.expand_as(differences)],
                          expected[inside.expand_as(differences)], atol=1e-5)


def test_gray_is_rec_601_luma_in_rgb_and_lightness_in_lab():
    red = as_pictures([[255, 0, 0]]).to(torch.uint8)
    luma, lightness = (data.to_gray_and_target(red, color)[0].item() for color in ("rgb", "lab"))
    assert luma == pytest.approx(2 * 0.299 - 1)
    assert lightness == pytest.approx(53.2408 / 50 - 1, abs=1e-4)


# ----------------------------------------------------------------------- splits and gray pictures


@pytest.mark.parametrize("n, fraction", [(1000, 0.1), (3, 0.1), (2, 0.9), (50, 0.5)])
def test_random_split_is_disjoint_and_complete(n, fraction):
    training, validation = data.split_random(n, fraction, seed=0)
    assert len(training) and len(validation)
    assert sorted(torch.cat([training, validation]).tolist()) == list(range(n))


def test_random_split_is_the_same_on_every_platform():
    training, validation = data.split_random(10, 0.2, seed=0)
    assert validation.tolist() == [2, 8]
    assert training.tolist() == [4, 9, 1, 6, 7, 3, 0, 5]
    assert data.split_random(10, 0.2, seed=1)[1].tolist() != [2, 8]


def varied_pictures(n):
    """Noise of many tints: some of few colours, some gray in part, one gray throughout."""
    random = np.random.RandomState(7)
    images = random.randint(256, size=(n, 3, 16, 16)) * random.uniform(0, 1, (n, 3, 1, 1))
    images[::3, :, :8] = images[::3, :1, :8]
    images[5] = 90
    return images.astype(np.uint8)


@pytest.mark.parametrize("n", [60, 57, 2])
def test_hue_split_takes_every_tenth_in_the_order_of_colorsys(n):
    images = varied_pictures(60)[-n:]
    hues = [np.mean([colorsys.rgb_to_hsv(*pixel)[0]
                     for pixel in (image.reshape(3, -1).T / 255.0).tolist()]) for image in images]
    order = sorted(range(n), key=lambda i: hues[i])
    training, validation = data.split_by_hue(torch.from_numpy(images), 0.1)
    assert validation.tolist() == order[::10]
    assert training.tolist() == [i for position, i in enumerate(order) if position % 10]


@pytest.mark.parametrize("n, fraction", [(1000, 0.1), (101, 0.0990100), (3, 0.1), (2, 0.9),
                                         (50, 0.85), (340, 0.55)])
def test_hue_split_is_disjoint_complete_and_of_the_fraction(n, fraction):
    images = torch.randint(256, (n, 3, 2, 2), dtype=torch.uint8)
    training, validation = data.split_by_hue(images, fraction)
    assert len(training) and len(validation) and abs(len(validation) - n * fraction) <= 1
    assert sorted(torch.cat([training, validation]).tolist()) == list(range(n))


def test_hue_split_makes_validation_more_like_training_than_a_random_one_does():
    images = torch.from_numpy(varied_pictures(1000))
    hues = data.mean_hue(images).numpy()

    def distance(training, validation):  # of the histograms of mean hues
        one, two = (np.histogram(hues[side], 20, (0, 1))[0] / len(side)
                    for side in (training, validation))
        return np.abs(one - two).sum()

    random = np.mean([distance(*data.split_random(1000, 0.1, seed)) for seed in range(20)])
    assert distance(*data.split_by_hue(images, 0.1)) < 0.3 * random


def test_the_split_flag_chooses_the_split():
    validation = {split: data.load_training(flags("--dataset", "shapes", "--split", split))[1]
                  for split in ("random", "hue")}
    hues = {split: data.mean_hue(pictures.images) for split, pictures in validation.items()}
    assert torch.equal(hues["hue"], hues["hue"].sort().values)
    assert not torch.equal(hues["random"], hues["random"].sort().values)


def flags(*argv):
    return train_unet.build_parser().parse_args([str(word) for word in argv])


def save_images(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")


def noise(n, seed=0, side=32):
    return np.random.RandomState(seed).randint(256, size=(n, side, side, 3)).astype(np.uint8)


def test_gray_pictures_are_dropped_from_training_and_validation_but_not_from_the_test(tmp_path):
    images = noise(20)
    images[::4] = images[::4, :, :, :1]
    save_images(tmp_path / "train" / "a", images)
    save_images(tmp_path / "test" / "a", images)
    args = flags("--dataset", "folder", "--data-dir", tmp_path, "--val-fraction", 0.2)
    training, validation, dropped = data.load_training(args)
    assert (len(training.images), len(validation.images), dropped) == (12, 3, 5)
    assert len(training.labels) == 12
    assert not data.is_gray(torch.cat([training.images, validation.images])).any()
    assert len(data.load_pictures("folder", tmp_path, 32, train=False).images) == 20


def test_pictures_and_labels_stay_together_through_dropping_and_splitting(tmp_path):
    for i in range(40):  # as red as the label says, and every fifth one gray
        picture = np.full((32, 32, 3), i)
        picture[:, :, 0] += 1 if i % 5 else 0
        (tmp_path / "train" / f"{i:02}").mkdir(parents=True)
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "train" / f"{i:02}" / "x.png")
    (tmp_path / "test").mkdir()
    for split in ("random", "hue"):
        args = flags("--dataset", "folder", "--data-dir", tmp_path, "--split", split)
        training, validation, dropped = data.load_training(args)
        assert dropped == 8 and len(validation.images) > 2
        for images, labels in (training, validation):
            assert torch.equal(images[:, 1, 0, 0].long(), labels)
            assert torch.equal(images[:, 0].long(), labels.view(-1, 1, 1).expand(-1, 32, 32) + 1)
        labels = torch.cat([training.labels, validation.labels])
        assert sorted(labels.tolist()) == [i for i in range(40) if i % 5]


def test_a_fingerprint_tells_pictures_from_others_and_from_another_order():
    images = torch.from_numpy(varied_pictures(60))
    others = [images[1:], images.flip(0), images.flip(-1), images.view(60, 3, 8, 32)]
    others.append(images.clone())
    others[-1][30, 1, 5, 5] ^= 1
    fingerprints = {data.fingerprint(some) for some in [images, *others]}
    assert len(fingerprints) == 6 and data.fingerprint(images.clone()) in fingerprints
    assert data.fingerprint(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)) == 913324892


def test_limit_draws_before_the_split_and_validation_shrinks_with_it():
    training, validation, _ = data.load_training(flags("--dataset", "shapes", "--limit", 50))
    assert (len(training.images), len(validation.images)) == (45, 5)
    other = data.load_training(flags("--dataset", "shapes", "--limit", 50, "--seed", 1))[0]
    assert not torch.equal(training.images, other.images)


def test_limit_makes_only_the_shapes_that_it_draws(monkeypatch):
    make, made = data.make_shapes, []
    monkeypatch.setattr(data, "make_shapes", lambda *args: made.append(make(*args)) or made[-1])
    images, labels = data.load_pictures("shapes", "", 32, train=True, limit=700, seed=3)
    assert sum(len(some) for some, *_ in made) == 700
    all_images, all_labels, _ = make(data.SHAPES_TRAIN, 32, data.SHAPES_TRAIN_SEED)
    chosen = np.sort(np.random.RandomState(3).permutation(data.SHAPES_TRAIN)[:700])
    assert torch.equal(images, all_images[chosen]) and torch.equal(labels, all_labels[chosen])


# ---------------------------------------------------------------------------------------- batches


def numbered_pictures(n):
    """Each picture says its number in red, and left from right in green."""
    images = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    images[:, 0] = torch.arange(n).view(-1, 1, 1)
    images[:, 1] = torch.arange(16)
    return images


@pytest.mark.parametrize("n, batch_size, sizes", [
    (50, 16, [16, 16, 16, 2]), (49, 16, [16, 16, 16]), (48, 16, [16] * 3), (5, 128, [5]),
])
def test_an_epoch_has_every_picture_once_but_for_a_lonely_last_one(n, batch_size, sizes):
    batches = data.Batches(numbered_pictures(n), "rgb", batch_size, seed=0)
    targets = [target for _, target in batches.epoch(1)]
    assert [len(target) for target in targets] == sizes and len(batches) == len(sizes)
    numbers = torch.cat(targets)[:, 0, 0, 0].add(1).mul(127.5).round().tolist()
    assert len(set(numbers)) == len(numbers) == sum(sizes)


def test_a_flipped_gray_comes_with_its_flipped_target():
    images = numbered_pictures(64)
    flipped = 0
    for gray, target in data.Batches(images, "rgb", 16, seed=0).epoch(3):
        assert torch.allclose(data.luma((target + 1) / 2), (gray + 1) / 2, atol=1e-5)
        for picture in ((target + 1) * 127.5).round().to(torch.uint8):
            original = images[picture[0, 0, 0].long()]
            is_flipped = torch.equal(picture, original.flip(-1))
            assert is_flipped or torch.equal(picture, original)
            flipped += is_flipped
    assert 16 < flipped < 48


def test_a_shift_moves_each_picture_by_itself_and_mirrors_its_edges():
    images, labels = torch.randint(256, (256, 3, 16, 32), dtype=torch.uint8), torch.arange(256)
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (3, 3), (3, 3)], "reflect")
    moves = []
    for gray, target, label in data.Batches(images, "rgb", 64, 0, labels, shift=3).epoch(1):
        assert torch.allclose(data.luma((target + 1) / 2), (gray + 1) / 2, atol=1e-5)
        for picture, i in zip(((target + 1) * 127.5).round().byte().numpy(), label):
            windows = {(down, right): padded[i, :, 3 - down : 19 - down, 3 - right : 35 - right]
                       for down in range(-3, 4) for right in range(-3, 4)}
            either = (picture, picture[..., ::-1])  # flipped: that turns the move around, too
            moves += [move for move, window in windows.items()
                      if any(np.array_equal(x, window) for x in either)]
    assert len(moves) == 256 and len(set(moves)) > 45  # of 49


def test_labels_come_with_their_pictures():
    images, labels = numbered_pictures(40), torch.arange(40)
    for _, target, label in data.Batches(images, "rgb", 16, 0, labels).epoch(1):
        assert torch.equal(((target[:, 0, 0, 0] + 1) * 127.5).round().long(), label)


def test_seed_and_epoch_alone_decide_order_flips_and_shifts():
    def first(seed, epoch):
        batches = data.Batches(numbered_pictures(40), "rgb", 16, seed, shift=3)
        return next(batches.epoch(epoch))[1]

    assert torch.equal(first(0, 1), first(0, 1))
    assert not torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


# --------------------------------------------------------------------------------------- datasets


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A CIFAR-10 of 20 pictures, read by torchvision; only the lists of checksums are replaced."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, seed in (("data_batch_1", 0), ("test_batch", 1)):
        rows = noise(10, seed).transpose(0, 3, 1, 2).reshape(10, -1)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(source, "test_list", [["test_batch", None]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(source, "meta", meta)
    return tmp_path


def test_cifar10_is_read_by_torchvision(cifar10):
    for train, seed in ((True, 0), (False, 1)):
        pictures = data.load_pictures("cifar10", cifar10, 32, train)
        assert pictures.labels.tolist() == list(range(10))
        assert torch.equal(pictures.images.permute(0, 2, 3, 1), torch.from_numpy(noise(10, seed)))
    train_unet.main(["--data-dir", str(cifar10), "--epochs", "1", "--width", "2",
                     "--out", str(cifar10 / "run")])
    assert (cifar10 / "run" / "last.pt").exists()


def test_cifar10_that_cannot_be_downloaded_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, fails
):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:1/cifar.tar.gz")
    where = tmp_path / "new" / "datasets"
    line = fails(train_unet.main, ["--data-dir", where, "--out", tmp_path / "run"])
    assert str(where / "cifar-10-python.tar.gz") in line
    assert "--dataset folder --data-dir DIR" in line and "--dataset shapes" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_to_a_disk_that_is_not_there_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:1/cifar.tar.gz")
    (tmp_path / "datasets").symlink_to(tmp_path / "disk")
    with pytest.raises(data.DataError):
        data.load_pictures("cifar10", tmp_path / "datasets", 32, train=True)
    assert (tmp_path / "datasets").is_symlink()


def test_a_misspelt_data_set_is_not_made_up():
    with pytest.raises(data.DataError, match="cannot make CIFAR10 .*: use shapes"):
        data.load_pictures("CIFAR10", "datasets", 32, train=True)


def test_a_server_that_never_answers_is_a_no(tmp_path, monkeypatch):
    assert data.DOWNLOAD_TIMEOUT == 10
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        with pytest.raises(data.DataError, match="timed out"):
            data.load_pictures("cifar10", tmp_path, 32, train=True)
    assert socket.getdefaulttimeout() is None


@pytest.fixture
def archive(cifar10, tmp_path, monkeypatch):
    """The bytes of an archive of that CIFAR-10, which torchvision takes for whole."""
    with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as file:
        file.add(cifar10 / "cifar-10-batches-py", "cifar-10-batches-py")
    packed = (tmp_path / "made.tar.gz").read_bytes()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(packed).hexdigest())
    return packed


@pytest.fixture
def serve(monkeypatch):
    """serve(answer) makes a server CIFAR-10's; answer(send) gets what sends bytes."""
    servers = []

    def run(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                answer(self.wfile.write)

            def log_message(self, *args):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}/cifar.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def test_cifar10_is_downloaded_and_unpacked(archive, serve, tmp_path):
    serve(lambda send: send(archive))
    root = tmp_path / "new" / "datasets"
    images = data.load_pictures("cifar10", root, 32, train=True).images
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(noise(10)))
    assert sorted(os.listdir(root)) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    assert (root / "cifar-10-python.tar.gz").read_bytes() == archive
    (root / "cifar-10-batches-py" / "data_batch_1").unlink()
    serve(lambda send: None)  # nothing to be downloaded again
    assert torch.equal(data.load_pictures("cifar10", root, 32, train=True).images, images)


@pytest.mark.parametrize("before", [[], ["mine/old.png"]])
def test_a_download_that_fails_removes_only_its_own(
    before, archive, serve, tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.3)
    root, done = tmp_path / "datasets", threading.Event()

    def put(name, content):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    def answer(send):
        send(archive[:1000])
        meanwhile()
        done.wait(5)  # says no more

    def meanwhile():
        for name in ("photos/new.png", "cifar-10-batches-py/notes.txt"):
            if name not in before:
                put(name, b"copied there meanwhile")

    for name in before:
        put(name, b"there before")
    serve(answer)
    with pytest.raises(data.DataError, match="timed out"):
        data.load_pictures("cifar10", root, 32, train=True)
    done.set()
    found = {str(path.relative_to(root)): path.read_bytes()
             for path in root.rglob("*") if path.is_file()}
    wanted = dict.fromkeys(["photos/new.png", "cifar-10-batches-py/notes.txt"],
                           b"copied there meanwhile")
    assert found == {**wanted, **dict.fromkeys(before, b"there before")}


def test_ctrl_c_in_a_download_leaves_nothing(archive, serve, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    serve(lambda send: send(archive[:1000]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torchvision.datasets.utils, "_urlretrieve", interrupted)
        data.load_pictures("cifar10", tmp_path / "new" / "datasets", 32, train=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_unpacking_that_breaks_off_removes_only_what_was_unpacked(
    error, archive, tmp_path, monkeypatch
):
    root, extractall = tmp_path / "datasets", tarfile.TarFile.extractall
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "test_batch").write_bytes(b"of old")
    (root / "cifar-10-python.tar.gz").write_bytes(archive)

    def breaks_off(*args, **kwargs):
        extractall(*args, **kwargs)
        assert (folder / "data_batch_1").exists()
        raise error

    monkeypatch.setattr(tarfile.TarFile, "extractall", breaks_off)
    with pytest.raises((data.DataError, KeyboardInterrupt)) as caught:
        data.load_pictures("cifar10", root, 32, train=True)
    if caught.type is data.DataError:
        assert "unpacked ([Errno 28] No space left on device)" in str(caught.value)
    assert os.listdir(folder) == ["test_batch"]
    assert (root / "cifar-10-python.tar.gz").read_bytes() == archive


def test_a_folder_may_hold_any_mode_and_size(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    green = Image.new("RGB", (40, 40), (0, 200, 0))
    wide = Image.new("RGB", (120, 40), (200, 0, 0))  # of which the middle is kept
    wide.paste(green, (40, 0))
    wide.save(folder / "wide.webp", lossless=True)
    for mode in ("RGB", "RGBA", "CMYK"):
        green.convert(mode).save(folder / f"{mode}.tif")
    green.quantize().save(folder / "palette.png")
    green.save(folder / "photo.JPG", quality=95)
    images = data.load_pictures("folder", tmp_path, 32, True).images
    held_out = data.load_pictures("folder", tmp_path, 32, False).images
    images = torch.cat([images, held_out])
    assert images.shape == (6, 3, 32, 32)
    inside = images[:, :, 4:-4, 4:-4].float()  # resampling blurs the cut
    assert (inside - torch.tensor([0.0, 200, 0]).view(3, 1, 1)).abs().max() < 6


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    picture = np.asarray(data.read_picture(tmp_path / "deep.png"))
    assert picture[0, :, 0].tolist() == [0, 100, 255]


def test_a_32_bit_picture_of_bytes_is_not_black(tmp_path):
    values = np.array([[0, 100, 255]], dtype=np.int32)
    Image.fromarray(values).save(tmp_path / "bytes.tif")
    assert np.asarray(data.read_picture(tmp_path / "bytes.tif"))[0, :, 0].tolist() == [0, 100, 255]


D50 = struct.pack(">3i", 63190, 65536, 54061)


def icc_profile(spaces, tags):
    """The bytes of an ICC profile (ICC.1:2001-04): 128 bytes of header, a table, then the tags."""
    tags = {b"wtpt": b"XYZ " + bytes(4) + D50, **tags}
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value
    header = struct.pack(">I4sI", 128 + len(table) + len(body), b"", 0x02400000) + b"prtr" + spaces
    return header + bytes(12) + b"acsp" + bytes(28) + D50 + bytes(48) + table + body


def profile_of_gray(gamma):
    curve = struct.pack(">4sIIHH", b"curv", 0, 1, round(256 * gamma), 0)
    return icc_profile(b"GRAYXYZ ", {b"kTRC": curve})


def profile_of_inks():
    """CMYK whose cyan is L*a*b* (80, -40, -40); a look-up table of two points an ink."""
    colors = [[100 - 20 * c - 20 * m - 60 * k, 60 * m - 40 * c, 60 * y - 40 * c]
              for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    points = (np.array(colors) * [2.55, 1, 1] + [0, 128, 128]).round().astype(np.uint8).tobytes()
    matrix = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).flat)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix
    table += 4 * bytes(range(256)) + points + 3 * bytes(range(256))
    return icc_profile(b"CMYKLab ", {b"A2B0": table})


def profile_that_swaps_red_and_blue():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return srgb.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")


def read_with_profile(picture, profile, path):
    picture.save(path, icc_profile=profile, **({"quality": 100} if path.suffix == ".jpg" else {}))
    return np.asarray(data.read_picture(path))[0, 0].tolist()


def test_an_embedded_profile_makes_srgb(tmp_path):
    red, swapped = Image.new("RGB", (20, 20), (200, 30, 10)), profile_that_swaps_red_and_blue()
    clear = red.copy()
    clear.putalpha(0)
    for name in ("x.png", "x.jpg", "x.tif", "x.webp"):
        r, _, b = read_with_profile(red, swapped, tmp_path / name)
        assert r < 60 and b > 180, name
    r, _, b = read_with_profile(red.quantize(), swapped, tmp_path / "palette.png")
    assert r < 60 and b > 180
    assert read_with_profile(clear, swapped, tmp_path / "clear.png") == [255, 255, 255]
    save_images(tmp_path / "train", np.stack([red] * 3))
    red.save(tmp_path / "train" / "0.png", icc_profile=swapped)
    (tmp_path / "test").mkdir()
    pixels = data.load_pictures("folder", tmp_path, 32, True).images[:, :, 5, 5]
    assert pixels[0, 2] > 180 and pixels[1:].tolist() == [[200, 30, 10]] * 2


def test_a_profile_of_gray_is_followed_whatever_the_gray_is_stored_in(tmp_path):
    gray, linear = Image.new("L", (20, 20), 128), profile_of_gray(1.0)
    expected = 255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    deep = Image.fromarray(np.full((20, 20), 128 * 257, dtype=np.uint16))
    for name, picture in (("x.png", gray), ("x.jpg", gray), ("la.png", gray.convert("LA")),
                          ("deep.png", deep)):
        pixel = read_with_profile(picture, linear, tmp_path / name)
        assert np.abs(np.array(pixel) - expected).max() < 1.5, name
    swapped = profile_that_swaps_red_and_blue()
    assert read_with_profile(gray, swapped, tmp_path / "rgb.png") == [128, 128, 128]


@pytest.mark.parametrize("name", ["x.tif", "x.jpg"])
def test_a_profile_of_inks_is_followed(name, tmp_path):
    cyan, plain = Image.new("CMYK", (20, 20), (255, 0, 0, 0)), [0, 255, 255]
    pixel = read_with_profile(cyan, profile_of_inks(), tmp_path / name)
    wanted = 255 * data.lab_to_rgb(torch.tensor([80.0, -40, -40]).view(1, 3, 1, 1)).flatten()
    assert np.abs(np.array(pixel) - wanted.numpy()).max() < 4
    assert read_with_profile(cyan, None, tmp_path / name) == plain
    red = Image.new("RGB", (20, 20), (200, 30, 10))
    assert read_with_profile(red, profile_of_inks(), tmp_path / "rgb.png") == [200, 30, 10]


def test_a_profile_that_is_broken_or_of_other_channels_is_ignored(tmp_path):
    red, srgb = (200, 30, 10), profile_that_swaps_red_and_blue()
    for i, profile in enumerate([b"", b"junk", srgb[:200], srgb[:-500], profile_of_gray(1.0)]):
        picture = Image.new("RGB", (20, 20), red)
        assert read_with_profile(picture, profile, tmp_path / f"{i}.png") == list(red)
    cmyk = Image.new("RGB", (20, 20), red).convert("CMYK")
    plain = read_with_profile(cmyk, None, tmp_path / "plain.tif")
    assert read_with_profile(cmyk, profile_of_gray(1.0), tmp_path / "x.tif") == plain


def test_warnings_of_pillow_are_not_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    save_images(tmp_path / "train", noise(40, side=60))
    (tmp_path / "test").mkdir()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        data.read_picture(tmp_path / "train" / "0.png")
        data.load_pictures("folder", tmp_path, 32, True)
    assert seen == []


def test_class_folders_give_labels_and_flat_folders_none(tmp_path):
    save_images(tmp_path / "classes" / "train" / "cat", noise(3))
    save_images(tmp_path / "classes" / "train" / "dog", noise(2))
    save_images(tmp_path / "classes" / "test" / "dog", noise(1))
    load = data.load_pictures
    assert load("folder", tmp_path / "classes", 32, True).labels.tolist() == [0, 0, 0, 1, 1]
    assert load("folder", tmp_path / "classes", 32, False).labels.tolist() == [1]
    save_images(tmp_path / "flat" / "train", noise(3))
    assert load("folder", tmp_path / "flat", 32, True).labels is None


def test_linked_class_folders_are_followed_and_circles_end(tmp_path):
    save_images(tmp_path / "elsewhere" / "kittens", noise(2))
    save_images(tmp_path / "train" / "dog", noise(3))
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "dog" / "self").symlink_to(tmp_path / "train" / "dog")
    (tmp_path / "test").mkdir()
    assert data.load_pictures("folder", tmp_path, 32, True).labels.tolist() == [0, 0, 1, 1, 1]


def test_a_picture_beside_class_folders_is_named_and_left_out(tmp_path, capsys):
    for name in ("cat", "dog"):
        save_images(tmp_path / "train" / name, noise(2))
    save_images(tmp_path / "train" / "z", noise(0))
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "stray.png")
    (tmp_path / "test").mkdir()
    assert data.load_pictures("folder", tmp_path, 32, True).labels.tolist() == [0, 0, 1, 1]
    assert "left out 1 of 5 pictures" in (err := capsys.readouterr().err) and "stray.png" in err


def test_pictures_are_sorted_by_their_path_as_text(tmp_path):
    for name in ("a/x", "a b/x", "B", "ä"):
        save_images(tmp_path / name, noise(1))
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "0.png")
    found = [path.relative_to(tmp_path).as_posix() for path in data.picture_paths(tmp_path)]
    assert found == ["B/0.png", "a b/x/0.png", "a/0.png", "a/x/0.png", "ä/0.png"]


def test_what_cannot_be_read_in_a_folder_is_named_once(tmp_path, capsys, monkeypatch):
    for name in ("good", "locked"):
        save_images(tmp_path / name, noise(1))
    for name in ("1.HEIC", "2.heic", "3.dng", "notes.txt", "good/4.heic"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")  # which would never be opened
    scandir = os.scandir

    def locked(folder):  # root may read any
        if os.path.basename(folder) == "locked":
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", locked)
    paths = data.picture_paths(tmp_path)
    assert [path.name for path in paths] == ["gone.png", "0.png"]  # the first when it is opened
    lines = sorted(capsys.readouterr().err.splitlines())
    assert lines == [f"left out 4 files like {tmp_path / '1.HEIC'}: make them JPEG",
                     f"skipped [Errno 13] Permission denied: '{tmp_path / 'locked'}'"]


def test_pictures_that_do_not_fit_are_refused_before_decoding(tmp_path, fails, monkeypatch, capsys):
    save_images(tmp_path / "train", noise(20))
    (tmp_path / "test").mkdir()
    command = ["--dataset", "folder", "--data-dir", tmp_path, "--epochs", 1, "--width", 1,
               "--out", tmp_path / "run"]
    needed = 20 * 3 * 32 * 32
    monkeypatch.setattr(data, "free_memory", lambda: needed - 1)
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_picture", None)
        line = fails(train_unet.main, command)
    assert "20 pictures of 32x32 need 0.0 GB" in line and "lower --limit or --size" in line
    monkeypatch.setattr(data, "free_memory", lambda: needed * 1.5)
    train_unet.main([str(word) for word in command])
    assert "20 pictures of 32x32 need" in capsys.readouterr().err
    monkeypatch.setattr(data, "free_memory", lambda: needed * 3)
    data.load_pictures("folder", tmp_path, 32, True)
    assert "need" not in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs /proc/meminfo")
def test_free_memory_is_known_where_the_system_says_it():
    assert 2**20 < data.free_memory() < 2**50


def test_exhausted_memory_is_not_taken_for_a_damaged_picture(tmp_path, fails, monkeypatch):
    def full(path):
        raise MemoryError

    save_images(tmp_path / "train", noise(20))
    monkeypatch.setattr(data, "read_picture", full)
    line = fails(train_unet.main, ["--dataset", "folder", "--data-dir", tmp_path])
    assert "memory is exhausted" in line and "--size" in line


def test_a_torch_without_distributed_is_a_single_process(monkeypatch):
    monkeypatch.delattr(torch.distributed, "is_initialized")  # as in AMD's torch for Windows
    spec = importlib.util.spec_from_file_location("data_anew", data.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert not torch.distributed.is_initialized() and anew.over_processes(3, "SUM") == 3


PEAK = """
import os, sys
os.cpu_count = lambda: 2  # each thread that decodes needs memory of its own
sys.path.insert(0, sys.argv[1])
import data, train_unet
before = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
training, validation, _ = data.load_training(train_unet.build_parser().parse_args(sys.argv[2:]))
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(1024 * (peak - before) / (training.images.nbytes + validation.images.nbytes))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc/self/status")
def test_loading_needs_little_more_memory_than_its_pictures(tmp_path):
    images = noise(300, side=4)
    images[::10] = images[::10, :, :, :1]
    save_images(tmp_path / "train", images)
    (tmp_path / "train" / "bad.png").write_bytes(b"junk")
    (tmp_path / "test").mkdir()
    command = [sys.executable, "-c", PEAK, Path(data.__file__).parent, "--dataset", "folder",
               "--data-dir", tmp_path, "--size", 256, "--split", "hue"]

    # 1.9; a copy of the pictures adds 1.7. Freed memory goes back at once, or else the allocator
    # (glibc's) now and then keeps as much as two copies.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.5


def test_without_a_test_folder_a_tenth_is_held_out_by_name_and_said_so(tmp_path, capsys):
    save_images(tmp_path / "train", noise(100))
    test = data.load_pictures("folder", tmp_path, 32, train=False).images
    assert "held out" in capsys.readouterr().err
    train = data.load_pictures("folder", tmp_path, 32, train=True).images
    names = sorted(f"{i}.png" for i in range(100))
    expected = [int(name[:-4]) for name in names if zlib.crc32(name.encode()) % 10 == 0]
    assert torch.equal(test.permute(0, 2, 3, 1), torch.from_numpy(noise(100)[expected]))
    assert len(train) == 100 - len(test)


def test_the_held_out_tenth_goes_by_the_path_below_train(tmp_path):
    names = [f"p{i:02}/original.png" for i in range(30)]
    for name, picture in zip(names, noise(30)):
        save_images(tmp_path / "train" / name[:3], [])
        Image.fromarray(picture).save(tmp_path / "train" / name)
    test = data.load_pictures("folder", tmp_path, 32, train=False).images
    expected = [i for i, name in enumerate(names) if zlib.crc32(name.encode()) % 10 == 0]
    assert 0 < len(expected) < 8
    assert torch.equal(test.permute(0, 2, 3, 1), torch.from_numpy(noise(30)[expected]))


def test_test_pictures_need_no_training_pictures(tmp_path):
    save_images(tmp_path / "test" / "dog", noise(2))
    assert len(data.load_pictures("folder", tmp_path, 32, train=False).images) == 2


def test_a_damaged_picture_is_named_and_skipped(tmp_path, capsys):
    save_images(tmp_path / "train", noise(4))
    whole = (tmp_path / "train" / "3.png").read_bytes()
    (tmp_path / "train" / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "notes.txt").write_text("not a picture, not looked at")
    (tmp_path / "test").mkdir()
    assert len(data.load_pictures("folder", tmp_path, 32, train=True).images) == 3
    printed = capsys.readouterr().err
    assert "skipped" in printed and "3.png" in printed and "notes.txt" not in printed
    assert "decoded 3 of 4" in printed


def test_folders_without_pictures_end_in_one_line(tmp_path, fails):
    command = ["--dataset", "folder", "--data-dir", tmp_path, "--out", tmp_path / "run"]
    assert f"no folder {tmp_path / 'train'}" in fails(train_unet.main, command)
    (tmp_path / "train").mkdir()
    assert "no pictures in" in fails(train_unet.main, command)
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "bad.png").write_bytes(b"junk")
    assert "could be decoded" in fails(train_unet.main, command)
    (tmp_path / "train" / "bad.png").unlink()
    save_images(tmp_path / "train" / "a", noise(2))
    assert "too few" in fails(train_unet.main, command)
    save_images(tmp_path / "train" / "b", noise(2))
    assert "--val-fraction" in fails(train_unet.main, [*command, "--val-fraction", 0.9])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["random", "hue"])
def test_fewer_pictures_than_processes_are_too_few_and_not_damaged(split, tmp_path, monkeypatch):
    save_images(tmp_path / "train", noise(4))
    (tmp_path / "test").mkdir()
    args = flags("--dataset", "folder", "--data-dir", tmp_path, "--split", split)
    monkeypatch.setattr(data, "dist", SimpleNamespace(
        is_initialized=lambda: True, get_rank=lambda: 0, get_world_size=lambda: 8))
    with pytest.raises(data.DataError, match="0 coloured pictures are too few"):
        data.load_training(args)


def test_the_two_colors_of_a_triangle_cannot_be_told_from_its_gray():
    images, labels, objects = data.make_shapes(400, 32, seed=5)
    assert sorted(labels.unique().tolist()) == [0, 1, 2]
    triangle = labels == 2
    pixels = images[triangle].permute(0, 2, 3, 1)[objects[triangle]].double()  # (P, 3)
    gray = data.luma(pixels[:, :, None, None])[:, 0, 0, 0]
    orange = pixels[:, 0] > pixels[:, 2]
    assert 0.35 < orange.double().mean() < 0.65
    # Scaled to the same gray, the colours' mean is that gray, and their L* is the same.
    scaled = pixels / gray[:, None] * 100
    two = torch.stack([scaled[orange].mean(0), scaled[~orange].mean(0)])
    assert (two.mean(0) - 100).abs().max() < 1
    lightness = lab_by_the_book(two.numpy() / 255)[:, 0]
    assert abs(lightness[0] - lightness[1]) < 0.5
    assert np.linalg.norm(lab_by_the_book(two.numpy() / 255)[:, 1:], axis=1).min() > 40


def test_the_test_pictures_do_not_depend_on_the_seed():
    one = data.load_pictures("shapes", "datasets", 32, train=False, seed=0).images
    two = data.load_pictures("shapes", "datasets", 32, train=False, seed=1).images
    assert torch.equal(one, two)
    assert not torch.equal(one[:100], data.load_pictures("shapes", "", 32, train=True).images[:100])
