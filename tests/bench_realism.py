"""Realism as a number: do painted pictures look like photographs to a network that judges them?

    python tests/bench_realism.py --ckpt runs/unet/last.pt runs/gan/last.pt runs/nogan/last.pt

The pixel-by-pixel figures of evaluate.py are best for the safest colour. This trains a judge, a
classifier of the labelled training pictures, and shows it the test pictures as they are (truth),
without colour (gray), as each checkpoint paints them, and as the first one does with a* and b*
times --saturation:

    class_acc   share of painted pictures whose class the judge sees ("semantic interpretability",
                Zhang et al., 2016, arXiv:1603.08511)
    frechet     Frechet distance of the judge's pooled features on painted and on true pictures,
                each feature divided by its standard deviation on true ones (Heusel et al., 2017,
                arXiv:1706.08500, with this judge for Inception: it compares the rows of one table)
    grid_2, _4  power of a* and b* at periods of 2 and 4 px over that of the neighbouring periods:
                above the truth's, a checkerboard (Odena et al., 2016, doi:10.23915/distill.00003)

The judge is of another family than NoGAN's classifier, which would favour NoGAN: torchvision's
ResNet-18, cut down for 32 pixels, or with --judge small a network of other layers. An order
that both judges give is one to believe. --judge-file keeps it, for these test pictures alone;
training it takes some minutes on two CPU cores.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402

BATCH = 128
PEAK_RATE = 2e-3  # AdamW's, reached after a fifth of the steps


# ---------------------------------------------------------------------------------------- judges


class Small(nn.Module):
    """5x5 convolutions and GroupNorm, where a ResNet or a VGG has 3x3 ones and BatchNorm."""

    def __init__(self, classes, width=32):
        super().__init__()
        layers, channels = [], 3
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 5, padding=2), nn.GroupNorm(8, out), nn.ReLU(),
                       nn.MaxPool2d(2)]
            channels = out
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):  # (N, 3, H, W) -> (N, classes)
        return self.fc(self.features(x))


def build_judge(kind, classes):
    """A classifier whose last layer is `fc`; what goes into that are the pooled features."""
    torch.manual_seed({"resnet": 100, "small": 200}[kind])  # not a seed of a training script
    if kind == "small":
        return Small(classes)
    judge = torchvision.models.resnet18()
    # Made for 224 px, it would shrink 32 to 1. So: a smaller stem, which leaves 8x8 (a stem of
    # stride 1 would be better, and take 15 times as long), and without the last stage, 2x2.
    judge.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    judge.layer4, judge.fc = nn.Identity(), nn.Linear(256, classes)
    return judge


def train_judge(kind, pictures, epochs, device):
    """A judge trained on Pictures with labels, in eval mode. Prints a line an epoch."""
    classes = int(pictures.labels.max()) + 1
    judge = build_judge(kind, classes).to(device, memory_format=data.memory_format(device))
    images, labels = pictures.images.to(device), pictures.labels.to(device)
    batches = data.Batches(images, "rgb", BATCH, seed=1, labels=labels)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=epochs * len(batches), pct_start=0.2)
    for epoch in range(1, epochs + 1):
        total, right, seen = 0, 0, 0
        for _, target, label in batches.epoch(epoch):
            logits = judge(target)  # the true picture, in [-1, 1]
            loss = F.cross_entropy(logits, label)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total, right = total + loss.detach(), right + (logits.argmax(1) == label).sum()
            seen += len(label)
        print(f"judge {kind}, epoch {epoch}/{epochs}: cross-entropy {total / len(batches):.3f}, "
              f"accuracy on its training pictures {right / seen:.3f}", flush=True)
    return judge.eval()


def load_labelled(args, train):
    """Pictures with labels. Raises RunError where they have none."""
    pictures = data.load_pictures(args.dataset, args.data_dir, args.size, train)
    if pictures.labels is None:
        raise models.RunError(f"the pictures in {args.data_dir} have no labels: put them in class "
                              "folders")
    return pictures


def find_judge(args, device, test_images):
    """The judge of --judge-file, or a new one, which is kept there, for these test images only."""
    path = Path(args.judge_file or f"runs/judge-{args.judge}.pt")
    if path.is_file():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["kind"] != args.judge:
            raise models.RunError(f"{path} is a judge of kind {saved['kind']}: give another file")
        if saved.get("test_pictures") != data.fingerprint(test_images):
            raise models.RunError(f"{path} is a judge of other pictures: give another --judge-file")
        judge = build_judge(args.judge, len(saved["state"]["fc.bias"]))
        judge.load_state_dict(saved["state"])
        return judge.to(device, memory_format=data.memory_format(device)).eval()
    pictures = load_labelled(args, train=True)
    judge = train_judge(args.judge, pictures, args.judge_epochs, device)
    with models.replacing(path) as file:
        torch.save({"kind": args.judge, "test_pictures": data.fingerprint(test_images),
                    "state": judge.state_dict()}, file)
    return judge


@torch.inference_mode()
def judged(judge, rgb):
    """(logits (N, classes), pooled features (N, d)) of RGB (N, 3, H, W) in [0, 1]."""
    pooled = []
    hook = judge.fc.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    logits = judge(2 * rgb - 1)
    hook.remove()
    return logits, pooled[0]


# --------------------------------------------------------------------------------------- measures


def frechet(features, true_features):
    """Frechet distance of two samples (N, d), (M, d), in units of the true standard deviations.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means and covariances (Dowson and Landau, 1982),
    in float64. The trace of that root is that of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric.
    """
    features, true_features = features.double(), true_features.double()
    std = true_features.std(dim=0)
    std = torch.where(std > 0, std, 1.0)  # a feature that is never active
    features, true_features = features / std, true_features / std
    apart = features.mean(dim=0) - true_features.mean(dim=0)
    cov, true_cov = torch.cov(features.T), torch.cov(true_features.T)
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(root @ true_cov @ root).clamp(min=0).sqrt()
    distance = apart @ apart + cov.trace() + true_cov.trace() - 2 * roots.sum()
    return max(0.0, distance.item())  # which rounding can put below


def power_spectrum(rgb):
    """Sum over pictures of the power of a* and b*, their means removed, (H, W), float64."""
    ab = data.rgb_to_lab(rgb)[:, 1:]
    ab = ab - ab.mean(dim=(2, 3), keepdim=True)
    return torch.fft.fft2(ab.double()).abs().square().sum(dim=(0, 1))


def grid(power, period):
    """How far the lines of a period in px, down and across, stand above those beside them.

    power (H, W) of square pictures. 1: not at all; None: there is no colour. The axes are left out:
    there, a picture's borders have their power.
    """
    n = len(power)
    if power.max() < 1:  # rounding, of a sum over pictures
        return None

    def line(k):
        return torch.cat([power[k % n, 1:], power[1:, k % n]]).mean()

    k = n // period
    return (2 * line(k) / (line(k - 1) + line(k + 1))).item()


def row(judge, batches, labels, true_features=None):
    """(row of the table, features) of RGB batches in [0, 1]."""
    logits, features, power = [], [], 0
    for rgb in batches:
        some = judged(judge, rgb)
        logits.append(some[0].cpu())
        features.append(some[1].cpu())
        power = power + power_spectrum(rgb)
    features, guesses = torch.cat(features), torch.cat(logits).argmax(dim=1)
    distance = frechet(features, features if true_features is None else true_features)
    return {"class_acc": (guesses == labels).double().mean().item(), "frechet": distance,
            "grid_2": grid(power, 2), "grid_4": grid(power, 4)}, features


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="CKPT", help="last.pt of one or more runs")
    add("--judge", choices=["resnet", "small"], default="resnet", help="(%(default)s)")
    add("--judge-file", metavar="PT", help="default: runs/judge-<judge>.pt; trained if not there")
    add("--judge-epochs", type=data.number(int, 1, 1000), default=3, help="(%(default)s)")
    add("--dataset", choices=["cifar10", "folder", "shapes"], help="default: the checkpoint's")
    add("--data-dir", metavar="DIR", help="default: the checkpoint's")
    add("--size", type=data.picture_size, help="default: the checkpoint's")
    add("--saturation", type=data.number(float, 0, 100), default=2.0, help="(%(default)g)")
    add("--device", default="auto", help="auto is cuda, else mps, else cpu")
    add("--json", metavar="FILE", help="save the rows as a JSON list")
    return parser


@evaluate.one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    device = models.choose_device(args.device)
    checkpoints = [models.load_checkpoint(path) for path in args.ckpt]
    first = checkpoints[0]["args"]
    for name in ("dataset", "data_dir", "size"):
        setattr(args, name, getattr(args, name) or first[name])
    pictures = load_labelled(args, train=False)
    judge = find_judge(args, device, pictures.images)

    def colored(checkpoint, saturation=1.0):
        generator = models.build_generator(checkpoint).to(device)
        color = checkpoint["args"]["color"]
        pairs = evaluate.colorize(generator, pictures.images, color, saturation=saturation)
        return (output for output, _ in pairs)

    truth = [batch.to(device) / 255 for batch in pictures.images.split(256)]
    systems = {"truth": truth, "gray": (data.luma(rgb).expand_as(rgb) for rgb in truth)}
    systems |= {path: colored(checkpoint) for path, checkpoint in zip(args.ckpt, checkpoints)}
    name = f"{args.ckpt[0]}, saturation {args.saturation:g}"
    systems[name] = colored(checkpoints[0], args.saturation)

    rows, true_features, width = [], None, max(map(len, systems))
    for name, batches in systems.items():
        figures, features = row(judge, batches, pictures.labels, true_features)
        if true_features is None:
            true_features = features
            print(" " * width, *(f"{key:>9}" for key in figures))
        print(f"{name:{width}}", *(f"{math.nan if value is None else value:9.4f}"
                                for value in figures.values()), flush=True)
        rows.append({"name": name, **figures})
    if args.json:
        with models.replacing(args.json) as file:
            file.write((json.dumps(rows, indent=2) + "\n").encode())
    return rows


if __name__ == "__main__":
    main()
