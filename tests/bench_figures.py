"""The README's figures of results: what each system paints of each class, at its best and worst.

    python tests/bench_figures.py --ckpt runs/unet/last.pt runs/gan/last.pt runs/nogan/last.pt

A rule chooses the pictures; it was itself chosen, out of four tried, for a clear figure. Of each
class of CIFAR-10, results.webp shows, out of the more colourful half of the test pictures, the one
on which the checkpoints together gain most psnr over gray. failures.webp shows the one on which
they add most to gray's squared error. Each has room for the classes with the largest figures. The
rows are gray, each checkpoint and the truth.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
SHOWN = {"results": 8, "failures": 4}  # classes: GitHub shows a README at 830 pixels


def best_of_each(labels, scores):
    """The index of the best score (N,) within each class, by labels (N,), best class first."""
    best = [torch.where(labels == label, scores, -torch.inf).argmax() for label in labels.unique()]
    return sorted((i for i in best if scores[i] > -torch.inf), key=lambda i: -scores[i])


@evaluate.one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", required=True, help="last.pt of one or more runs")
    parser.add_argument("--names", nargs="+", help="of their rows; default: their folders'")
    parser.add_argument("--out-dir", default=".github", metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(argv)
    names = args.names or evaluate.name_runs(args.ckpt)
    if len({*names, "gray", "truth"}) != len(args.ckpt) + 2:
        raise models.RunError(f"--names needs {len(args.ckpt)} names, all different, none of them "
                              "gray or truth")

    first = models.load_checkpoint(args.ckpt[0])["args"]
    images, labels = data.load_pictures(*(first[x] for x in ("dataset", "data_dir", "size")), False)
    if labels is None or labels.max() >= len(CLASSES):
        raise models.RunError("the test pictures are not of CIFAR-10's ten classes")
    systems = {"gray": evaluate.colorize(None, images, "rgb")}
    for name, path in zip(names, args.ckpt):
        color = models.load_checkpoint(path)["args"]["color"]
        systems[name] = evaluate.colorize(models.load_generator(path), images, color)
    painted = {name: torch.cat([output for output, _ in pairs]) for name, pairs in systems.items()}
    painted["truth"] = images / 255
    gray, *errors = (evaluate.mse(painted[name], painted["truth"]) for name in ["gray", *names])
    gain_in_db = 10 * (gray / torch.stack(errors)).log10().mean(dim=0)
    vivid = evaluate.colorfulness(painted["truth"])
    gain_in_db[vivid < vivid.median()] = -torch.inf
    added = torch.stack(errors).mean(dim=0) - gray
    for name, scores in [("results", gain_in_db), ("failures", added)]:
        columns = [(CLASSES[labels[i]], torch.stack([rows[i] for rows in painted.values()]))
                   for i in best_of_each(labels, scores)[: SHOWN[name]]]
        path = Path(args.out_dir, f"{name}.webp")
        with models.replacing(path) as file:  # the pixels of a PNG in two thirds of the space
            figure = evaluate.draw_figure(columns, list(painted))
            figure.save(file, "WEBP", lossless=True, quality=100, method=6)
        print(f"drew {path}")


if __name__ == "__main__":
    main()
