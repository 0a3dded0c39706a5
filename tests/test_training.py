"""The three scripts, run on made-up pictures: what they learn, write, resume and refuse."""

import csv
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import models
import train_gan
import train_nogan
import train_unet
from conftest import epochs

SCRIPTS = [train_unet, train_gan, train_nogan]
CIFAR10 = Path(__file__).resolve().parents[1] / "datasets" / "cifar10"


def weights(run):
    checkpoint = models.load_checkpoint(run / "last.pt")
    networks = ("generator", "generator_in_training", "discriminator", "feature_network")
    return {f"{network}.{name}": tensor for network in networks
            for name, tensor in checkpoint.get(network, {}).items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def log(run):
    return list(csv.DictReader((run / "log.csv").read_text().splitlines()))


def log_without_speed(run):
    return [{**row, "pictures_per_s": None} for row in log(run)]


# ------------------------------------------------------------------------------- what a run does


@pytest.mark.parametrize("script, flags", [
    (train_unet, ["--loss", "l1"]),
    (train_unet, ["--color", "lab", "--amp", "on"]),
    (train_gan, ["--discriminator", "patch", "--color", "lab"]),
    (train_gan, ["--discriminator", "image", "--amp", "on"]),
    (train_gan, ["--size", "48", "--l1", "10"]),
    (train_unet, ["--generator", "strided", "--split", "hue", "--color", "lab"]),
    (train_gan, ["--generator", "strided", "--split", "hue"]),
    (train_nogan, ["--generator", "strided", "--split", "hue", "--color", "lab"]),
    (train_nogan, ["--generator", "maxpool", "--discriminator", "patch", "--amp", "on"]),
    (train_nogan, ["--size", "48", "--split", "random", "--discriminator", "image"]),
])
def test_every_option_runs(script, flags, tiny, tmp_path):
    run = tiny(script.main, *flags)
    evaluate.main(["--ckpt", str(run / "last.pt"), "--figure", str(tmp_path / "f.png")])


@pytest.mark.parametrize("script", [train_unet, train_gan])
def test_a_run_prints_and_writes_what_the_readme_says(script, tiny, capsys):
    run = tiny(script.main, "--epochs", 2)
    first, *epochs = capsys.readouterr().out.splitlines()
    assert "54 to train on, 6 to validate, 0 gray ones dropped" in first
    assert "cpu" in first and "float32" in first and str(run) in first
    assert len(epochs) == 2
    for i, line in enumerate(epochs, 1):
        assert re.search(rf"^epoch {i}/2  .*validation psnr [\d.]+  colorfulness_ratio [\d.]+  "
                         r"[\d,]+ pictures/s  \d+m\d\ds left$", line)
    assert [row["epoch"] for row in log(run)] == ["1", "2"]
    assert f"{float(log(run)[1]['psnr']):.4g}" in epochs[1]
    grids = sorted((run / "samples").iterdir())
    assert [grid.name for grid in grids] == ["epoch_001.png", "epoch_002.png"]
    one, two = (Image.open(grid) for grid in grids)
    truth = (200, 0, 304, one.height)  # gray | output | truth: the third column does not change
    assert one.crop(truth).tobytes() == two.crop(truth).tobytes()
    assert one.tobytes() != two.tobytes()


def test_a_progress_line_fits_the_terminal(tiny, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tiny(train_gan.main)
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().out) if " step " in line]
    assert lines and all(len(line.removeprefix("\x1b[K")) < 40 for line in lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_validated_and_saved_is_the_average_of_the_weights_on_the_way(
    script, tiny, monkeypatch
):
    stages, validated = [], []  # a list a stage, of the weights after each of its steps
    update, end_epoch = models.update_average, evaluate.Run.end_epoch

    def spy(averaged, network, step):
        if step == 0:
            stages.append([averaged.head.weight.double().clone()])
        stages[-1].append(network.head.weight.detach().double().clone())
        update(averaged, network, step)

    monkeypatch.setattr(models, "update_average", spy)
    monkeypatch.setattr(evaluate.Run, "end_epoch", lambda run, *network, **metrics: (
        validated.extend(network) or end_epoch(run, *network, **metrics)))
    checkpoint = models.load_checkpoint(tiny(script.main, "--batch-size", 8) / "last.pt")
    assert len(stages) == (2 if script is train_nogan else 1)
    average, *on_the_way = stages[-1]
    assert len(on_the_way) == 7  # steps
    for step, network in enumerate(on_the_way):
        share = 9 / (10 + step)
        average = (1 - share) * average + share * network
    assert torch.allclose(checkpoint["generator"]["head.weight"].double(), average, atol=1e-6)
    assert torch.equal(checkpoint["generator_in_training"]["head.weight"].double(), on_the_way[-1])
    assert torch.equal(validated[-1].head.weight, checkpoint["generator"]["head.weight"])


def test_a_batch_larger_than_the_training_set_is_all_of_it_and_said_so(tiny, capsys):
    tiny(train_unet.main, "--batch-size", 500)
    first = capsys.readouterr().out.splitlines()[0]
    assert "one batch of all 54 (--batch-size 500 is more)" in first


def test_the_first_line_says_the_batch_that_processes_share(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "PROCESSES", 3)
    monkeypatch.setattr(models, "average", lambda values: None)
    args = train_unet.build_parser().parse_args(["--batch-size", "128", "--out", str(tmp_path)])
    run = evaluate.Run("train_unet", args, None)
    images = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(data, "dist", SimpleNamespace(
            is_initialized=lambda: True, get_world_size=lambda: 3))
        batches = data.Batches(images, "rgb", args.batch_size, seed=0)
    run.start(1, batches, images, 0)
    first = capsys.readouterr().out.splitlines()[0]
    assert "300 to train on" in first and "batch 126 in 3 processes" in first


def test_amp_on_a_cpu_trains_in_bfloat16(tiny, capsys, monkeypatch):
    seen = set()
    convolve = torch.nn.Conv2d.forward

    def spy(self, x):
        y = convolve(self, x)
        seen.add((torch.is_grad_enabled(), y.dtype))
        return y

    monkeypatch.setattr(torch.nn.Conv2d, "forward", spy)
    tiny(train_gan.main, "--amp", "on")
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}  # validation is float32
    assert "bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_batchnorm_never_sees_channels_last_where_it_fails_in_it(script, tiny, monkeypatch):
    assert data.memory_format(torch.device("mps")) == torch.contiguous_format
    assert data.memory_format(torch.device("cuda")) == torch.channels_last
    layouts, normalize = set(), F.batch_norm

    def spy(x, *args, **kwargs):
        if min(x.shape[1:]) > 1:  # else both layouts are one
            layouts.add(x.is_contiguous())
        return normalize(x, *args, **kwargs)

    monkeypatch.setattr(F, "batch_norm", spy)
    tiny(script.main)
    assert layouts == {False}
    layouts.clear()
    monkeypatch.setattr(data, "memory_format", lambda device: torch.contiguous_format)
    monkeypatch.setattr(models.Conv3x3, "forward", torch.nn.Conv2d.forward)  # as it is on MPS
    tiny(script.main, "--overwrite")
    assert layouts == {True}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loop_does_not_wait_for_the_device_at_each_step(script, tiny, monkeypatch):
    waits = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, original=original, name=name, **kwargs):
            if torch.is_grad_enabled():  # validation is not the loop
                waits.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)

    def waits_in(limit):
        waits.clear()
        tiny(script.main, "--limit", limit, "--batch-size", 2, "--width", 1, "--overwrite")
        return len(waits)

    assert waits_in(20) == waits_in(60)  # 9 and 27 steps an epoch; a look is due after 50


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_seed_gives_the_same_weights_and_another_seed_others(script, tiny):
    one, two = tiny(script.main, out="a"), tiny(script.main, out="b")
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(tiny(script.main, "--seed", 1, out="c")))


