"""Metrics and the comparison figure; training scripts validate, draw and log with the same code.

    python evaluate.py --ckpt runs/unet/last.pt runs/gan/last.pt
    python evaluate.py --ckpt runs/gan/last.pt --images photos --out-dir colorized

The second colorizes one's own photos, files or folders of them, at full resolution. The first
measures each checkpoint's generator on the test pictures, beside a row `gray` (no colour at all,
the baseline), and draws gray | each model | truth: random pictures first, then the last model's
best and worst. `--json FILE` saves the rows.

    mse, psnr, ssim          how close, pixel by pixel
    mae_ab, acc_2, acc_5     how close in colour (Nazeri et al., 2018)
    colorfulness, its ratio  how vivid (Hasler and Suesstrunk, 2003); a ratio of 1 is as the truth
    ab_jsd                   how far the colours' distribution is from the truth's
"""

import argparse
import csv
import functools
import io
import itertools
import json
import math
import os
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
TIMED_STEPS = 3  # after the first, on a CPU, to tell how long the run will take
FIGURE_RANDOM, FIGURE_EXTREME = 8, 3  # rows: random ones; best and worst ones, each
BAND_PIXELS = 2**16  # of a photo that are in colour conversion at once: they fit the cache


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
    taps = torch.exp(-((torch.arange(11, device=output.device) - 5.0) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()

    def blur(x):  # (N, 3, H, W) -> (N, 3, H - 10, W - 10)
        one_channel = x.flatten(0, 1)[:, None]
        rows = F.conv2d(one_channel, taps.view(1, 1, 11, 1))
        return F.conv2d(rows, taps.view(1, 1, 1, 11)).squeeze(1).unflatten(0, x.shape[:2])

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
    middle = (p + q) / 2

    def divergence(p):  # Kullback-Leibler, from p to the middle; 0 log 0 = 0
        return (p * torch.log2(p / middle))[p > 0].sum()

    return ((divergence(p) + divergence(q)) / 2).item()


def measure(pairs):
    """All metrics over (output, truth) batches of RGB, as (dict of floats, psnr a picture (N,))."""
    rows, histograms = [], 0
    for output, truth in pairs:
        lab, true_lab = data.rgb_to_lab(output), data.rgb_to_lab(truth)
        columns = {
            "mse": mse(output, truth),
            "psnr": psnr(output, truth),
            "ssim": ssim(output, truth),
            "mae_ab": mae_ab(lab, true_lab),
            "acc_2": accuracy(lab, true_lab, 2),
            "acc_5": accuracy(lab, true_lab, 5),
            "colorfulness": colorfulness(output),
            "colorfulness_of_truth": colorfulness(truth),
        }
        rows.append(torch.stack(list(columns.values()), dim=1).cpu().double())
        histograms = histograms + torch.stack([ab_histogram(lab), ab_histogram(true_lab)]).cpu()
    rows = torch.cat(rows)
    metrics = dict(zip(columns, rows.mean(dim=0).tolist()))
    of_truth = max(metrics.pop("colorfulness_of_truth"), 1e-6)  # 0 where all of it is gray
    metrics["colorfulness_ratio"] = metrics["colorfulness"] / of_truth
    metrics["ab_jsd"] = jensen_shannon(*histograms)
    return metrics, rows[:, list(columns).index("psnr")]


@torch.inference_mode()
def colorize(generator, images, color, batch_size=256):
    """Yield (output, truth) batches of RGB in [0, 1] for uint8 images (N, 3, H, W).

    `generator` is put in eval mode; its device is where it happens. None stands for no colour at
    all: Rec. 601 luma in every channel.
    """
    device = images.device if generator is None else next(generator.parameters()).device
    if generator is not None:
        generator.eval()
    for batch in images.split(batch_size):
        batch = batch.to(device)
        truth = batch.float() / 255
        if generator is None:
            yield data.luma(truth).expand_as(truth), truth
        else:
            gray, _ = data.to_gray_and_target(batch, color)
            yield data.to_rgb(gray, generator(gray), color), truth


def validate(generator, images, color):
    """The metrics of a generator on uint8 images (N, 3, H, W), as a dict of floats."""
    return measure(colorize(generator, images, color))[0]


# ---------------------------------------------------------------------------------------- figures


def draw_figure(columns, row_labels=()):
    """A PIL picture of `columns`, a list of (title, RGB (N, 3, H, W) in [0, 1]), side by side.

    `row_labels`, one a row, stand at the left, where they change.
    """
    count, _, height, width = columns[0][1].shape
    scale = max(1, 96 // width)  # small pictures are enlarged to about 96 pixels
    font, gap, top = ImageFont.load_default(13), 4, 22  # top: the titles' height
    left = 62 if row_labels else gap
    cell_w, cell_h = scale * width + gap, scale * height + gap
    figure = Image.new("RGB", (left + cell_w * len(columns), top + cell_h * count), "white")
    draw = ImageDraw.Draw(figure)
    for i, (title, images) in enumerate(columns):
        while draw.textlength(title, font) > cell_w - gap:  # a long name keeps its beginning
            title = title.rstrip("…")[:-1] + "…"
        draw.text((left + i * cell_w, 3), title, "black", font)
        pixels = (images.cpu() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        for j, picture in enumerate(pixels.numpy()):
            picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
            figure.paste(Image.fromarray(picture), (left + i * cell_w, top + j * cell_h))
    for j, label in enumerate(row_labels):
        if j == 0 or label != row_labels[j - 1]:
            draw.text((gap, top + j * cell_h), label, "black", font)
    return figure


def draw_comparison(generators, images, row_labels=()):
    """gray | each model | truth: `generators` is a list of (title, generator, color)."""
    columns = []
    for title, generator, color in [("gray", None, "rgb"), *generators]:
        output, truth = next(colorize(generator, images, color, len(images)))
        columns.append((title, output))
    return draw_figure([*columns, ("truth", truth)], row_labels)


# -------------------------------------------------------------------------------- a training run


class Run:
    """What a training run prints, logs and keeps in its folder; the training is in the scripts.

        with Run("train_unet", args, checkpoint) as run:
            run.start(args.epochs, device, batches, validation images, gray pictures dropped)
            run.save(run.done, generator=generator, ...)
            for epoch in range(run.done + 1, args.epochs + 1):
                run.begin_epoch(epoch)
                ...                       for each batch: run.step(loss=loss)
                run.end_epoch(generator)
                run.save(epoch, generator=generator, ...)

    A method of several stages counts their epochs through and names each with `begin_stage`.
    The folder holds last.pt, log.csv (a row an epoch) and samples/ (a grid an epoch). Raises
    RunError when it holds another run, cannot be written, or a loss is not finite.
    """

    def __init__(self, script, args, checkpoint):
        self.script, self.args, self.out = script, args, Path(args.out)
        self.last = self.out / "last.pt"
        self.history = checkpoint["history"] if checkpoint else []  # rows of log.csv
        self.done = checkpoint["epoch"] if checkpoint else 0
        self.stage = checkpoint.get("stage") if checkpoint else None
        self.planned = 0  # epochs, in the stages begun so far
        resumes_itself = args.resume and Path(args.resume).resolve() == self.last.resolve()
        self.saved = bool(resumes_itself)
        if self.last.exists() and not (resumes_itself or args.overwrite):
            raise models.RunError(
                f"{self.out} holds a run: go on with --resume {self.last}, replace it with "
                "--overwrite, or choose another --out"
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind and sys.stdout.isatty():
            print()  # below the progress line
        if kind is KeyboardInterrupt:
            resume = f"go on with python {self.script}.py --resume {self.last}"
            what_now = resume if self.saved else "nothing was saved yet"
            print(f"interrupted: {what_now}", file=sys.stderr)

    def start(self, epochs, device, batches, validation, dropped):
        """Print what the run runs on."""
        self.epochs, self.until = epochs, epochs  # in all; the last one of the stage
        self.device, self.batches, self.validation = device, batches, validation
        args, count = self.args, len(batches.images)
        dtype = models.amp_dtype(device, args.amp) or torch.float32
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        goes_on = f", after epoch {self.done}" if self.done else ""
        batch = f"batch {batches.batch_size}"
        if args.batch_size > count:
            batch = f"one batch of all {count} (--batch-size {args.batch_size} is more)"
        print(f"{self.script}: {args.dataset} {args.size}x{args.size} {args.color}, "
              f"{count:,} to train on, {len(validation):,} to validate, {dropped:,} gray ones "
              f"dropped; {batch}; {name}, {str(dtype).removeprefix('torch.')}; into {self.out}"
              f"{goes_on}", flush=True)
        if self.done >= epochs:
            print(f"all {epochs} epochs are done: raise their number to train on")
        self._start_clock()

    def begin_stage(self, name, epochs, what):
        """Announce the next stage; returns its first epoch, and a range of those still to do.

        Epochs are counted through all stages.
        """
        first, self.planned = self.planned + 1, self.planned + epochs
        to_do = range(max(first, self.done + 1), self.planned + 1)
        if to_do:
            self.stage, self.until = name, self.planned
            print(f"{name}, epochs {first} to {self.planned}: {what}", flush=True)
            self._start_clock()
        return first, to_do

    def _start_clock(self):
        self.started, self.steps = time.perf_counter(), 0  # steps of this process and stage

    def begin_epoch(self, epoch):
        self.epoch, self.total, self.epoch_steps = epoch, 0, 0
        self.epoch_started = time.perf_counter()

    def step(self, **losses):
        """Add up a step's losses on the device; now and then read them, print and check them."""
        self.total = self.total + torch.stack([loss.detach() for loss in losses.values()])
        self.steps, self.epoch_steps = self.steps + 1, self.epoch_steps + 1
        if self.epoch_steps % READ_EVERY == 0 or self.epoch_steps == len(self.batches):
            self._read(losses)
        if self.device.type == "cpu" and self.steps == 1:  # which warms up and does not count
            self.after_first_step = time.perf_counter()
        if self.device.type == "cpu" and self.steps == 1 + TIMED_STEPS:
            self._warn_if_slow()

    def _read(self, losses):
        means = (self.total / self.epoch_steps).tolist()  # waits for the device
        self.losses = dict(zip(losses, means))  # the epoch's means so far, by name
        self._stop_unless_finite(self.losses)
        if sys.stdout.isatty():
            print(f"\r\x1b[Kepoch {self.epoch}/{self.epochs} step {self.epoch_steps}/"
                  f"{len(self.batches)}  {_numbers(self.losses)}", end="", flush=True)

    def _stop_unless_finite(self, values):
        if not all(map(math.isfinite, values.values())):
            raise models.RunError(
                f"not finite in epoch {self.epoch}: {_numbers(values)}; {self.last} holds epoch "
                f"{self.epoch - 1}: lower --lr, or use --amp off"
            )

    def _warn_if_slow(self):
        steps_left = (self.epochs - self.epoch + 1) * len(self.batches) - self.epoch_steps
        seconds = (time.perf_counter() - self.after_first_step) / TIMED_STEPS * steps_left
        if seconds > 3600:
            half = models.amp_dtype(self.device, self.args.amp) is not None
            faster = ["--width 32"] * (self.args.width > 32) + ["--amp on"] * (not half)
            print(f"this will take about {seconds / 3600:.1f} hours on the CPU: "
                  f"{' '.join(faster) or '--limit'} takes less", flush=True)

    def end_epoch(self, generator=None, **metrics):
        """Print the epoch's line: `metrics`, or a generator's on the validation pictures.

        A generator's sample grid is drawn, too.
        """
        now = time.perf_counter()
        rate = len(self.batches.images) / (now - self.epoch_started)
        shown = metrics
        if generator:
            metrics = validate(generator, self.validation, self.args.color)
            shown = {name: metrics[name] for name in ("psnr", "colorfulness_ratio")}
        self._stop_unless_finite(metrics)
        stage = {"stage": self.stage} if self.stage else {}
        self.history.append({"epoch": self.epoch, **stage, **self.losses, **metrics,
                             "pictures_per_s": rate})
        epochs_done = self.steps / len(self.batches)
        left = (time.perf_counter() - self.started) / epochs_done * (self.until - self.epoch)
        start = "\r\x1b[K" if sys.stdout.isatty() else ""
        minutes, seconds = divmod(round(left), 60)
        print(f"{start}epoch {self.epoch}/{self.epochs}  {_numbers(self.losses)}  validation "
              f"{_numbers(shown)}  {rate:,.0f} pictures/s  {minutes}m{seconds:02d}s left"
              + " in this stage" * bool(self.stage), flush=True)
        if generator:  # of evenly spaced pictures, because --split hue has sorted them
            pictures = self.validation[:: max(1, len(self.validation) // FIGURE_RANDOM)]
            grid = draw_comparison(
                [("output", generator, self.args.color)], pictures[:FIGURE_RANDOM]
            )
            with models.replacing(self.out / "samples" / f"epoch_{self.epoch:03d}.png") as file:
                grid.save(file, "PNG")

    def save(self, epoch, **state):
        """Write last.pt, then log.csv to match."""
        args = {k: v for k, v in vars(self.args).items() if k not in ("resume", "overwrite")}
        if self.stage:
            state["stage"] = self.stage
        models.save_checkpoint(self.last, self.script, args, epoch, self.history, **state)
        if not self.saved:  # with --overwrite, the samples there are another run's
            for sample in (self.out / "samples").glob("epoch_*.png"):
                sample.unlink()
        self.saved = True
        table = io.StringIO(newline="")
        columns = dict.fromkeys(name for row in self.history for name in row)
        writer = csv.DictWriter(table, columns or ["epoch"])
        writer.writeheader()
        writer.writerows(self.history)
        with models.replacing(self.out / "log.csv") as file:
            file.write(table.getvalue().encode())


def _numbers(values):
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def one_line_errors(main):
    """Make main(argv) end a user's mistake in one line and exit status 2, and Ctrl-C in 130."""

    @functools.wraps(main)
    def wrapped(argv=None):
        if hasattr(sys.stdout, "reconfigure"):  # a file's name may have any letters
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except (RuntimeError, MemoryError) as error:
            exhausted = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            words = "allocate memory", "out of memory"  # torch's, on a CPU and on MPS
            if not exhausted and not any(word in str(error) for word in words):
                raise
            message = "memory is exhausted: lower --batch-size, --width, --size or --render-size"
        except (data.DataError, models.RunError) as error:
            message = error
        except OSError as error:
            message = f"{error}: check the path and the free space"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)

    return wrapped


# ------------------------------------------------------------------------------------ own photos


@torch.inference_mode()
def colorize_photo(generator, color, photo, render_size):
    """A PIL RGB picture of any size in the generator's colours and its own lightness.

    The generator sees it squeezed to `render_size` squared, as in DeOldify; its a*b* are stretched
    back smoothly and laid under the picture's own L*.
    """
    small = photo.resize((render_size, render_size), Image.Resampling.LANCZOS, reducing_gap=3)
    small = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    gray, _ = data.to_gray_and_target(small, color)
    output = generator(gray.to(next(generator.parameters()).device)).cpu()
    chroma = data.rgb_to_lab(data.to_rgb(gray, output, color))[:, 1:]  # of the small picture
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

    An output whose name is taken keeps its photo's suffix, name.tif.png, and then gets a number.
    """
    pairs, taken = [], set()
    for given in map(Path, inputs):
        photos = [given]
        if given.is_dir():  # without what an earlier run has painted into a folder below it
            photos = data.picture_paths(given)
            if _real(given) in _real(out_dir).parents:
                photos = [photo for photo in photos if _real(out_dir) not in _real(photo).parents]
        for photo in photos:
            inside = photo.relative_to(given if given.is_dir() else given.parent)
            numbers = (f"{photo.suffix}.{n}.png" for n in itertools.count(2))
            for suffix in itertools.chain([".png", f"{photo.suffix}.png"], numbers):
                output = out_dir / inside.with_name(inside.stem + suffix)
                if output not in taken:
                    break
            taken.add(output)
            pairs.append((photo, output))
    return pairs


def colorize_photos(args, generator, checkpoint):
    """Colorize each photo of --images into --out-dir; name and skip what cannot be done.

    Exits with status 1 when some could not be done. Raises RunError when none could.
    """
    trained = checkpoint["args"]
    render_size = args.render_size or trained["size"]
    if _real(args.out_dir) in map(_real, args.images):
        raise models.RunError(f"--out-dir {args.out_dir} is one of --images: choose another")
    pairs, done = list_photos(args.images, Path(args.out_dir)), 0
    originals = {_real(photo) for photo, _ in pairs}
    for count, (photo, output) in enumerate(pairs, 1):
        try:
            if _real(output) in originals:
                raise FileExistsError(f"{output} is one of the photos: choose another --out-dir")
            if output.exists() and not args.overwrite:
                raise FileExistsError(f"{output} exists: replace it with --overwrite")
            picture = data.read_picture(photo)
            picture = colorize_photo(generator, trained["color"], picture, render_size)
            with models.replacing(output) as file:
                picture.save(file, "PNG", compress_level=1)  # a third of the time of the default
        except torch.OutOfMemoryError:
            raise  # it will not be better with the next photo
        except Exception as error:  # what a damaged file can raise is without end
            print(f"skipped {photo}: {models.first_line(error)}", file=sys.stderr)
            continue
        done += 1
        print(f"{count}/{len(pairs)} {photo} -> {output}", flush=True)
    if not done:
        raise models.RunError(f"no picture was colorized of the {len(pairs)} in --images: "
                              "give readable picture files, or folders of them")
    if done < len(pairs):
        print(f"{len(pairs) - done} of {len(pairs)} pictures were skipped", file=sys.stderr)
        raise SystemExit(1)


def _real(path):
    return Path(os.path.realpath(path))  # Path.resolve() raises at a link to itself


# ------------------------------------------------------------------------------------------- main


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="CKPT", help="last.pt of one or more runs")
    add("--figure", default="comparison.png", metavar="PNG", help="the figure (%(default)s)")
    add("--json", metavar="FILE", help="save the rows as a JSON list")
    add("--dataset", choices=["cifar10", "folder", "shapes"], help="default: the checkpoint's")
    add("--data-dir", metavar="DIR", help="default: the checkpoint's")
    add("--size", type=data.picture_size, help="default: the checkpoint's")
    add("--seed", type=data.number(int, 0, 2**32 - 1), default=0, help="of the pictures shown")
    add("--device", default="auto", help="auto is cuda, else mps, else cpu")
    add("--images", nargs="+", metavar="PHOTO", help="colorize these files and folders instead")
    add("--out-dir", default="colorized", metavar="DIR", help="into this folder (%(default)s)")
    add("--render-size", type=data.picture_size,
        help="side of the square that the network sees of a photo; default: its training size")
    add("--overwrite", action="store_true", help="replace photos that are in --out-dir already")
    return parser


def load_test_pictures(args, checkpoints):
    """The test pictures of the first checkpoint's data set, or of the one that the flags name."""
    first = checkpoints[0]["args"]
    dataset = args.dataset or first["dataset"]
    for path, checkpoint in zip(args.ckpt, checkpoints):
        for name in ("dataset", "size", "data_dir"):
            value, flag = checkpoint["args"][name], "--" + name.replace("_", "-")
            if name == "data_dir" and dataset != "folder":
                continue  # the same pictures wherever they lie
            if getattr(args, name) is None and value != first[name]:
                raise models.RunError(
                    f"{path} was trained with {flag} {value}, {args.ckpt[0]} with {first[name]}: "
                    f"give {flag} to measure all on the same pictures"
                )
    data_dir = args.data_dir or (first["data_dir"] if dataset == first["dataset"] else "datasets")
    return data.load_pictures(dataset, data_dir, args.size or first["size"], train=False).images


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    device = models.choose_device(args.device)
    checkpoints = [models.load_checkpoint(path) for path in args.ckpt]
    if args.images and len(args.ckpt) > 1:
        raise models.RunError(f"--images takes one --ckpt, not {len(args.ckpt)}: name the one")
    if args.images:
        generator = models.build_generator(checkpoints[0])
        generator = generator.to(device, memory_format=torch.channels_last)
        return colorize_photos(args, generator, checkpoints[0])
    images = load_test_pictures(args, checkpoints)

    generators = [("gray", None, "rgb")]
    for path, checkpoint in zip(args.ckpt, checkpoints):
        generator = models.build_generator(checkpoint).to(device, memory_format=torch.channels_last)
        title = Path(path).resolve().parent.name
        generators.append((title, generator, checkpoint["args"]["color"]))

    rows, width = [], max(map(len, args.ckpt))
    for name, (_, generator, color) in zip(["gray", *args.ckpt], generators):
        metrics, psnrs = measure(colorize(generator, images, color))
        if not rows:
            print(" " * width, *(f"{key:>7}" for key in metrics))
        cells = (f"{value:{max(len(key), 7)}.4f}" for key, value in metrics.items())
        print(f"{name:{width}}", *cells, flush=True)
        rows.append({"name": name, **metrics})

    if args.json:
        with models.replacing(args.json) as file:
            file.write((json.dumps(rows, indent=2) + "\n").encode())

    random = np.random.RandomState(args.seed).permutation(len(images))[:FIGURE_RANDOM].tolist()
    worst_first = psnrs.argsort().tolist()  # by the last checkpoint's
    best, worst = worst_first[::-1][:FIGURE_EXTREME], worst_first[:FIGURE_EXTREME]
    labels = ["random"] * len(random) + ["best"] * len(best) + ["worst"] * len(worst)
    figure = draw_comparison(generators[1:], images[random + best + worst], labels)
    with models.replacing(args.figure) as file:
        figure.save(file, "PNG")
    print(f"drew {args.figure}")


if __name__ == "__main__":
    main()
