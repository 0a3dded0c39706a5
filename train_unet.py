"""U-Net autoencoder: a pixel loss alone.

A U-Net G looks at the gray picture x and paints the colours y, by minimizing

    L(G) = E[ (G(x) - y)^2 ]     (--loss mse)     or     E[ |G(x) - y| ]     (--loss l1)

over pixels. Where x does not tell the colour, the squared error is least at the mean of all colours
it could be, and the mean of many colours is a brownish gray: the sepia effect. Such pictures are
faithful on average and pale; train_gan.py is an answer to that.
Networks: Ronneberger et al., "U-Net", 2015, arXiv:1505.04597; with --generator strided the U-Net of
Nazeri et al., 2018, arXiv:1803.05400; theirs paints L*, too; --color lab keeps the given L*.

    python train_unet.py --epochs 20                                         # CIFAR-10, downloaded
    python train_unet.py --color lab --generator strided --out runs/strided-lab
    python train_unet.py --dataset shapes --width 16 --out runs/unet-shapes  # made-up pictures
"""

import argparse
import copy

import torch
import torch.nn.functional as F

import data
import evaluate
import models


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=data.number(int, 1, 100_000), default=20,
        help="passes over the training pictures (%(default)s)")
    add("--lr", type=data.number(float, 1e-8, 10), default=1e-3,
        help="learning rate of Adam; it falls to 0 over the second half (%(default)s)")
    add("--loss", choices=["mse", "l1"], default="mse", help="the pixel loss (%(default)s)")
    data.add_flags(parser)
    evaluate.add_flags(parser, out="runs/unet")
    return parser


def train(args, run):
    device = models.choose_device(args.device)
    autocast, scaler = models.mixed_precision(device, args.amp)
    training, validation, dropped = data.load_training(args)
    batches = data.Batches(training.images.to(device), args.color, args.batch_size, args.seed,
                           shift=3)  # pixels each way; unshifted, width 32 overfits in the end
    run.start(args.epochs, batches, validation.images.to(device), dropped)

    torch.manual_seed(args.seed)
    generator = models.GENERATORS[args.generator](data.CHANNELS[args.color], args.width)
    generator = generator.to(device, memory_format=data.memory_format(device))
    # Fused: one kernel updates all weights, and nothing waits for the device.
    optimizer = torch.optim.Adam(generator.parameters(), fused=True)
    averaged = copy.deepcopy(generator).eval().requires_grad_(False)  # validated, and the result
    run.keep(generator=averaged, generator_in_training=generator, optimizer=optimizer,
             scaler=scaler)
    pixel_loss = F.mse_loss if args.loss == "mse" else F.l1_loss

    for epoch in run.stage(args.epochs):
        generator.train()
        for gray, target in batches.epoch(epoch):
            optimizer.param_groups[0]["lr"] = models.learning_rate(args.lr, run.progress)
            with autocast:
                output = generator(gray)  # (B, 3 or 2, H, W) in [-1, 1]
            loss = pixel_loss(output, target)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            models.average_gradients(generator)
            scaler.step(optimizer)
            scaler.update()
            models.update_average(averaged, generator, run.steps)
            run.log(loss=loss)
        run.end_epoch(averaged)


@evaluate.one_line_errors
def main(argv=None):
    args, checkpoint = models.parse_args(build_parser(), "train_unet", argv)
    with evaluate.Run("train_unet", args, checkpoint) as run:
        train(args, run)


if __name__ == "__main__":
    main()
