"""The promise: whatever goes wrong ends in one line that says what to do, and nothing is lost.

PROMISES lists mistakes and faults with the command that meets them and what its line must say.
Each ends in `error: ...` and status 2, without a traceback, and leaves every file as it was. Below
it are the faults that have to be made while a command runs: kills, full disks, exhausted memory.
"""

import contextlib
import io
import os
import pickle
import random
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import epochs
from PIL import Image

import data
import evaluate
import models
import train_gan
import train_nogan
import train_unet

TRAINING = [train_unet, train_gan, train_nogan]
SCRIPTS = {script.__name__: script for script in [*TRAINING, evaluate]}

PROMISES = [
    # what is wrong, the command, what the line says
    ("no checkpoint", "evaluate --ckpt none.pt", "there is no checkpoint none.pt"),
    ("a folder for one", "evaluate --ckpt run", "there is no checkpoint run"),
    ("an empty checkpoint", "evaluate --ckpt empty.pt", "empty.pt is damaged or no checkpoint"),
    ("a truncated one", "train_unet --resume cut.pt", "cut.pt is damaged or no checkpoint"),
    ("one with flipped bits", "evaluate --ckpt flipped.pt", "flipped.pt is damaged"),
    ("another program's", "evaluate --ckpt other.pt", "other.pt was not written by these scripts"),
    ("one of a newer format", "train_gan --resume newer.pt", "newer.pt has format 99"),
    ("one of an older format", "evaluate --ckpt older.pt", "older.pt has format 1, not 2: train"),
    ("a pickle that runs code", "evaluate --ckpt evil.pt", "evil.pt is damaged or no checkpoint"),
    ("a zip of something else", "evaluate --ckpt some.zip", "some.zip is damaged or no checkpoint"),
    ("another script's run", "train_gan --resume run/last.pt", "a run of train_unet.py"),
    ("a flag that contradicts", "train_unet --resume run/last.pt --lr 0.5", "--lr 0.5 contradicts"),
    ("fewer epochs", "train_unet --resume run/last.pt --epochs 1", "--epochs 1 contradicts"),
    ("a folder with a run", "train_unet --dataset shapes --out run", "run holds a run"),
    ("a resumed run into another's folder", "train_unet --resume run/last.pt --out run2",
     "run2 holds a run"),
    ("an --out that cannot be", "train_unet --dataset shapes --limit 9 --width 1 --out text.txt/x",
     "cannot write text.txt/x: choose another place"),
    ("an --out in what is no folder", "train_unet --dataset shapes --limit 9 --width 1 --out "
     "text.txt/x/y/z", "[Errno 20] Not a directory"),
    ("a figure that cannot be", "evaluate --ckpt run/last.pt --figure text.txt/f.png",
     "cannot write text.txt/f.png"),
    ("rows that cannot be", "evaluate --ckpt run/last.pt --json text.txt/r.json --figure run",
     "cannot write text.txt/r.json"),
    ("a missing dataset folder", "train_gan --dataset folder --data-dir nowhere --out new",
     "there is no folder nowhere/train"),
    ("an empty one", "train_gan --dataset folder --data-dir empty --out new",
     "there are no pictures in empty/train"),
    ("one of damaged pictures", "train_gan --dataset folder --data-dir damaged --out new",
     "no picture in damaged could be decoded"),
    ("one of 3 pictures", "train_gan --dataset folder --data-dir three --out new", "too few"),
    ("pictures without labels", "train_nogan --dataset folder --data-dir half --out new",
     "--features vgg16_bn"),
    ("no network for CIFAR-10", "train_unet --data-dir new --out new", "could not be downloaded"),
    ("half a CIFAR-10 archive", "train_unet --data-dir archive --out new",
     "CIFAR-10 is not whole at archive/cifar-10-python.tar.gz"),
    ("half an unpacked CIFAR-10", "train_unet --data-dir unpacked --out new",
     "CIFAR-10 is not whole at unpacked/cifar-10-python.tar.gz"),
    ("CIFAR-10 of another size", "train_unet --size 48 --out new", "use --size 32"),
    ("pictures too small for D", "train_gan --dataset shapes --size 16 --out new", "use patch"),
    ("shapes too large", "train_unet --dataset shapes --size 512 --out new",
     "use shapes, --size 128 or less"),
    ("a device of no kind", "train_unet --dataset shapes --device nonsense --out new",
     "--device nonsense cannot be used: use auto or cpu"),
    ("a device that does not train", "train_unet --dataset shapes --device meta --out new",
     "use auto or cpu"),
    ("a device of another package", "train_unet --dataset shapes --device hpu --out new",
     "--device hpu cannot be used: use auto or cpu"),
    ("a figure of photos", "evaluate --ckpt run/last.pt --images half/train --figure f.png",
     "do not go with --images"),
    ("curves and rows", "evaluate --ckpt run/last.pt --curves c.png --json rows.json",
     "do not go with --curves"),
    ("curves of nothing", "evaluate --ckpt begun.pt --curves c.png", "holds no epoch yet"),
    ("a figure of an unwritable kind", "evaluate --ckpt run/last.pt --figure f.psd",
     "f.psd is no name for a picture: choose the suffix .png"),
    ("a figure over a checkpoint", "evaluate --ckpt run/last.pt --figure run2/last.pt",
     "run2/last.pt is no name for a picture"),
    ("a run folder without a name", "train_unet --dataset shapes --out=", "--out needs a name"),
    ("pictures into a folder that is there", "evaluate --ckpt run/last.pt --save-pictures run2",
     "run2 exists: choose another --save-pictures"),
    ("a folder with the log of a run", "train_unet --dataset shapes --out logonly",
     "logonly holds a run"),
    ("two checkpoints for photos", "evaluate --ckpt run/last.pt run2/last.pt --images half/train",
     "--images takes one --ckpt"),
    ("photos that are not there", "evaluate --ckpt run/last.pt --images none.jpg --out-dir new",
     "no picture was colorized of the 1"),
    ("a photo that is text", "evaluate --ckpt run/last.pt --images text.txt --out-dir new",
     "no picture was colorized of the 1"),
    ("photos to nowhere",
     "evaluate --ckpt run/last.pt --images half/train/0.png --out-dir text.txt",
     "no picture was colorized of the 1"),
    ("photos of no name", "evaluate --ckpt run/last.pt --images= --out-dir new",
     "--images and --out-dir need names"),
    ("photos to no name", "evaluate --ckpt run/last.pt --images half/train --out-dir=",
     "--images and --out-dir need names"),
    ("weights of other flags", "evaluate --ckpt width.pt", "not those of its flags"),
    ("a run without its critic", "train_nogan --resume nocritic.pt --out new", "does not fit"),
    ("a checkpoint of odd contents", "evaluate --ckpt odd.pt", "not written by these scripts"),
]
if not torch.cuda.is_available():
    PROMISES.append(("a CUDA device that is absent", "train_unet --device cuda --out new",
                     "--device cuda cannot be used: use auto or cpu"))


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of runs, checkpoints and pictures, most of them damaged in some way."""
    world = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        make_world()
    return world


def make_world():
    common = "--dataset shapes --limit 20 --width 2 --epochs 2".split()
    train_unet.main([*common, "--out", "run"])
    train_unet.main([*common, "--out", "run2", "--seed", "1"])
    with open("run/last.pt", "rb") as file:
        whole = file.read()
    contents = {
        "text.txt": b"text", "empty.pt": b"", "cut.pt": whole[: len(whole) // 2],
        "flipped.pt": whole[:3000] + bytes([whole[3000] ^ 16]) + whole[3001:],
    }
    for name, value in contents.items():
        with open(name, "wb") as file:
            file.write(value)
    checkpoint = models.load_checkpoint("run/last.pt")
    torch.save({**checkpoint, "args": {**checkpoint["args"], "width": 3}}, "width.pt")
    torch.save({**checkpoint, "history": None}, "odd.pt")
    torch.save({**checkpoint, "history": [], "epoch": 0}, "begun.pt")
    train_nogan.main(["--dataset", "shapes", "--limit", "20", "--width", "2", "--out", "nogan",
                      *epochs(train_nogan.main, 1)])
    checkpoint = models.load_checkpoint("nogan/last.pt")
    del checkpoint["discriminator"]
    torch.save({**checkpoint, "epoch": 3}, "nocritic.pt")
    torch.save({"model": {}}, "other.pt")
    torch.save({"format": 99}, "newer.pt")
    torch.save({"format": 1}, "older.pt")
    torch.save({"format": 1, "script": "train_unet", "args": Malice()}, "evil.pt")
    os.makedirs("logonly")
    with open("logonly/log.csv", "w") as file:
        file.write("epoch")
    with zipfile.ZipFile("some.zip", "w") as archive:
        archive.writestr("readme", "text")

    def pictures(folder, good, bad):
        os.makedirs(folder)
        for i in range(good + bad):
            pixels = np.random.RandomState(i).randint(256, size=(32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{i}.png")
            if i >= good:
                os.truncate(f"{folder}/{i}.png", 500)

    pictures("empty/train", 0, 0)
    pictures("damaged/train", 0, 12)
    pictures("three/train", 3, 0)
    pictures("half/train", 10, 10)
    pictures("half/test", 10, 10)
    os.makedirs("archive")
    with open("archive/cifar-10-python.tar.gz", "wb") as file:
        file.write(b"\x1f\x8b" + bytes(1000))
    os.makedirs("unpacked/cifar-10-batches-py")
    with open("unpacked/cifar-10-batches-py/data_batch_1", "wb") as file:
        file.write(pickle.dumps({"data": []}))


def files_below(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("what, command, line", PROMISES, ids=[row[0] for row in PROMISES])
def test_promise(what, command, line, world, fails, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:1/cifar.tar.gz")
    before = files_below(world)
    script, *argv = command.split()
    assert line in fails(SCRIPTS[script].main, argv)
    assert files_below(world) == before


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_every_numeric_flag_refuses_absurd_values(script, capsys):
    needed = ["--ckpt", "a.pt"] if script is evaluate else []
    numeric = [action for action in script.build_parser()._actions if action.type]
    assert len(numeric) >= 3
    zero_is_fine = {"--seed", "--l1", "--feature-weight", "--saturation"}
    for action in numeric:
        flag = action.option_strings[0]
        for value in ["-1", "nan", "inf", "1e99", "abc", "", *["0"] * (flag not in zero_is_fine)]:
            with pytest.raises(SystemExit) as ended:
                script.build_parser().parse_args([*needed, f"{flag}={value}"])
            assert ended.value.code == 2
            assert f"argument {flag}: " in capsys.readouterr().err.splitlines()[-1], (flag, value)


@pytest.mark.parametrize("argv", [
    "--epochs 1.5", "--lr 1e9", "--batch-size 1", "--val-fraction 1", "--size 40", "--color hsv",
    "--split half", "--generator vgg", "--discriminator pixel", "--amp maybe", "--epochs",
])
def test_a_malformed_flag_keeps_argparses_own_error(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        train_gan.main(argv.split())
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_output_may_go_anywhere(world, monkeypatch):
    monkeypatch.chdir(world)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train_unet.main(["--resume", "run/last.pt"])
    assert "all 2 epochs are done" in out.getvalue()


def test_a_half_damaged_dataset_trains_on_the_other_half(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    train_unet.main(["--dataset", "folder", "--data-dir", "half", "--width", "1", "--epochs", "1",
                     "--out", str(tmp_path / "run")])
    errors = capsys.readouterr().err
    assert errors.count("skipped half/train/") == 10 and "decoded 10 of 20" in errors
    assert models.load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("photos", [[], ["--images", "half/train"]])
def test_exhausted_memory_in_evaluating_says_what_to_lower(photos, world, fails, monkeypatch):
    def full(*args):
        raise OUT_OF_MEMORY

    monkeypatch.chdir(world)
    monkeypatch.setattr(models.UNet, "forward", full)
    line = fails(evaluate.main, ["--ckpt", "run/last.pt", *photos, "--out-dir", "new"])
    assert "memory is exhausted: lower" in line and "--render-size" in line


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize("error", [
    OUT_OF_MEMORY, MemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("unable to mmap 9 bytes from file <last.pt>: Cannot allocate memory (12)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
])
def test_exhausted_memory_says_what_to_lower(script, error, tiny, fails, monkeypatch):
    def full(*args):
        raise error

    monkeypatch.setattr(models.UNet, "forward", full)
    assert "lower --batch-size, --width" in fails(lambda argv: tiny(script.main), [])


def test_a_checkpoint_truncated_anywhere_is_refused(world, tmp_path):
    whole, cut = (world / "run" / "last.pt").read_bytes(), tmp_path / "cut.pt"
    for size in np.random.RandomState(0).randint(len(whole), size=20):
        cut.write_bytes(whole[:size])
        with pytest.raises(models.RunError, match="cut.pt is damaged or no checkpoint"):
            models.load_checkpoint(cut)


def test_a_checkpoint_with_a_flipped_bit_is_refused_or_unchanged(world, tmp_path):
    whole, flipped = (world / "run" / "last.pt").read_bytes(), tmp_path / "flipped.pt"
    weights = models.load_checkpoint(world / "run" / "last.pt")["generator"]
    refused = 0
    for position in np.random.RandomState(0).randint(len(whole), size=50):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        flipped.write_bytes(changed)
        try:
            loaded = models.load_checkpoint(flipped)["generator"]
        except models.RunError:
            refused += 1
            continue
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert refused > 25


def test_a_pickle_does_not_run_its_code(world, monkeypatch):
    monkeypatch.chdir(world)
    with open("plain.pickle", "wb") as file:
        pickle.dump(Malice(), file)
    for name in ("evil.pt", "plain.pickle"):
        with pytest.raises(models.RunError):
            models.load_checkpoint(name)
    assert not os.path.exists("pwned")
    os.remove("plain.pickle")


# ------------------------------------------------------------------------- while a command runs


def test_a_folder_belongs_to_one_run_at_a_time(tiny, fails):
    run = tiny(train_unet.main)
    args = train_unet.build_parser().parse_args(["--out", str(run), "--overwrite"])
    before = files_below(run)
    with evaluate.Run("train_unet", args, None):
        line = fails(train_unet.main, ["--resume", run / "last.pt", "--epochs", 2])
        assert f"another run writes into {run}" in line
        assert files_below(run) == before
    train_unet.main(["--resume", str(run / "last.pt"), "--epochs", "2"])


def test_what_a_killed_run_was_writing_is_removed_by_the_next(tiny):
    run = tiny(train_unet.main)
    leftovers = [run / ".1234.new", run / "samples" / ".1234.new"]
    mine = [run / ".new", run / "samples" / "mine.png"]
    for path in leftovers + mine:
        path.write_bytes(b"half")
    train_unet.main(["--resume", str(run / "last.pt"), "--epochs", "2"])
    assert not any(path.exists() for path in leftovers) and all(path.exists() for path in mine)


def test_a_run_that_saves_nothing_leaves_no_folder(tmp_path, fails):
    out = tmp_path / "new" / "run"
    fails(train_unet.main, ["--dataset", "folder", "--data-dir", tmp_path / "no", "--out", out])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_found_before_the_pictures_are_read(
    tmp_path, fails, monkeypatch
):
    monkeypatch.setattr(data, "load_training", None)
    monkeypatch.setattr(os, "access", lambda *args: False)  # a superuser may write everywhere
    line = fails(train_unet.main, ["--dataset", "shapes", "--out", tmp_path])
    assert f"cannot write {tmp_path}" in line and "no permission" in line


def test_a_file_that_another_program_holds_is_tried_again_and_then_named(
    tmp_path, monkeypatch
):
    replace, refusals = os.replace, [PermissionError("in use")] * 3

    def held(*args):
        if refusals:
            raise refusals.pop()
        replace(*args)

    monkeypatch.setattr(models.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "replace", held)
    for contents in (b"old", b"new"):
        with models.replacing(tmp_path / "a") as file:
            file.write(contents)
    refusals += [PermissionError("in use")] * 25
    with pytest.raises(models.RunError, match="cannot write .*a: .*in use"):
        with models.replacing(tmp_path / "a") as file:
            file.write(b"newer")
    assert files_below(tmp_path) == {tmp_path / "a": b"new"}


def test_the_line_on_how_to_resume_can_be_pasted(tiny, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.Run, "log", interrupt)
    with pytest.raises(SystemExit):
        tiny(train_unet.main, out="a run")
    hint = capsys.readouterr().err.splitlines()[-1].partition("go on with ")[2]
    script, *argv = shlex.split(hint)[1:]
    assert script == "train_unet.py" and argv[0] == "--resume" and Path(argv[1]).is_file()


def test_a_reader_that_leaves_ends_the_run_without_a_traceback(tmp_path):
    script = Path(train_unet.__file__)
    command = [sys.executable, script, *"--dataset shapes --limit 60 --width 2".split(),
               "--epochs", "3", "--out", tmp_path / "run"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        errors = process.stderr.read()
    assert process.returncode == 141
    assert errors.splitlines()[-1].startswith("interrupted: go on with python train_unet.py")
    assert len(errors.splitlines()) == 1


def test_a_program_started_without_standard_streams_ends_as_with_them(monkeypatch, tmp_path):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        train_unet.main(["--dataset", "folder", "--data-dir", str(tmp_path / "nowhere"),
                         "--out", str(tmp_path / "run")])
    assert ended.value.code == 2 and None not in (sys.stdout, sys.stderr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_two_processes_that_save_into_one_file_never_damage_it(tmp_path):
    path, generator = tmp_path / "last.pt", models.UNet(3, width=8)

    def write():
        models.save_checkpoint(path, "train_unet", {"width": 8}, 1, [], generator=generator)

    write()
    children = [start(lambda: [write() for _ in range(1000)]) for _ in range(2)]
    for _ in range(20):
        models.load_checkpoint(path)  # raises where it is not whole
    for child in children:
        kill(child)


def test_ctrl_c_while_a_checkpoint_is_written_says_how_to_resume(tiny, monkeypatch, capsys):
    run = tiny(train_unet.main)
    before = files_below(run)

    class Interrupted(io.FileIO):
        def write(self, data):
            raise KeyboardInterrupt

    monkeypatch.setattr(models, "open", lambda path, mode: Interrupted(path, mode), raising=False)
    with pytest.raises(SystemExit) as ended:
        train_unet.main(["--resume", str(run / "last.pt"), "--epochs", "2"])
    assert ended.value.code == 130
    assert f"--resume {run / 'last.pt'}" in capsys.readouterr().err
    assert files_below(run) == before


@pytest.mark.parametrize("script", TRAINING)
def test_a_full_disk_leaves_the_last_epoch_whole(script, tiny, fails):
    resource = pytest.importorskip("resource")
    run = tiny(script.main)
    before = files_below(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[run / "last.pt"]) // 2, hard))
    try:
        line = fails(script.main, ["--resume", run / "last.pt", *epochs(script.main, 2)[-2:]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {run / 'last.pt'}: make room" in line and "File too large" in line
    assert files_below(run) == before
    script.main(["--resume", str(run / "last.pt"), *epochs(script.main, 2)[-2:]])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def start(task):
    """The process id of a child that runs `task`; it has imported everything already."""
    child = os.fork()
    if not child:
        try:
            task()
        finally:
            os._exit(1)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@needs_fork
@pytest.mark.parametrize("script", [
    train_unet, train_nogan, pytest.param(train_gan, marks=pytest.mark.slow),
])
def test_a_run_killed_at_any_moment_ends_in_the_same_weights(script, tiny, tmp_path):
    flags = epochs(script.main, 2 if script is train_nogan else 8)  # NoGAN has four stages
    whole = models.load_checkpoint(tiny(script.main, *flags) / "last.pt")
    child = start(lambda: tiny(script.main, *flags, out="killed"))
    killed = tmp_path / "killed" / "last.pt"
    moment = random.uniform(0.1, 0.7) * len(whole["history"])
    while not killed.exists() or models.load_checkpoint(killed)["epoch"] < moment:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it was killed"
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.03))
    kill(child)
    assert moment <= models.load_checkpoint(killed)["epoch"] < len(whole["history"])
    script.main(["--resume", str(killed)])
    resumed = models.load_checkpoint(killed)
    assert resumed.keys() == whole.keys()
    for network in {"generator", "discriminator", "feature_network"} & whole.keys():
        for name, tensor in whole[network].items():
            assert torch.equal(resumed[network][name], tensor), name


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_never_leaves_it_unreadable(tmp_path):
    path, generator = tmp_path / "last.pt", models.UNet(3, width=32)

    def write(epoch):
        with torch.no_grad():
            generator.head.weight.fill_(epoch)
        models.save_checkpoint(path, "train_unet", {"width": 32}, epoch, [], generator=generator)

    started = time.perf_counter()
    write(0)
    duration = time.perf_counter() - started
    cut, epoch = 0, 0
    for i in range(60):
        child = start(lambda: [write(epoch + n) for n in range(1, 1000)])
        time.sleep(2 * duration * (i + 0.5) / 60)  # spread over two writes
        kill(child)
        cut += any(leftover.unlink() or True for leftover in tmp_path.glob(".*.new"))
        checkpoint = models.load_checkpoint(path)  # raises where it is not whole
        assert checkpoint["epoch"] >= epoch
        epoch = checkpoint["epoch"]
        assert (checkpoint["generator"]["head.weight"] == epoch).all()
    assert cut >= 30  # in the middle of a write
    write(epoch + 1)
    assert os.listdir(tmp_path) == ["last.pt"]
