"""The sepia lesson: what each loss paints where the gray picture cannot tell the colour.

    python tests/bench_sepia.py

The triangles of the `shapes` pictures are orange or blue, equally likely, of equal gray; the mean
of the two in RGB is gray. This trains three small networks on the same pictures, U-Net with MSE,
U-Net with L1 and GAN, and looks at their triangles on the test pictures:

    chroma      mean sqrt(a*^2 + b*^2) of the painted pixels over the truth's: 0 is gray, 1 is vivid
    committed   share of triangles nearer (in mean RGB) to orange or to blue than to their mean

It draws gray | U-Net MSE | U-Net L1 | GAN | truth of the first four into the run folder, and takes
half an hour on one CPU core.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import train_gan  # noqa: E402
import train_unet  # noqa: E402

TRIANGLE = 2


def triangles():
    """The test pictures with a triangle, uint8 (N, 3, 32, 32), and its pixels, bool (N, 32, 32)."""
    images, labels, objects = data.make_shapes(data.SHAPES_TEST, 32, data.SHAPES_TEST_SEED)
    return images[labels == TRIANGLE], objects[labels == TRIANGLE]


def lesson(generator, color, images, objects):
    """(chroma, committed) of a generator on pictures (N, 3, H, W) with objects (N, H, W)."""
    output, truth = next(evaluate.colorize(generator, images, color, len(images)))

    def chroma(rgb):
        return data.rgb_to_lab(rgb)[:, 1:].norm(dim=1)[objects].mean()

    def mean_color(rgb):  # of each object, (N, 3)
        return (rgb * objects[:, None]).sum(dim=(2, 3)) / objects.sum(dim=(1, 2))[:, None]

    painted, one, gray = map(mean_color, (output, truth, data.luma(truth).expand_as(truth)))
    other = 2 * gray - one  # the two colours' mean is gray
    to_a_color = torch.minimum((painted - one).norm(dim=1), (painted - other).norm(dim=1))
    committed = to_a_color < (painted - gray).norm(dim=1)
    return (chroma(output) / chroma(truth)).item(), committed.float().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", default="16")
    parser.add_argument("--epochs", default="10")
    parser.add_argument("--color", default="rgb")
    parser.add_argument("--out", default="runs/sepia", metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in DIR")
    args = parser.parse_args(argv)

    common = ["--dataset", "shapes", "--batch-size", "32", "--width", args.width]
    common += ["--epochs", args.epochs, "--color", args.color, *["--overwrite"][: args.overwrite]]
    runs = {"U-Net MSE": (train_unet, ["--loss", "mse"]),
            "U-Net L1": (train_unet, ["--loss", "l1"]),
            "GAN": (train_gan, [])}
    images, objects = triangles()
    results, generators = {}, []
    for name, (script, flags) in runs.items():
        out = Path(args.out) / name.lower().replace(" ", "-")
        script.main([*common, *flags, "--out", str(out)])
        generator = models.load_generator(out / "last.pt")
        results[name] = lesson(generator, args.color, images, objects)
        generators.append((name, generator, args.color))

    print(f"\n{len(images)} triangles   chroma   committed")
    for name, (chroma, committed) in results.items():
        print(f"{name:13}   {chroma:6.2f}   {committed:9.2f}")
    figure = Path(args.out) / "sepia.png"
    evaluate.draw_comparison(generators, images[:4]).save(figure)
    print(f"drew {figure}")
    return results


if __name__ == "__main__":
    main()
