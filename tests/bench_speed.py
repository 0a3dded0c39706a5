"""How fast the loops are, and what makes them so: against the usual notebook, and a step at a time.

    python tests/bench_speed.py

On the same made-up pictures and networks, in one process, repeats alternating, medians:

    notebook   PIL pictures, ToTensor, a shuffling DataLoader (the best of 0, 2 and 4 workers),
               float32, NCHW, batches of 64, Adam, and .item() of each loss at each step
    shipped    this project's script, as the log of its last epoch says
    the rest   the shipped loop with one thing of the notebook's: batch size, precision, layout,
               data path, or convolutions in the U-Net's bottom, too; and with one fixed batch,
               which shows the share of a step spent on data

Beside them the limit: the device's measured rate of matrix products in the loop's precision, over
the arithmetic of a picture, counted by torch. --json saves the table.
"""

import argparse
import copy
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Grayscale, ToTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import train_gan  # noqa: E402
import train_unet  # noqa: E402

SCRIPTS = {"unet": train_unet, "gan": train_gan}
WARM_UP = 3  # steps that are not timed


class PILPictures(Dataset):
    """What a notebook feeds its network: (gray, target) in [-1, 1] of one PIL picture at a time."""

    def __init__(self, images):
        self.pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        picture = self.pictures[i]
        return 2 * ToTensor()(Grayscale()(picture)) - 1, 2 * ToTensor()(picture) - 1


def loader(images, batch_size, workers):
    """Endless batches of a DataLoader."""
    batches = DataLoader(PILPictures(images), batch_size, shuffle=True, drop_last=True,
                         num_workers=workers, pin_memory=torch.cuda.is_available(),
                         persistent_workers=workers > 0)
    while True:
        yield from batches


def on_device(images, batch_size):
    """Endless batches of train_unet.py; train_gan.py's, shifted by 0 pixels, cost as much."""
    batches, epoch = data.Batches(images, "rgb", batch_size, seed=0, shift=3), 0
    while True:
        epoch += 1
        yield from batches.epoch(epoch)


def build_step(system, width, device, amp, layout, notebook, plain=False):
    """One step of training the U-Net or the GAN: a function of (gray, target).

    A `notebook` reads each loss at once, for its print-out, and knows no moving average. It has
    plain convolutions throughout, as a `plain` loop of this project's has.
    """
    autocast, scaler = models.mixed_precision(device, amp)
    generator = models.UNet(3, width).to(device, memory_format=layout)
    for layer in generator.modules():
        if (notebook or plain) and isinstance(layer, models.Conv3x3):
            layer.__class__ = torch.nn.Conv2d
    discriminator = models.Discriminator(3, width).to(device, memory_format=layout)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-3, fused=not notebook)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, fused=not notebook)
    averaged = copy.deepcopy(generator).eval().requires_grad_(False)
    bce, total = F.binary_cross_entropy_with_logits, [0]

    def update(optimizer, loss):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)

    def step(gray, target):
        gray, target = gray.to(device), target.to(device)
        with autocast:
            output = generator(gray)
        if system == "unet":
            losses = [F.mse_loss(output, target)]
            update(optimizer_g, losses[0])
        else:
            discriminator.requires_grad_(True)
            with autocast:
                shown = output if notebook else data.keep_gray(gray, output, "rgb")
                real, fake = discriminator(gray, target), discriminator(gray, shown.detach())
            losses = [bce(real, torch.full_like(real, 0.9)), bce(fake, torch.zeros_like(fake))]
            update(optimizer_d, losses[0] + losses[1])
            discriminator.requires_grad_(False)
            with autocast:
                logits = discriminator(gray, shown)
            losses += [bce(logits, torch.ones_like(logits)), F.l1_loss(output, target)]
            update(optimizer_g, losses[2] + 100 * losses[3])
        scaler.update()
        if notebook:
            total[0] += sum(loss.item() for loss in losses)
        else:
            models.update_average(averaged, generator, 1000)
            total[0] = total[0] + torch.stack([loss.detach() for loss in losses])

    return step