def test_the_discriminator_never_sees_real_and_generated_pictures_in_one_batch(tiny, monkeypatch):
    judged, painted = [], []

    def spy(network, seen):
        forward = network.forward

        def record(self, *inputs):
            if torch.is_grad_enabled():  # validation is not the loop
                seen.append(len(inputs[-1]))
            return forward(self, *inputs)

        monkeypatch.setattr(network, "forward", record)

    spy(models.Discriminator, judged)
    spy(models.UNet, painted)
    tiny(train_gan.main)
    assert painted == [16, 16, 16, 6]  # one forward of the generator a step
    assert judged == [16] * 9 + [6] * 3  # real, generated, generated again for G


@pytest.mark.parametrize("script", [train_gan, train_nogan])
def test_the_discriminator_sees_painted_colors_with_the_luma_of_real_ones(
    script, tiny, monkeypatch
):
    errors, forward = [], models.Discriminator.forward

    def spy(self, gray, color):
        errors.append((data.luma(color) - gray).abs().max().item())
        return forward(self, gray, color)

    monkeypatch.setattr(models.Discriminator, "forward", spy)
    tiny(script.main)
    assert len(errors) >= 12 and max(errors) < 1e-5


@pytest.mark.parametrize("script", [train_gan, train_nogan])
def test_each_adversarial_loss_has_the_pictures_and_the_target_of_its_formula(
    script, tiny, monkeypatch
):
    forward, cross_entropy = models.Discriminator.forward, F.binary_cross_entropy_with_logits
    verdicts, losses = [], []

    def judge(self, gray, color):
        in_bytes = 127.5 * (color + 1)  # of painted colours no whole numbers
        real = torch.allclose(in_bytes, in_bytes.round(), atol=1e-3)
        verdicts.append((forward(self, gray, color), real))
        return verdicts[-1][0]

    def spy(logits, target):
        [real] = [real for verdict, real in verdicts if verdict is logits]
        losses.append((real, round(target.unique().item(), 5)))
        return cross_entropy(logits, target)

    monkeypatch.setattr(models.Discriminator, "forward", judge)
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", spy)
    tiny(script.main)
    assert 0.5 < script.REAL_LABEL < 1
    of_d, of_g = [(True, script.REAL_LABEL), (False, 0)], [(False, 1)]  # G: painted as if real
    alone = of_d * 4 if script is train_nogan else []
    assert losses == alone + (of_d + of_g) * 4


