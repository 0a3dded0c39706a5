"""Metrics and the comparison figure; training scripts validate, draw and log with the same code.

    python evaluate.py --ckpt runs/unet/last.pt runs/gan/last.pt
    python evaluate.py --ckpt runs/gan/last.pt --images photos --out-dir colorized
    python evaluate.py --ckpt runs/unet/last.pt runs/gan/last.pt --curves curves.png

The first measures each checkpoint's generator on the test pictures, beside a row `gray` (no colour
at all, the baseline), and draws gray | each model | truth: random pictures, then those on which the
last model gains and loses most against gray; `--json FILE` saves the rows. The second colorizes
photos, files or folders, at full resolution; the third draws how the runs went.

    mse, psnr, ssim          how close, pixel by pixel
    mae_ab, acc_2, acc_5     how close in colour (Nazeri et al., 2018)
    colorfulness, its ratio  how vivid (Hasler and Suesstrunk, 2003); a ratio of 1 is as the truth
    ab_jsd                   how far the colours' distribution is from the truth's
"""

import argparse
import collections
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import models

READ_EVERY = 50  # steps between two looks at the losses: each look waits for the device
FIGURE_RANDOM, FIGURE_EXTREME = 8, 3  # rows: random ones; best and worst ones, each
BAND_PIXELS = 2**16  # of a photo that are in colour conversion at once: they fit the cache
NO_CURVE = "epoch stage mse ssim mae_ab acc_2 acc_5 colorfulness ab_jsd pictures_per_s".split()
CURVE_COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # Okabe and Ito's


# ---------------------------------------------------------------------------------------- metrics
# RGB is float32 (N, 3, H, W) in [0, 1]; each function returns one value a picture, (N,).


def mse(output, truth):
    """Mean squared error over channels and pixels."""
    return ((output - truth) ** 2).mean(dim=(1, 2, 3))


def psnr(output, truth):
    """Peak signal-to-noise ratio in dB, at most 60."""
    return (-10 * torch.log10(mse(output, truth))).clamp(max=60)


