"""The training recipe of the usual notebook against this project's, for the U-Net.

    python tests/bench_recipe.py --dataset folder --data-dir datasets/cifar10 --amp auto

Both train the same network from the same weights on the same pictures, in the same precision:

    notebook   Adam at 1e-3, times 0.9 after each epoch; batches of 64 pictures as they are; the
               last weights
    ours       train_unet.py's defaults: constant, then falling rate; batches of 128, flipped and
               shifted; the moving average of the weights

It prints both recipes' validation figures after each epoch, and after how many epochs ours is
better than the notebook's best. Flags are train_unet.py's (--loss, --lr and --batch-size are of
ours alone); --json FILE saves the rows.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import train_unet  # noqa: E402


def train_as_a_notebook(args):
    """The rows of the notebook's recipe, one an epoch, measured on the validation pictures."""
    device = models.choose_device(args.device)
    autocast, scaler = models.mixed_precision(device, args.amp)
    training, validation, _ = data.load_training(args)
    images, held_out = training.images.to(device), validation.images.to(device)
    torch.manual_seed(args.seed)
    generator = models.GENERATORS[args.generator](data.CHANNELS[args.color], args.width)
    generator = generator.to(device, memory_format=data.memory_format(device))
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    rows = []
    for epoch in range(1, args.epochs + 1):
        generator.train()
        for chosen in torch.randperm(len(images), device=device).split(64):
            gray, target = data.to_gray_and_target(images[chosen], args.color)
            with autocast:
                output = generator(gray)
            loss = F.mse_loss(output, target)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        schedule.step()
        metrics, _ = evaluate.measure(evaluate.colorize(generator, held_out, args.color))
        rows.append({"recipe": "notebook", "epoch": epoch, **metrics})
        print(f"notebook, epoch {epoch}/{args.epochs}: mse {metrics['mse']:.5f}", flush=True)
    return rows


@evaluate.one_line_errors
def main(argv=None):
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--json", metavar="FILE")
    own, flags = own.parse_known_args(argv)
    flags = ["--width", "32", "--out", "runs/recipe", *flags]
    parser = train_unet.build_parser()
    parser.description = __doc__
    args = parser.parse_args(flags)

    train_unet.main(flags)
    history = models.load_checkpoint(Path(args.out, "last.pt"))["history"]
    names = ("mse", "psnr", "acc_2", "colorfulness_ratio", "ab_jsd")
    rows = [{"recipe": "ours", **row} for row in history] + train_as_a_notebook(args)
    print(f"\nrecipe    epoch {' '.join(f'{name:>18}' for name in names)}")
    for row in rows:
        print(f"{row['recipe']:8} {row['epoch']:6} {' '.join(f'{row[x]:18.5f}' for x in names)}")
    best = min(row["mse"] for row in rows if row["recipe"] == "notebook")
    passed = [row["epoch"] for row in history if row["mse"] < best]
    print(f"\nthe notebook's best mse {best:.5f}, ours at the end {history[-1]['mse']:.5f} "
          f"({history[-1]['mse'] / best - 1:+.1%}), "
          + (f"first better in epoch {passed[0]}" if passed else "never better"))
    if own.json:
        with models.replacing(own.json) as file:
            file.write((json.dumps(rows, indent=2) + "\n").encode())
    return rows


if __name__ == "__main__":
    main()