def test_without_l1_the_discriminator_alone_teaches_the_generator(tiny):
    torch.manual_seed(0)
    first = models.UNet(3, width=4).head.weight
    trained = weights(tiny(train_gan.main, "--l1", 0))
    assert not torch.equal(trained["generator_in_training.head.weight"], first)


@pytest.mark.parametrize("script, flag, low, high", [
    (train_gan, "--l1", 0, 100), (train_gan, "--discriminator", "image", "patch"),
    (train_unet, "--loss", "mse", "l1"), (train_unet, "--lr", 1e-3, 1e-4),
])
def test_a_flag_of_the_method_changes_what_is_learned(script, flag, low, high, tiny):
    runs = [tiny(script.main, flag, value, out=f"{value}") for value in (low, high)]
    one, two = (models.load_checkpoint(run / "last.pt")["generator"] for run in runs)
    assert not all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_l1_keeps_the_generator_near_the_truth(tiny):
    errors = [float(log(tiny(train_gan.main, "--l1", l1, "--epochs", 8, out=f"{l1}"))[-1]["l1"])
              for l1 in (0, 100)]
    assert errors[1] < 0.9 * errors[0]


def test_the_learning_rate_is_constant_then_falls_to_nothing():
    rates = [models.learning_rate(0.1, step / 100) for step in range(100)]
    assert rates[:51] == [0.1] * 51
    assert rates[75] == pytest.approx(0.05) and rates[99] == pytest.approx(0.002)