def ssim(output, truth):
    """Structural similarity (Wang et al., 2004): Gaussian 11x11 windows, full ones only."""
    distance = torch.linspace(-5, 5, 11, dtype=truth.dtype, device=truth.device)
    row = torch.softmax(-(distance**2) / (2 * 1.5**2), dim=0).expand(3, 1, 1, 11)  # Gaussian, sum 1

    def blur(x):  # (N, 3, H, W) -> (N, 3, H - 10, W - 10), first sideways, then downwards
        return F.conv2d(F.conv2d(x, row, groups=3), row.mT, groups=3)

    mean_o, mean_t = blur(output), blur(truth)
    var_o, var_t = blur(output**2) - mean_o**2, blur(truth**2) - mean_t**2
    covariance = blur(output * truth) - mean_o * mean_t
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_o * mean_t + c1) / (mean_o**2 + mean_t**2 + c1)
    structure = (2 * covariance + c2) / (var_o + var_t + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def mae_ab(lab, true_lab):
    """Mean absolute error of a* and b*, from L*a*b*."""
    return (lab - true_lab)[:, 1:].abs().mean(dim=(1, 2, 3))


def accuracy(lab, true_lab, percent):
    """Share of pixels whose L*, a*, b* all lie within `percent` of their ranges (Nazeri et al.)."""
    ranges = lab.new_tensor([100, 220, 220]).view(1, 3, 1, 1)
    near = (lab - true_lab).abs() <= percent / 100 * ranges
    return near.all(dim=1).float().mean(dim=(1, 2))


def colorfulness(rgb):
    """Colourfulness M3 of Hasler and Suesstrunk, 2003, on the scale of 0 to 255; 0 is gray."""
    r, g, b = (255 * rgb).flatten(2).unbind(1)  # (N, H * W) each
    rg, yb = r - g, (r + g) / 2 - b
    spread = torch.sqrt(rg.var(1, correction=0) + yb.var(1, correction=0))
    return spread + 0.3 * torch.sqrt(rg.mean(1) ** 2 + yb.mean(1) ** 2)


def ab_histogram(lab):
    """Counts (23 * 23,) of a*b* in bins of width 10 centred on multiples of 10."""
    bins = torch.floor(lab[:, 1:] / 10 + 0.5).long().clamp(-11, 11) + 11
    return torch.bincount((23 * bins[:, 0] + bins[:, 1]).flatten(), minlength=23 * 23)


def jensen_shannon(counts, other_counts):
    """Jensen-Shannon divergence of two histograms in bits: 0 for equal, 1 for disjoint ones."""
    p, q = counts.double() / counts.sum(), other_counts.double() / other_counts.sum()
    of_p, of_q, of_mean = (torch.special.entr(x).sum() for x in (p, q, (p + q) / 2))  # entropies
    return (of_mean - (of_p + of_q) / 2).item() / math.log(2)


def measure(pairs):
    """All metrics over (output, truth) batches of RGB, as (dict of floats, psnr a picture (N,))."""
    rows, histograms = [], 0
    for output, truth in pairs:
        lab, true_lab = data.rgb_to_lab(output), data.rgb_to_lab(truth)
        columns = {
            "mse": mse(output, truth), "psnr": psnr(output, truth), "ssim": ssim(output, truth),
            "mae_ab": mae_ab(lab, true_lab),
            "acc_2": accuracy(lab, true_lab, 2), "acc_5": accuracy(lab, true_lab, 5),
            "colorfulness": colorfulness(output), "colorfulness_of_truth": colorfulness(truth),
        }
        rows.append(torch.stack(list(columns.values()), dim=1).cpu().double())
        histograms = histograms + torch.stack([ab_histogram(lab), ab_histogram(true_lab)]).cpu()
    rows = torch.cat(rows)
    metrics = dict(zip(columns, rows.mean(dim=0).tolist()))
    of_truth = metrics.pop("colorfulness_of_truth") or math.nan  # 0 where all of it is gray
    metrics["colorfulness_ratio"] = metrics["colorfulness"] / of_truth
    metrics["ab_jsd"] = jensen_shannon(*histograms)
    return metrics, rows[:, list(columns).index("psnr")]


def saturated(rgb, factor):
    """RGB (N, 3, H, W) in [0, 1] with a* and b* times `factor`, as far as its L* allows."""
    lightness, ab = data.rgb_to_lab(rgb).split([1, 2], dim=1)
    return data.lab_to_rgb_of_its_lightness(torch.cat([lightness, factor * ab], dim=1))


@torch.inference_mode()
def colorize(generator, images, color, batch_size=None, saturation=1.0):
    """Yield (output, truth) batches of RGB in [0, 1] for uint8 images (N, 3, H, W).

    `generator` is put in eval mode; its device is where it happens. None stands for no colour at
    all: Rec. 601 luma in every channel. `saturation` multiplies a* and b* of what is painted.
    """
    device = images.device if generator is None else next(generator.eval().parameters()).device
    for batch in data.in_batches(images, batch_size):
        batch = batch.to(device)
        truth = batch.float() / 255
        if generator is None:
            yield data.luma(truth).expand_as(truth), truth
        else:
            gray, _ = data.to_gray_and_target(batch, color)
            output = data.to_rgb(gray, generator(gray), color)
            yield (output if saturation == 1 else saturated(output, saturation)), truth


def save_pictures(pairs, side, folder):
    """Pass (output, truth) batches on, and write side 0 (or 1, the truth) to a folder as PNGs."""
    folder.mkdir(parents=True)
    numbers = itertools.count()
    for pair in pairs:
        for picture in (255 * pair[side]).round().to(torch.uint8).permute(0, 2, 3, 1).cpu():
            Image.fromarray(picture.numpy()).save(folder / f"{next(numbers):05d}.png")
        yield pair


# ---------------------------------------------------------------------------------------- figures


def draw_figure(columns, row_labels=()):
    """A PIL picture of `columns`, a list of (title, RGB (N, 3, H, W) in [0, 1]), side by side.

    `row_labels`, one a row, stand at the left, where they change.
    """
    font, gap, top = ImageFont.load_default(13), 4, 22  # top: the titles' height
    left = 62 if row_labels else gap
    cells = torch.stack([images.cpu() for _, images in columns], dim=1)  # (rows, columns, 3, H, W)
    scale = max(1, 96 // cells.shape[4])  # small pictures are enlarged to about 96 pixels
    cells = cells.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    cells = F.pad((255 * cells.clamp(0, 1)).round().byte(), (0, gap, 0, gap), value=255)
    cell_h, cell_w = cells.shape[3:]  # below, the cells become (rows, H, columns, W, 3), a picture
    grid = Image.fromarray(cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy())
    figure = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    figure.paste(grid, (left, top))
    draw = ImageDraw.Draw(figure)
    for i, (title, _) in enumerate(columns):
        while draw.textbbox((0, 0), title, font)[2] > cell_w - gap:  # a long name's beginning
            title = title.rstrip("…")[:-1] + "…"
        draw.text((left + i * cell_w, 3), title, "black", font)
    for j, label in enumerate(row_labels):
        if j == 0 or label != row_labels[j - 1]:
            draw.text((gap, top + j * cell_h), label, "black", font)
    return figure


def draw_comparison(generators, images, row_labels=(), saturation=1.0):
    """gray | each model | truth: `generators` are (title, generator, color), taken one by one."""
    columns = []
    for title, generator, color in itertools.chain([("gray", None, "rgb")], generators):
        outputs, truths = zip(*colorize(generator, images, color, saturation=saturation))
        columns.append((title, torch.cat(outputs)))
        del generator  # before the next one is loaded
    return draw_figure([*columns, ("truth", torch.cat(truths))], row_labels)


def draw_curves(runs):
    """A PIL picture of how runs went, (title, rows of log.csv) each, laid over one another.

    A panel for each loss, accuracy, psnr and colorfulness_ratio; in it, gray lines begin stages.
    """
    rows = [row for _, history in runs for row in history]
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in NO_CURVE))
    figure = Image.new("RGB", (1920, 60 + 420 * math.ceil(len(columns) / 3)), "white")  # halved
    draw, font, soft = ImageDraw.Draw(figure), ImageFont.load_default(24), "#8b949e"
    runs = [(*run, color) for run, color in zip(runs, itertools.cycle(CURVE_COLORS))]
    left, last = 100, max(row["epoch"] for row in rows)
    for title, _, color in runs:
        draw.text((left, 16), title, color, font)
        left = draw.textbbox((left, 16), title, font)[2] + 40
    for i, name in enumerate(columns):
        left, top = 100 + 640 * (i % 3), 120 + 420 * (i // 3)
        low, high = (end(row[name] for row in rows if name in row) for end in (min, max))

        def point(epoch, value):  # in a panel of 500x260
            return (left + 500 * (epoch - 1) / max(1, last - 1),
                    top + 260 * (high - value) / (high - low or 1))

        draw.text((left, top - 12), name, "black", font, anchor="ls")
        for value in {low, (low + high) / 2, high}:
            y = point(1, value)[1]
            draw.line([(left, y), (left + 500, y)], "#d8dee4", 2)
            draw.text((left - 16, y), f"{value:.3g}", soft, font, anchor="rm")
        for epoch in {1, (1 + last) // 2, last}:
            text = f"epoch {epoch}" if epoch == 1 else str(epoch)
            draw.text((point(epoch, low)[0], top + 270), text, soft, font, anchor="ma")
        for _, history, color in runs:
            stages = itertools.groupby(history, key=lambda row: row.get("stage"))
            for j, (stage, part) in enumerate((stage, list(part)) for stage, part in stages):
                points = [point(row["epoch"], row[name]) for row in part if name in row]
                if stage and points:
                    x = point(part[0]["epoch"] - 0.5 * (j > 0), low)[0]
                    draw.line([(x, top), (x, top + 260)], soft, 2)
                    draw.text((min(x, left + 425), top + 300 + 26 * (j % 2)), stage, soft, font)
                draw.line(points, color, 4)
                for x, y in points:
                    draw.ellipse((x - 5, y - 5, x + 5, y + 5), color)
    return figure.reduce(2)


def save_picture(picture, path):
    """Save a PIL picture in the format that the suffix names, without one as PNG."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower() or ".png")
    if kind not in Image.SAVE:
        raise models.RunError(f"{path} is no name for a picture: choose the suffix .png")
    with models.replacing(path) as file:
        picture.save(file, kind)


# -------------------------------------------------------------------------------- a training run


def add_flags(parser, out):
    """The flags of every training script about the U-Net, the machine and the run folder."""
    add = parser.add_argument
    add("--generator", choices=list(models.GENERATORS), default="maxpool",
        help="the U-Net's way down: pooling, or strided convolutions (%(default)s)")
    add("--width", type=data.number(int, 1, 512), default=64,
        help="channels of the networks' first layers; time grows with its square (%(default)s)")
    add("--device", default="auto", help="auto is cuda, else mps, else cpu (%(default)s)")
    add("--amp", choices=["auto", "on", "off"], default="auto",
        help="mixed precision: auto is on with CUDA and off elsewhere (%(default)s)")
    add("--out", default=out, metavar="DIR", help="the run folder (%(default)s)")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--keep-every", type=data.number(int, 1, 10**5), metavar="N", help="also keep epoch_NNN.pt")
    add("--resume", metavar="CKPT", help="go on from a last.pt, with all its flags, in its folder")


class Run:
    """What a training run prints, logs and keeps in its folder; the training is in the scripts.

    train_unet.py shows its use: start, keep, stage, log, end_epoch. Several stages have names, and
    their epochs are counted through. Raises RunError when the folder holds another run or cannot be
    written, or a loss is not finite.
    """

    def __init__(self, script, args, checkpoint):
        self.script, self.args, self.out = script, args, Path(args.out)
        self.last, self.checkpoint = self.out / "last.pt", checkpoint
        self.history = checkpoint["history"] if checkpoint else []  # rows of log.csv
        self.done = checkpoint["epoch"] if checkpoint else 0
        self.stage_name, self.until = None, 0  # of the stage begun last; its last epoch
        if not args.out:
            raise models.RunError("--out needs a name: the current folder is .")
        if args.batch_size < 2 * models.PROCESSES:
            raise models.RunError(f"--batch-size {args.batch_size} is less than two pictures for "
                                  f"each of {models.PROCESSES} processes: raise it")
        self.is_first = models.RANK == 0  # which alone validates, draws and saves
        self.saved = args.resume and Path(args.resume).resolve() == self.last.resolve()
        kept = ("last.pt", "epoch_*.pt", "log.csv", "curves.png", "samples")
        new = not (self.saved or args.overwrite) and self.is_first
        if new and any(any(self.out.glob(name)) for name in kept):
            raise models.RunError(f"{self.out} holds a run: go on with --resume {self.last}, "
                                  "replace it with --overwrite, or choose another --out")

    def __enter__(self):
        self.new_folders = [path for path in (self.out, *self.out.parents) if not path.exists()]
        self.lock = models.claim(self.out) if self.is_first else None
        models.join_processes()
        return self

    def __exit__(self, kind, error, traceback):
        if not self.is_first:
            return
        os.close(self.lock)
        if not self.saved:
            for folder in self.new_folders:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()
        if kind and sys.stdout.isatty():
            print()  # below the progress line
        if kind in (KeyboardInterrupt, BrokenPipeError):
            start = "torchrun (as before)" if models.PROCESSES > 1 else "python"
            resume = f"go on with {start} {self.script}.py --resume {shlex.quote(str(self.last))}"
            print("interrupted:", resume if self.saved else "nothing is saved yet", file=sys.stderr)

    def start(self, epochs, batches, validation, dropped):
        """Refuse other pictures on --resume, print what the run is on; `epochs`: of all stages."""
        self.epochs, self.batches, self.validation = epochs, batches, validation
        self.device, args, processes = batches.images.device, self.args, models.PROCESSES
        count, batch = processes * len(batches.images), processes * batches.batch_size
        self.pictures = data.fingerprint(batches.images)
        if self.checkpoint and self.checkpoint.get("pictures", self.pictures) != self.pictures:
            raise models.RunError("the training pictures are not those that "
                                  f"{args.resume} was trained on: restore them, or start a new run")
        dtype, name = models.amp_dtype(self.device, args.amp) or torch.float32, self.device.type
        name = torch.cuda.get_device_name(self.device) if name == "cuda" else name
        batch = f"batch {batch}" + f" in {processes} processes" * (processes > 1)
        if args.batch_size > count:
            batch = f"one batch of all {count} (--batch-size {args.batch_size} is more)"
        print(f"{self.script}: {args.dataset} {args.size}x{args.size} {args.color}, "
              f"{count:,} to train on, {len(validation):,} to validate, {dropped:,} gray ones "
              f"dropped; {batch}; {name}, {str(dtype).removeprefix('torch.')}; into {self.out}"
              + f", after epoch {self.done}" * bool(self.done), flush=True)
        if self.done >= epochs:
            print(f"all {epochs} epochs are done: raise their number to train on")

    def keep(self, **state):
        """Networks, optimizers and the scaler for the checkpoints; --resume restores them here."""
        self.state = state
        if self.checkpoint:
            models.restore(self.checkpoint, **state)

    def stage(self, epochs, name=None, about=None, **state):
        """Yield the epochs of a stage that are still to do; checkpoints keep its `state`, too."""
        first, self.until = self.until + 1, self.until + epochs
        start = max(first, self.done + 1)
        if start > self.until:
            return
        if self.checkpoint and self.checkpoint.get("stage") == name:  # resumed in its midst
            models.restore(self.checkpoint, **state)
        self.stage_name, self.stage_state = name, state
        if name:
            print(f"{name}, epochs {first} to {self.until}: {about}", flush=True)
        if self.checkpoint or not self.saved:
            self.save(self.done)  # before the first step, so that there is always one to resume
            self.checkpoint = None
        per_epoch = len(self.batches)
        self.steps, self.stage_steps = (start - first) * per_epoch, epochs * per_epoch
        self.resumed_at, self.started = self.steps, time.perf_counter()
        for self.epoch in range(start, self.until + 1):
            self.sums, self.epoch_steps, self.epoch_started = 0, 0, time.perf_counter()
            yield self.epoch

    @property
    def progress(self):
        """The share of the stage's steps that are done, from 0 to 1."""
        return self.steps / self.stage_steps

    def log(self, **losses):
        """Add up losses, now and then read and check them; last, average BatchNorm's statistics."""
        self.sums = self.sums + torch.stack([loss.detach() for loss in losses.values()])
        self.steps, self.epoch_steps = self.steps + 1, self.epoch_steps + 1
        if self.epoch_steps == len(self.batches):  # BatchNorm's statistics are each process's own
            kept = {**self.state, **self.stage_state}.values()
            networks = [x for x in kept if isinstance(x, torch.nn.Module)]
            models.average([b for x in networks for b in x.buffers() if b.is_floating_point()])
        elif self.epoch_steps % READ_EVERY:
            return
        means = self.sums / self.epoch_steps
        models.average([means])
        self.losses = dict(zip(losses, means.tolist()))  # of the epoch so far; waits for the device
        self._stop_unless_finite(self.losses)
        if sys.stdout.isatty():
            line = (f"epoch {self.epoch}/{self.epochs} step {self.epoch_steps}/"
                    f"{len(self.batches)}  {_numbers(self.losses)}")
            columns = shutil.get_terminal_size().columns  # a longer line could not be cleared
            print(f"\r\x1b[K{line[: columns - 1]}", end="", flush=True)
        first_look = not self.args.resume and self.steps == self.epoch_steps <= READ_EVERY
        if first_look and self.device.type == "cpu" and self._seconds_left() > 3600:
            faster = ["--width 32"] * (self.args.width > 32)
            faster += ["--amp on (where bfloat16 is fast)"] * (self.args.amp != "on")
            print(f"{self.stage_name or 'this'} will take about {self._seconds_left() / 3600:.1f} "
                  f"hours on the CPU: {' '.join(faster) or '--limit'} takes less", flush=True)

    def _seconds_left(self):
        a_step = (time.perf_counter() - self.started) / (self.steps - self.resumed_at)
        return a_step * (self.stage_steps - self.steps)

    def _stop_unless_finite(self, values):
        if not all(map(math.isfinite, values.values())):
            raise models.RunError(
                f"not finite in epoch {self.epoch}: {_numbers(values)}: start anew at a lower rate "
                f"or leave 16 bits with --amp off; {self.last} holds epoch {self.epoch - 1}")

    def end_epoch(self, generator=None, **metrics):
        """Validate a generator and draw what it paints, or take `metrics`; print, log and save."""
        if not self.is_first:
            return
        pictures = len(self.batches.images) * models.PROCESSES
        rate = pictures / (time.perf_counter() - self.epoch_started)
        shown = metrics
        if generator:
            metrics, _ = measure(colorize(generator, self.validation, self.args.color))
            shown = {name: metrics[name] for name in ("psnr", "colorfulness_ratio")}
        self._stop_unless_finite(metrics)
        row = {"epoch": self.epoch} | ({"stage": self.stage_name} if self.stage_name else {})
        self.history.append(row | self.losses | metrics | {"pictures_per_s": rate})
        start = "\r\x1b[K" if sys.stdout.isatty() else ""
        minutes, seconds = divmod(round(self._seconds_left()), 60)
        print(f"{start}epoch {self.epoch}/{self.epochs}  {_numbers(self.losses)}  validation "
              f"{_numbers(shown)}  {rate:,.0f} pictures/s  {minutes}m{seconds:02d}s left"
              + " in this stage" * bool(self.stage_name), flush=True)
        if generator:  # of evenly spaced pictures, because --split hue has sorted them
            images = self.validation[:: max(1, len(self.validation) // FIGURE_RANDOM)]
            grid = draw_comparison([("output", generator, self.args.color)], images[:FIGURE_RANDOM])
            save_picture(grid, self.out / "samples" / f"epoch_{self.epoch:03d}.png")
        self.save(self.epoch)

    def save(self, epoch):
        """Write last.pt, and epoch_NNN.pt where it is kept, then log.csv and curves.png."""
        if not self.is_first:
            return
        args = {k: v for k, v in vars(self.args).items() if k not in ("resume", "overwrite")}
        args |= {"data_dir": os.path.abspath(self.args.data_dir), "processes": models.PROCESSES}
        save_as = functools.partial(models.save_checkpoint, script=self.script, args=args,
                                    epoch=epoch, history=self.history, stage=self.stage_name,
                                    pictures=self.pictures, **self.state, **self.stage_state)
        save_as(self.last)
        if not self.saved:
            self._remove_other_epochs(epoch)
        self.saved, kept = True, self.out / f"epoch_{epoch:03d}.pt"
        if self.args.keep_every and epoch and epoch % self.args.keep_every == 0:
            if epoch > self.done or not kept.exists():  # --resume's first save finds it
                save_as(kept)
        table = io.StringIO(newline="")
        columns = dict.fromkeys(name for row in self.history for name in row)
        writer = csv.DictWriter(table, columns or ["epoch"])
        writer.writeheader()
        writer.writerows(self.history)
        try:  # Windows refuses while a spreadsheet or a viewer has them open
            with models.replacing(self.out / "log.csv") as file:
                file.write(table.getvalue().encode())
            if self.history:
                curves = draw_curves([(self.out.resolve().name, self.history)])
                save_picture(curves, self.out / "curves.png")
        except models.RunError as error:
            print(f"warning: {error}", file=sys.stderr)

    def _remove_other_epochs(self, epoch):
        """With --overwrite: what is of another run, or of later epochs."""
        with contextlib.suppress(OSError):
            (self.out / "curves.png").unlink()
        resumed_in = self.args.resume and Path(self.args.resume).resolve().parent
        for path in [*self.out.glob("samples/epoch_*.png"), *self.out.glob("epoch_*.pt")]:
            number = path.stem.removeprefix("epoch_")
            if number.isdigit() and not (resumed_in == self.out.resolve() and int(number) <= epoch):
                path.unlink()


def _numbers(values):
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def one_line_errors(main):
    """Make main(argv) end a user's mistake in one line and exit status 2, and Ctrl-C in 130."""

    @functools.wraps(main)
    def wrapped(argv=None):
        if None in (sys.stdout, sys.stderr):  # some services start without them
            sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
        if hasattr(sys.stdout, "reconfigure"):  # a file's name may have any letters
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            result = main(argv)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            return result
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except BrokenPipeError:  # the reader of standard output is gone, as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except (RuntimeError, MemoryError) as error:
            words = "allocate memory", "to allocate", "out of memory", "ALLOC"  # torch's
            if not isinstance(error, MemoryError) and not any(x in str(error) for x in words):
                raise
            message = "memory is exhausted: lower --batch-size, --width, --size or --render-size"
        except (data.DataError, models.RunError) as error:
            message = error
        except OSError as error:
            message = f"{error}: check the path and the free space"
        if models.RANK > 0:
            time.sleep(20)  # until then, the first one has ended it if it met the mistake, too
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)

    return wrapped


# ------------------------------------------------------------------------------------ own photos


@torch.inference_mode()
def colorize_photo(generator, color, photo, render_size, saturation=1.0):
    """A PIL RGB picture of any size in the generator's colours and its own lightness.

    The generator sees it squeezed to `render_size` squared, as in DeOldify; its a*b*, times
    `saturation`, are stretched back smoothly and laid under the picture's own L*.
    """
    small = photo.resize((render_size, render_size), Image.Resampling.LANCZOS, reducing_gap=3)
    small = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    gray, _ = data.to_gray_and_target(small, color)
    output = generator(gray.to(next(generator.parameters()).device)).cpu()
    chroma = saturation * data.rgb_to_lab(data.to_rgb(gray, output, color))[:, 1:]
    stretch = functools.partial(F.interpolate, mode="bicubic", antialias=True)
    chroma = stretch(chroma, (photo.height, render_size))  # downwards; sideways in bands, below
    pixels = np.array(photo)
    band = max(1, BAND_PIXELS // photo.width)  # memory is for a band, not for the whole photo
    for top in range(0, photo.height, band):
        rows = torch.from_numpy(pixels[top : top + band]).permute(2, 0, 1)[None]
        ab = stretch(chroma[:, :, top : top + band], rows.shape[2:])
        lightness = data.rgb_to_lab(rows / 255)[:, :1]
        rgb = data.lab_to_rgb_of_its_lightness(torch.cat([lightness, ab], dim=1))
        pixels[top : top + band] = (255 * rgb).round()[0].permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def list_photos(inputs, out_dir):
    """(photo, output) paths: outputs keep the path inside an input folder, with the suffix .png.

    A name that two photos could have is given to neither: both keep more of their own, as in
    x.jpg.png and x.png.png, then the input folder's name, then all of the path.
    """
    photos = {}
    for given in map(Path, inputs):
        folder, found = given.parent, [given]
        if given.is_dir():
            folder, found = given, data.picture_paths(given)
            if _real(given) in _real(out_dir).parents:  # without what it has painted earlier
                found = [photo for photo in found if _real(out_dir) not in _real(photo).parents]
        for photo in found:
            inside, full = photo.relative_to(folder), Path(os.path.abspath(photo))
            rooted = full.as_posix().replace(":/", "/").strip("/")  # D:/x is D/x
            names = inside.with_suffix(""), inside, _real(folder).name / inside, rooted
            photos.setdefault(full, (photo, [f"{name}.png" for name in names]))  # each once
    claims = collections.Counter(  # without case: to some file systems X.png is x.png
        name for _, names in photos.values() for name in {name.casefold() for name in names})
    return [(photo, out_dir / next((x for x in names if claims[x.casefold()] == 1), names[-1]))
            for photo, names in photos.values()]


def colorize_photos(args, generator, trained):
    """Colorize each photo of --images into --out-dir, over none of them; name and skip what fails.

    An output that is there is done. Exits with 1 when some could not be, RunError when none could.
    """
    color, render_size = trained["color"], args.render_size or trained["size"]
    if "" in (*args.images, args.out_dir):
        raise models.RunError("--images and --out-dir need names: the current folder is .")
    if _real(args.out_dir) in map(_real, args.images):
        raise models.RunError(f"--out-dir {args.out_dir} is one of --images: choose another")
    pairs, done, kept = list_photos(args.images, Path(args.out_dir)), 0, 0
    own = {_real(x) for x, _ in pairs}  # and (inode, device), where a folder has two names:
    own |= {os.stat(x)[1:3] for x, _ in pairs if os.path.exists(x)}
    for count, (photo, output) in enumerate(pairs, 1):
        try:
            if _real(output) in own or output.exists() and os.stat(output)[1:3] in own:
                raise FileExistsError(f"{output} is one of the photos: choose another --out-dir")
            if output.is_file() and not args.overwrite:
                kept += 1
                continue
            picture = data.read_picture(photo)
            painted = colorize_photo(generator, color, picture, render_size, args.saturation)
            with models.replacing(output) as file:
                painted.save(file, "PNG", compress_level=1, **picture.info)  # 3 times as fast
        except torch.OutOfMemoryError:
            raise  # it will not be better with the next photo
        except Exception as error:  # a damaged file can raise almost any exception
            print(f"skipped {photo}: {models.in_short(error)}", file=sys.stderr)
            continue
        done += 1
        print(f"{count}/{len(pairs)} {photo} -> {output}", flush=True)
    skipped = len(pairs) - done - kept
    if kept:
        print(f"kept {kept} that exist: --overwrite replaces them", file=sys.stderr)
    if skipped == len(pairs):
        raise models.RunError(f"no picture was colorized of the {len(pairs)} in --images: "
                              "see above, or give picture files or folders of them")
    if skipped:
        print(f"{skipped} of {len(pairs)} pictures were skipped", file=sys.stderr)
        raise SystemExit(1)


def _real(path):
    return Path(os.path.realpath(path))  # Path.resolve() raises at a link to itself


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="CKPT", help="last.pt of one or more runs")
    add("--figure", metavar="PNG", help="the figure (comparison.png)")
    add("--json", metavar="FILE", help="save the rows as a JSON list")
    add("--saturation", type=data.number(float, 0, 100), default=1.0, help="times a* and b* (1)")
    add("--save-pictures", metavar="DIR", help="also write PNGs: DIR/truth and one folder a run")
    add("--dataset", choices=["cifar10", "folder", "shapes"], help="default: the checkpoint's")
    add("--data-dir", metavar="DIR", help="default: the checkpoint's")
    add("--size", type=data.picture_size, help="default: the checkpoint's")
    add("--seed", type=data.number(int, 0, 2**32 - 1), default=0, help="of the pictures shown")
    add("--batch-size", type=data.number(int, 1, 10**6), help="default: as many as 256 of 32x32")
    add("--device", default="auto", help="auto is cuda, else mps, else cpu")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--curves", metavar="PNG", help="draw the runs' curves over one another instead")
    instead("--images", nargs="+", metavar="PHOTO", help="colorize these files and folders instead")
    add("--out-dir", default="colorized", metavar="DIR", help="into this folder (%(default)s)")
    add("--render-size", type=data.picture_size, help="side that it sees; default: as in training")
    add("--overwrite", action="store_true", help="replace photos that are in --out-dir already")
    return parser


def load_test_pictures(args, trained):
    """The test pictures that the flags name, or those of `trained`, each checkpoint's own flags."""
    trained = [flags | {"data_dir": os.path.abspath(flags["data_dir"])} for flags in trained]
    first, dataset = trained[0], args.dataset or trained[0]["dataset"]
    for name in ["dataset", "size"] + ["data_dir"] * (dataset == "folder"):
        for path, flags in zip(args.ckpt, trained):
            if getattr(args, name) is None and flags[name] != first[name]:
                flag = "--" + name.replace("_", "-")
                raise models.RunError(f"{path} was trained with {flag} {flags[name]}, the first "
                                      f"with {first[name]}: give {flag} to measure all on the same")
    data_dir = args.data_dir or (first["data_dir"] if dataset == first["dataset"] else "datasets")
    return data.load_pictures(dataset, data_dir, args.size or first["size"], train=False).images


def name_runs(paths):
    """A title for each checkpoint: its folder's name, or else its file's, or a number, too."""
    folders = [_real(path).parent for path in paths]
    titles = [Path(path).stem if folders.count(folder) > 1 else folder.name
              for path, folder in zip(paths, folders)]
    return [f"{i} {title}" if [*titles, "truth"].count(title) > 1 else title
            for i, title in enumerate(titles, 1)]


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    device, titles = models.choose_device(args.device), name_runs(args.ckpt)
    if args.images and len(args.ckpt) > 1:
        raise models.RunError(f"--images takes one --ckpt, not {len(args.ckpt)}: name the one")
    instead = "--images" if args.images else "--curves" if args.curves is not None else ""
    if instead and (args.json or args.figure or args.save_pictures):
        raise models.RunError(f"--json, --figure, --save-pictures do not go with {instead}")
    if args.curves is not None:
        runs = [(title, models.load_checkpoint(path)["history"])
                for title, path in zip(titles, args.ckpt)]
        if not any(history for _, history in runs):
            raise models.RunError(f"{args.ckpt[0]} holds no epoch yet: wait for the first")
        save_picture(draw_curves(runs), args.curves)
        return print(f"drew {args.curves}")
    trained = [models.load_checkpoint(path)["args"] for path in args.ckpt]
    if args.images:
        return colorize_photos(args, models.load_generator(args.ckpt[0], device), trained[0])
    if args.save_pictures and Path(args.save_pictures).exists():
        raise models.RunError(f"{args.save_pictures} exists: choose another --save-pictures")
    images = load_test_pictures(args, trained)

    def load(path):
        return models.load_generator(path, device).to(memory_format=data.memory_format(device))

    rows, psnrs, width = [], [], max(map(len, args.ckpt))
    for path, title, flags in [(None, "truth", {"color": "rgb"}), *zip(args.ckpt, titles, trained)]:
        generator = load(path) if path else None
        pairs = colorize(generator, images, flags["color"], args.batch_size, args.saturation)
        if args.save_pictures:  # gray has no path: in its turn the truth is saved
            pairs = save_pictures(pairs, 0 if path else 1, Path(args.save_pictures, title))
        metrics, psnr_of_each = measure(pairs)
        if not rows:
            print(" " * width, *(f"{key:>7}" for key in metrics))
        cells = (f"{value:{max(len(key), 7)}.4f}" for key, value in metrics.items())
        print(f"{path or 'gray':{width}}", *cells, flush=True)
        rows.append({"name": path or "gray", **metrics})
        psnrs.append(psnr_of_each)
        del generator  # before the next one is loaded: memory is for one

    if args.json:  # which has no nan
        rows = [{k: None if v != v else v for k, v in row.items()} for row in rows]
        with models.replacing(args.json) as file:
            file.write((json.dumps(rows, indent=2) + "\n").encode())

    random = np.random.RandomState(args.seed).permutation(len(images))[:FIGURE_RANDOM].tolist()
    # Best and worst by what the last model gains over gray: psnr alone favours gray pictures.
    worst_first = (psnrs[-1] - psnrs[0]).argsort().tolist()
    best, worst = worst_first[::-1][:FIGURE_EXTREME], worst_first[:FIGURE_EXTREME]
    labels = ["random"] * len(random) + ["best"] * len(best) + ["worst"] * len(worst)
    drawn = ((title, load(path), x["color"]) for title, path, x in zip(titles, args.ckpt, trained))
    chosen = images[random + best + worst]
    figure = args.figure or "comparison.png"
    save_picture(draw_comparison(drawn, chosen, labels, args.saturation), figure)
    print(f"drew {figure}")


if __name__ == "__main__":
    main()
