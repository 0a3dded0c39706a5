"""Conditional DCGAN: adversarial + L1, as in pix2pix.

A generator G (a U-Net) paints the colours of the gray picture x; a discriminator D sees gray and
colours together and tells painted ones from real ones y. Each step updates both, once:

    (1) D minimizes   -E[ s log D(x, y) + (1 - s) log(1 - D(x, y)) ] - E[ log(1 - D(x, G(x))) ]
    (2) G minimizes   -E[ log D(x, G(x)) ] + l1 * E[ |G(x) - y| ]

D learns what a pixel loss cannot say, that a brownish gray is a colour few things have; L1 keeps G
near the truth. D = sigmoid(logit), so each term is a binary cross-entropy with logits. s = 0.9 is
one-sided label smoothing (Salimans et al., 2016, arXiv:1606.03498); s = 1 is the plain objective.
With --discriminator patch, D judges each 16x16 patch and E is also over patches. A D with a softmax
of two classes is the same: its loss depends on the difference of the two logits alone. In RGB, D
sees G(x) with its luma set to x, as y's is: a luma that is a little off would give G(x) away.

A DCGAN (Radford et al., 2015, arXiv:1511.06434) makes pictures out of noise z. This G has x, and
pix2pix (Isola et al., 2017, arXiv:1611.07004) found that a G that has x ignores z: a gray picture
always gets the same colours. Both papers' first weights are N(0, 0.02); PyTorch's did as well here.

    python train_gan.py --epochs 20 --l1 100                                 # CIFAR-10, downloaded
    python train_gan.py --color lab --discriminator patch --out runs/gan-lab
    python train_gan.py --dataset shapes --width 16 --out runs/gan-shapes    # made-up pictures
"""

import argparse
import copy

import torch
import torch.nn.functional as F

import data
import evaluate
import models

REAL_LABEL = 0.9  # s, D's target for real pictures: below 1, so that D never grows too sure
D_RATE = 0.2  # D's learning rate over G's; at 1, colours are more vivid and further off


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=data.number(int, 1, 100_000), default=20,
        help="passes over the training pictures (%(default)s)")
    add("--lr", type=data.number(float, 1e-8, 10), default=1e-3,
        help="G's learning rate, 5 times D's; both fall to 0 over the second half (%(default)s)")
    add("--l1", type=data.number(float, 0, 1e6), default=100.0,
        help="weight of L1 against the adversarial loss (%(default)s)")
    add("--discriminator", choices=["image", "patch"], default="image",
        help="judge the whole picture, or each 16x16 patch (%(default)s)")
    data.add_flags(parser)
    evaluate.add_flags(parser, out="runs/gan")
    return parser


def train(args, run):
    device = models.choose_device(args.device)
    autocast, scaler = models.mixed_precision(device, args.amp)
    training, validation, dropped = data.load_training(args)
    batches = data.Batches(training.images.to(device), args.color, args.batch_size, args.seed)
    run.start(args.epochs, batches, validation.images.to(device), dropped)

    torch.manual_seed(args.seed)
    channels = data.CHANNELS[args.color]
    generator = models.GENERATORS[args.generator](channels, args.width)
    generator = generator.to(device, memory_format=data.memory_format(device))
    discriminator = models.Discriminator(channels, args.width, args.discriminator)
    discriminator = discriminator.to(device, memory_format=data.memory_format(device))
    optimizer_g = torch.optim.Adam(generator.parameters(), betas=(0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), betas=(0.5, 0.999), fused=True)
    averaged = copy.deepcopy(generator).eval().requires_grad_(False)  # validated, and the result
    run.keep(generator=averaged, generator_in_training=generator, optimizer_g=optimizer_g,
             discriminator=discriminator, optimizer_d=optimizer_d, scaler=scaler)
    bce = F.binary_cross_entropy_with_logits

    for epoch in run.stage(args.epochs):
        generator.train()
        for gray, target in batches.epoch(epoch):
            rate = models.learning_rate(args.lr, run.progress)
            optimizer_g.param_groups[0]["lr"] = rate
            optimizer_d.param_groups[0]["lr"] = D_RATE * rate
            with autocast:
                output = generator(gray)  # (B, 3 or 2, H, W) in [-1, 1]
                fake = data.keep_gray(gray, output, args.color)  # for D: with x's luma, as y

            # (1) update D: minimize -log D(x, y) - log(1 - D(x, G(x))), the first label smoothed.
            # In two batches: in one, BatchNorm would normalize real and fake together.
            discriminator.requires_grad_(True)
            with autocast:
                real_logits = discriminator(gray, target)
                fake_logits = discriminator(gray, fake.detach())
            d_real = bce(real_logits, torch.full_like(real_logits, REAL_LABEL))
            d_fake = bce(fake_logits, torch.zeros_like(fake_logits))
            optimizer_d.zero_grad()
            scaler.scale(d_real + d_fake).backward()
            models.average_gradients(discriminator)
            scaler.step(optimizer_d)

            # (2) update G: minimize -log D(x, G(x)) + l1 * |G(x) - y|
            discriminator.requires_grad_(False)  # its gradients would be thrown away
            with autocast:
                logits = discriminator(gray, fake)
            adversarial = bce(logits, torch.ones_like(logits))
            l1 = F.l1_loss(output, target)
            optimizer_g.zero_grad()
            scaler.scale(adversarial + args.l1 * l1).backward()
            models.average_gradients(generator)
            scaler.step(optimizer_g)
            scaler.update()

            models.update_average(averaged, generator, run.steps)
            run.log(d_real=d_real, d_fake=d_fake, adversarial=adversarial, l1=l1)
        run.end_epoch(averaged)


@evaluate.one_line_errors
def main(argv=None):
    args, checkpoint = models.parse_args(build_parser(), "train_gan", argv)
    with evaluate.Run("train_gan", args, checkpoint) as run:
        train(args, run)


if __name__ == "__main__":
    main()