def test_a_slow_cpu_is_told_what_takes_less(tiny, capsys, monkeypatch):
    tiny(train_unet.main, "--epochs", 2)
    assert "takes less" not in capsys.readouterr().out
    clock = iter(range(0, 10**9, 10_000))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    run = tiny(train_unet.main, "--epochs", 2, out="slow")
    assert "--amp on (where bfloat16 is fast) takes less" in capsys.readouterr().out
    train_unet.main(["--resume", str(run / "last.pt"), "--epochs", "4"])
    assert "takes less" not in capsys.readouterr().out  # no flag that would is let through
    tiny(train_unet.main, "--epochs", 2, "--amp", "on", out="slow and small")
    assert "hours on the CPU: --limit takes less" in capsys.readouterr().out
    monkeypatch.setattr(evaluate.Run, "end_epoch", lambda self, generator: None)
    tiny(train_unet.main, "--epochs", 2, "--limit", 8, "--batch-size", 2, "--width", 33,
         out="slow and wide")
    assert "hours on the CPU: --width 32 --amp on (where" in capsys.readouterr().out


# ---------------------------------------------------------------------------- what it learns


def test_a_unet_learns_the_colors_of_the_shapes(tmp_path):
    flags = "--dataset shapes --limit 2000 --width 8 --batch-size 16 --epochs 1".split()
    train_unet.main([*flags, "--out", str(tmp_path)])
    images = data.load_pictures("shapes", "", 32, train=False).images
    generator = models.load_generator(tmp_path / "last.pt")
    painted, _ = evaluate.measure(evaluate.colorize(generator, images, "rgb"))
    gray, _ = evaluate.measure(evaluate.colorize(None, images, "rgb"))
    assert painted["psnr"] > gray["psnr"] + 4


@pytest.mark.slow
@pytest.mark.parametrize("color", ["rgb", "lab"])
def test_a_pixel_loss_paints_sepia_and_a_gan_commits(color, tmp_path):
    import bench_sepia

    results = bench_sepia.main(["--out", str(tmp_path), "--color", color])
    (mse, mse_committed), (gan, gan_committed) = results["U-Net MSE"], results["GAN"]
    assert mse <= 0.4 and gan >= 0.7
    assert gan_committed > mse_committed


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"needs real pictures in {CIFAR10}")
def test_real_pictures_train(tmp_path):
    train_gan.main(["--dataset", "folder", "--data-dir", str(CIFAR10), "--limit", "200",
                    "--width", "4", "--epochs", "1", "--out", str(tmp_path)])
    assert len(log(tmp_path)) == 1


# ---------------------------------------------------------------------- interrupted and resumed


UNINTERRUPTED = {}  # by script: weights and log of two epochs a stage, made once


def interrupt_at(epoch, monkeypatch, error):
    """Raise `error` in the middle of an epoch."""
    log = evaluate.Run.log

    def stop(self, **losses):
        log(self, **losses)
        if self.epoch == epoch and self.epoch_steps == 2:
            raise error

    monkeypatch.setattr(evaluate.Run, "log", stop)


@pytest.mark.parametrize("script, at", [
    *[(script, at) for script in (train_unet, train_gan) for at in (1, 2)],
    *[(train_nogan, at) for at in range(2, 9, 2)],  # its four stages
])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    script, at, tiny, monkeypatch, capsys
):
    if script not in UNINTERRUPTED:
        run = tiny(script.main, *epochs(script.main, 2), out="whole")
        UNINTERRUPTED[script] = weights(run), log_without_speed(run)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        interrupt_at(at, patch, KeyboardInterrupt())
        tiny(script.main, *epochs(script.main, 2), out="cut")
    assert ended.value.code == 130
    error = capsys.readouterr().err
    cut = Path(re.search(r"--resume (.*)/last.pt", error)[1])
    assert f"python {script.__name__}.py --resume {cut / 'last.pt'}" in error
    assert models.load_checkpoint(cut / "last.pt")["epoch"] == at - 1

    with open(cut / "log.csv", "a") as file:
        file.write("a row that a crash left behind\n")
    script.main(["--resume", str(cut / "last.pt")])
    first = capsys.readouterr().out.splitlines()[0]
    assert (f"after epoch {at - 1}" in first) == (at > 1)
    whole_weights, whole_log = UNINTERRUPTED[script]
    assert same(weights(cut), whole_weights)
    assert log_without_speed(cut) == whole_log


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_float32_run_can_be_resumed_in_float16(script, tiny, monkeypatch):
    run = tiny(script.main)
    monkeypatch.setattr(models, "amp_dtype", lambda device, amp: torch.float16)
    last_stage = epochs(script.main, 2)[-2:]
    script.main(["--resume", str(run / "last.pt"), *last_stage, "--amp", "on"])
    checkpoint = models.load_checkpoint(run / "last.pt")
    assert checkpoint["epoch"] in (2, 5) and checkpoint["scaler"]["scale"] > 0