def rate(step, batches, pictures, device):
    """Pictures/s of about `pictures` of them, after WARM_UP steps."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        step(*next(batches))
    wait()
    seen, started = 0, time.perf_counter()
    while seen < pictures:
        gray, target = next(batches)
        step(gray, target)
        seen += len(gray)
    wait()
    return seen / (time.perf_counter() - started)


def shipped_rate(script, args, device):
    """Pictures/s of a script's last epoch of two, by its log."""
    with tempfile.TemporaryDirectory() as folder:
        script.main(["--dataset", "shapes", "--limit", str(args.pictures * 10 // 9),
                     "--epochs", "2", "--width", str(args.width), "--device", str(device),
                     "--amp", args.amp, "--out", f"{folder}/run"])
        with open(f"{folder}/run/log.csv", newline="") as file:
            return float(list(csv.DictReader(file))[-1]["pictures_per_s"])


def flop_a_picture(system, width):
    """Floating-point operations of a training step, forward and backward, for one picture."""
    device, n = torch.device("cpu"), 2
    step = build_step(system, width, device, "off", torch.channels_last, notebook=False)
    with FlopCounterMode(display=False) as counter:
        step(torch.zeros(n, 1, 32, 32), torch.zeros(n, 3, 32, 32))
    return counter.get_total_flops() / n


def matrix_rate(device, dtype, n=2048, repeats=5):
    """FLOP/s of the product of two n x n matrices, the best of some."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best = 0
    for _ in range(1 + repeats):
        started = time.perf_counter()
        (a @ b).sum().item()
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def measure(system, args, device):
    """The rows of one system's table: [{"name": ..., "pictures_per_s": ..., ...}]."""
    images = data.load_pictures("shapes", "", 32, train=True, limit=args.pictures).images
    there, last, first = images.to(device), torch.channels_last, torch.contiguous_format
    fixed = next(on_device(there, 128))

    def run(name, batches, amp=args.amp, layout=last, notebook=False, plain=False):
        step = build_step(system, args.width, device, amp, layout, notebook, plain)
        return name, lambda: rate(step, batches, args.pictures, device)

    runs = [run(f"notebook, {workers} workers", loader(images, 64, workers), "off", first, True)
            for workers in (0, 2, 4)]
    runs += [("shipped", lambda: shipped_rate(SCRIPTS[system], args, device)),
             run("its loop", on_device(there, 128)),
             run("its loop, batches of 64", on_device(there, 64)),
             run("its loop, float32", on_device(there, 128), amp="off"),
             run("its loop, NCHW", on_device(there, 128), layout=first),
             run("its loop, plain convolutions", on_device(there, 128), plain=True),
             run("its loop, DataLoader of 2 workers", loader(images, 128, 2)),
             run("its loop, one fixed batch", iter(lambda: fixed, None))]
    rates = {name: [] for name, _ in runs}
    for _ in range(args.repeats):
        for name, timed in runs:
            rates[name].append(timed())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    usual = max(value for name, value in medians.items() if name.startswith("notebook"))
    dtype = models.amp_dtype(device, args.amp) or torch.float32
    flop = flop_a_picture(system, args.width)
    medians[f"limit: {flop / 1e9:.2f} GFLOP a picture, {dtype}"] = matrix_rate(device, dtype) / flop
    return [{"system": system, "name": name, "pictures_per_s": value, "ratio": value / usual}
            for name, value in medians.items()]


@evaluate.one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, data.number(int, 1, 10**6)
    add("--system", choices=list(SCRIPTS), nargs="+", default=list(SCRIPTS))
    add("--width", type=count, default=64, help="(%(default)s)")
    add("--pictures", type=data.number(int, 128, 4500), default=2048,
        help="timed at once (%(default)s)")
    add("--repeats", type=count, default=3, help="(%(default)s)")
    add("--device", default="auto", help="auto is cuda, else mps, else cpu")
    add("--amp", choices=["auto", "on", "off"], default="auto", help="of this project's loop")
    add("--json", metavar="FILE", help="save the table")
    args = parser.parse_args(argv)
    device = models.choose_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, width {args.width}")
    rows = [row for system in args.system for row in measure(system, args, device)]
    for row in rows:
        print(f"{row['system']:5} {row['name']:50} {row['pictures_per_s']:10,.1f} pictures/s "
              f"{row['ratio']:6.2f} of the notebook's")
    if device.type == "cuda":
        print(f"peak memory of the last: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    if args.json:
        with models.replacing(args.json) as file:
            file.write((json.dumps(rows, indent=2) + "\n").encode())
    return rows


if __name__ == "__main__":
    main()
