"""Several processes: they learn as one, go on as one, and end as one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import epochs

import data
import models
import train_gan
import train_nogan
import train_unet

SCRIPTS = [train_unet, train_gan, train_nogan]
WORKER = Path(__file__).with_name("torchrun_worker.py")
FLAGS = "--dataset shapes --limit 100 --batch-size 16 --width 2".split()
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


def torchrun(*words, processes=2, sabotage="", ok=True):
    """Run SCRIPT FLAG ... in some processes; gives what they printed: (standard output, error)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               processes, WORKER, *words]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SABOTAGE": sabotage},
    )
    assert (done.returncode == 0) == ok, done.stderr
    return done.stdout, done.stderr


def states(folder, processes=2):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def equal(one, two):
    if torch.is_tensor(one):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def train_and_resume(folder, processes):
    """Each script trains, into SCRIPT, and once more from its first epoch on, into SCRIPT-on."""
    words = []
    for script in SCRIPTS:
        whole = folder / script.__name__
        words += ["then", script.__name__, *FLAGS, *epochs(script.main, 2), "--keep-every", 1,
                  "--out", whole, "then", script.__name__, "--resume", whole / "epoch_001.pt",
                  "--out", f"{whole}-on"]
    out, _ = torchrun(*words[1:], processes=processes)
    assert out.count(": shapes 32x32") == 2 * len(SCRIPTS) == out.count(f"in {processes} processes")


def check_equal_weights(script, folder, processes):
    """All processes, of the whole run and of the resumed one, end in the same, bit for bit."""
    whole = states(folder / script.__name__, processes)
    for state in whole[1:] + states(folder / f"{script.__name__}-on", processes):
        assert equal(state["state"], whole[0]["state"])
    return whole


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    train_and_resume(folder, processes=2)
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_processes_have_equal_weights_and_are_resumed_bit_for_bit(script, two, fails):
    whole = check_equal_weights(script, two, processes=2)
    last = two / script.__name__ / "last.pt"
    assert equal(models.load_checkpoint(last)["generator"], whole[0]["state"]["generator"])
    line = fails(script.main, ["--resume", last])
    assert "is of 2 processes, not 1" in line
    if script is train_unet:
        check_the_first_gradient(whole)


def check_the_first_gradient(whole):
    """It is the mean of those of the two halves of a batch, computed in one process."""
    halves = []
    for rank in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "dist", SimpleNamespace(
                is_initialized=lambda: True, get_rank=lambda: rank, get_world_size=lambda: 2,
                all_reduce=lambda *args: None, ReduceOp=torch.distributed.ReduceOp))
            args = train_unet.build_parser().parse_args(FLAGS)
            training, validation, _ = data.load_training(args)
            assert (len(training.images), len(validation.images)) == (45, 5)
            batches = data.Batches(training.images, "rgb", args.batch_size, args.seed, shift=3)
        gray, target = next(batches.epoch(1))
        assert len(gray) == 8
        torch.manual_seed(0)
        unet = models.UNet(3, args.width).to(memory_format=torch.channels_last)
        torch.nn.functional.mse_loss(unet(gray), target).backward()
        halves.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
        before, after = whole[rank]["gradients"]
        assert torch.allclose(before, halves[rank], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(halves[0], halves[1], rtol=1e-3, atol=1e-6)
    assert torch.allclose(after, (halves[0] + halves[1]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_three_processes_are_resumed_bit_for_bit(tmp_path):
    train_and_resume(tmp_path, processes=3)
    for script in SCRIPTS:
        check_equal_weights(script, tmp_path, processes=3)


@pytest.mark.parametrize("flags, sabotage, line", [
    pytest.param(["--lr", "0"], "", "argument --lr", marks=pytest.mark.slow),
    pytest.param(["--data-dir", "nowhere", "--dataset", "folder"], "",
                 "there is no folder nowhere/train", marks=pytest.mark.slow),
    pytest.param(["--batch-size", "3"], "", "less than two pictures for each of 2 processes",
                 marks=pytest.mark.slow),
    ([], "nan", "not finite in epoch 2"),
])
def test_a_mistake_is_said_once_and_ends_all(flags, sabotage, line, tmp_path):
    _, errors = torchrun("train_unet", *FLAGS, *flags, "--epochs", 3,
                         "--out", tmp_path / "run", sabotage=sabotage, ok=False)
    assert errors.count(line) == 1, errors


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    torchrun("train_gan", *FLAGS, "--epochs", 50, "--out", tmp_path / "run",
             sabotage="kill", ok=False)
    assert models.load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


@pytest.mark.slow
def test_two_processes_learn_as_much_as_one(tmp_path):
    flags = "--dataset shapes --width 8 --batch-size 32 --epochs 2".split()
    torchrun("train_unet", *flags, "--out", tmp_path / "two")
    train_unet.main([*flags, "--out", str(tmp_path / "one")])
    one, two = (models.load_checkpoint(tmp_path / name / "last.pt")["history"][-1]["psnr"]
                for name in ("one", "two"))
    assert abs(one - two) < 0.5