@pytest.mark.parametrize("script", [train_unet, train_gan])
def test_a_run_resumed_in_another_memory_format_goes_on_alike(script, tiny, monkeypatch):
    """As from a Mac to a GPU: Adam's moments must not lie otherwise than their weights."""
    with monkeypatch.context() as patch:
        patch.setattr(data, "memory_format", lambda device: torch.contiguous_format)
        run = tiny(script.main, "--epochs", 2, "--keep-every", 1)
    moved = run.parent / "moved"
    script.main(["--resume", str(run / "epoch_001.pt"), "--out", str(moved)])
    there, here = weights(run), weights(moved)
    assert all(torch.allclose(here[name], there[name], atol=1e-3) for name in there)


def test_resuming_goes_on_in_the_checkpoints_own_folder(tiny, fails, monkeypatch):
    run = tiny(train_unet.main)
    moved = run.rename(run.parent / "moved")
    tiny(train_unet.main, "--seed", 5)
    before = (run / "last.pt").read_bytes()
    train_unet.main(["--resume", str(moved / "last.pt"), "--epochs", "2"])
    assert len(log(moved)) == 2 and (run / "last.pt").read_bytes() == before
    monkeypatch.chdir(moved)
    train_unet.main(["--resume", "last.pt", "--epochs", "3"])
    assert len(log(moved)) == 3 and (run / "last.pt").read_bytes() == before
    assert f"{run} holds a run" in fails(train_unet.main, ["--resume", "last.pt", "--out", run])


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_linked_checkpoint_goes_on_in_the_folder_of_its_log(tiny, tmp_path):
    run, link, store = tiny(train_unet.main), tmp_path / "link.pt", tmp_path / "store"
    link.symlink_to(run / "last.pt")
    train_unet.main(["--resume", str(link), "--epochs", "2"])
    assert len(log(run)) == 2 and link.is_symlink() and not (tmp_path / "log.csv").exists()
    store.mkdir()
    (run / "last.pt").rename(store / "last.pt")  # as git-annex and others keep large files
    (run / "last.pt").symlink_to(store / "last.pt")
    train_unet.main(["--resume", str(run / "last.pt"), "--epochs", "3"])
    assert len(log(run)) == 3 and os.listdir(store) == ["last.pt"]


def numbered_pictures(folder, n):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.RandomState(i).randint(256, size=(32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.mark.parametrize("script", [train_unet, train_gan])
def test_resuming_on_other_pictures_is_refused(script, tiny, tmp_path, fails, monkeypatch):
    for name, n in (("a", 40), ("b", 41), ("copy", 40)):
        numbered_pictures(tmp_path / name / "train", n)
        (tmp_path / name / "test").mkdir()
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    flags = ["--dataset", "folder", "--data-dir", "a", "--limit", 100, "--width", 2]
    tiny(script.main, *flags)
    monkeypatch.chdir(run)  # from where `a` is another folder
    resume = ["--resume", "last.pt", "--epochs", "2"]
    before = (run / "last.pt").read_bytes()
    line = fails(script.main, [*resume, "--data-dir", tmp_path / "b"])
    assert "not those that last.pt was trained on" in line
    numbered_pictures(tmp_path / "a" / "train", 41)
    assert "not those that last.pt was trained on" in fails(script.main, resume)
    assert (run / "last.pt").read_bytes() == before
    (tmp_path / "a" / "train" / "040.png").unlink()
    script.main(resume)
    script.main(["--resume", "last.pt", "--epochs", "3", "--data-dir", str(tmp_path / "copy")])
    assert len(log(run)) == 3


def test_a_relative_data_dir_is_named_in_full_where_it_is_gone(tiny, tmp_path, fails, monkeypatch):
    numbered_pictures(tmp_path / "a" / "train", 40)
    monkeypatch.chdir(tmp_path)
    run = tiny(train_unet.main, "--dataset", "folder", "--data-dir", "a")
    (tmp_path / "a").rename(tmp_path / "b")
    line = fails(train_unet.main, ["--resume", run / "last.pt", "--epochs", 2])
    assert f"there is no folder {tmp_path / 'a' / 'train'}" in line


def test_a_run_resumed_over_another_one_leaves_none_of_its_samples(tiny):
    one, two = tiny(train_unet.main, out="a"), tiny(train_unet.main, "--epochs", 3, out="b")
    flags = ["--epochs", "2", "--out", str(two), "--overwrite"]
    train_unet.main(["--resume", str(one / "last.pt"), *flags])
    assert [path.name for path in (two / "samples").iterdir()] == ["epoch_002.png"]


def test_every_nth_checkpoint_is_kept_and_can_be_gone_back_to(tiny, fails, tmp_path):
    run = tiny(train_gan.main, "--epochs", 5, "--keep-every", 2)
    names = {"last.pt", "log.csv", "curves.png", "samples", "epoch_002.pt", "epoch_004.pt"}
    assert {path.name for path in run.iterdir()} == names
    whole, kept = weights(run), (run / "epoch_004.pt").read_bytes()
    back = ["--resume", run / "epoch_002.pt"]
    assert "--overwrite" in fails(train_gan.main, back)
    assert (run / "epoch_004.pt").read_bytes() == kept
    train_gan.main([*map(str, back), "--out", str(tmp_path / "other"), "--keep-every", "1"])
    assert same(weights(tmp_path / "other"), whole)
    names = sorted(path.name for path in (tmp_path / "other").glob("epoch_*.pt"))
    assert names == [f"epoch_00{i}.pt" for i in (2, 3, 4, 5)]
    (run / "epoch_best.pt").write_bytes(kept)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(4, patch, KeyboardInterrupt())
        train_gan.main([*map(str, back), "--overwrite"])
    names = sorted(path.name for path in run.glob("epoch_*.pt"))
    assert names == ["epoch_002.pt", "epoch_best.pt"]  # the latter is somebody's copy
    samples = sorted(path.name for path in (run / "samples").iterdir())
    assert samples == ["epoch_001.png", "epoch_002.png", "epoch_003.png"]


def test_a_kept_checkpoint_stays_as_it_was_when_its_run_goes_on(tiny):
    run = tiny(train_unet.main, "--epochs", 2, "--keep-every", 1)
    kept = (run / "epoch_002.pt").read_bytes()
    train_unet.main(["--resume", str(run / "last.pt"), "--epochs", "3"])
    assert (run / "epoch_002.pt").read_bytes() == kept and (run / "epoch_003.pt").exists()
    (run / "last.pt").write_bytes((run / "epoch_001.pt").read_bytes())  # back to there, by hand
    train_unet.main(["--resume", str(run / "last.pt"), "--epochs", "4"])
    assert models.load_checkpoint(run / "epoch_002.pt")["args"]["epochs"] == 4


def test_epochs_may_be_raised_and_other_flags_not_changed(tiny, tmp_path, fails, capsys):
    run = tiny(train_unet.main)
    resume = ["--resume", run / "last.pt"]
    assert "--lr 0.5 contradicts" in fails(train_unet.main, [*resume, "--lr", 0.5])
    assert "train_unet.py" in fails(train_gan.main, resume)
    train_unet.main([*map(str, resume), "--epochs", "3", "--out", str(tmp_path / "on")])
    assert "--epochs raised from 1 to 3" in capsys.readouterr().err
    assert len(log(tmp_path / "on")) == 3 and len(log(run)) == 1
    assert "--epochs 1 contradicts" in fails(
        train_unet.main, ["--resume", tmp_path / "on" / "last.pt", "--epochs", 1])


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
    tiny, tmp_path, fails, monkeypatch
):
    convert = data.to_gray_and_target

    def poisoned(images, color):
        gray, target = convert(images, color)
        poison = epochs[0] == 2 and torch.is_grad_enabled()
        return gray, target * float("nan") if poison else target

    epochs, order = [0], data.Batches.epoch
    monkeypatch.setattr(data.Batches, "epoch",
                        lambda self, epoch: epochs.__setitem__(0, epoch) or order(self, epoch))
    monkeypatch.setattr(data, "to_gray_and_target", poisoned)
    line = fails(lambda argv: tiny(train_gan.main, "--epochs", 3), [])
    assert "not finite in epoch 2" in line and "holds epoch 1" in line
    assert models.load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert len(log(tmp_path / "run")) == 1


def test_an_update_that_breaks_the_network_is_never_saved(tiny, tmp_path, fails, monkeypatch):
    end = evaluate.Run.end_epoch

    def broken(self, generator):
        generator.head.weight.data.fill_(float("nan"))
        end(self, generator)

    monkeypatch.setattr(evaluate.Run, "end_epoch", broken)
    assert "not finite in epoch 1" in fails(lambda argv: tiny(train_unet.main), [])
    assert models.load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 0


def test_a_folder_that_holds_a_run_is_not_touched_without_overwrite(tiny, fails):
    run = tiny(train_unet.main)
    before = (run / "last.pt").read_bytes()
    line = fails(lambda argv: tiny(train_unet.main, "--seed", 1), [])
    assert "--overwrite" in line and "--resume" in line
    assert (run / "last.pt").read_bytes() == before
    (run / "last.pt").rename(run / "best.pt")  # the log and the samples are still there
    samples = [path.read_bytes() for path in (run / "samples").iterdir()]
    assert "--overwrite" in fails(lambda argv: tiny(train_unet.main, "--seed", 1), [])
    assert samples == [path.read_bytes() for path in (run / "samples").iterdir()]
    tiny(train_unet.main, "--seed", 1, "--overwrite")
    assert (run / "last.pt").read_bytes() != before == (run / "best.pt").read_bytes()


def test_evaluation_takes_as_much_memory_at_every_size(tiny, monkeypatch):
    monkeypatch.setattr(data, "BATCH_PIXELS", 4 * 32 * 32)
    sizes = set()

    def spy(network):
        forward = network.forward

        def record(self, x):
            if not self.training and not torch.is_grad_enabled():
                sizes.add((len(x), x.shape[2]))
            return forward(self, x)

        monkeypatch.setattr(network, "forward", record)

    spy(models.UNet)
    spy(models.Classifier)
    for size in (32, 64, 80):
        tiny(train_nogan.main, "--limit", 30, "--val-fraction", 0.3, "--size", size,
             "--batch-size", 2, "--width", 1, out=f"{size}")
    assert max(n for n, side in sizes if side == 32) == 4
    assert {n for n, side in sizes if side != 32} <= {1, 2}  # 2: the critic's, as --batch-size


# --------------------------------------------------------------------------------- flags


def test_every_command_of_the_readme_and_the_docstrings_parses():
    root = Path(train_unet.__file__).parent
    commands = []
    for path in [root / "README.md", *root.glob("*.py")]:
        commands += re.findall(r"python (\w+)\.py (--[^#\n&`]*)", path.read_text(encoding="utf-8"))
    assert len(commands) > 8
    for script, flags in commands:
        if flags.strip() != "--help":
            sys.modules[script].build_parser().parse_args(flags.split())


def test_a_log_or_curves_that_another_program_holds_do_not_end_the_run(tiny, capsys):
    run = tiny(train_unet.main)
    (run / "curves.png").unlink()
    (run / "curves.png").mkdir()  # as good as held: it cannot be replaced
    tiny(train_unet.main, "--epochs", 2, "--overwrite")
    assert capsys.readouterr().err.count("warning: cannot write") == 2
    assert models.load_checkpoint(run / "last.pt")["epoch"] == len(log(run)) == 2
