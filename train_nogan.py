"""NoGAN: a feature loss, then the critic alone, then a short GAN.

A GAN's generator G and critic D (train_gan.py) learn from each other before either knows anything.
Here each first learns alone what it can learn alone:

    (0) a small classifier of the training pictures' labels, for its feature maps phi_i
    (1) the generator alone minimizes the feature loss
            F(G) = E[ |G(x) - y| + sum_i w_i |phi_i(G(x)) - phi_i(y)| ]
    (2) the critic alone minimizes, on pictures of the frozen G, as a binary classifier,
            -E[ s log D(x, y) + (1 - s) log(1 - D(x, y)) ] - E[ log(1 - D(x, G(x))) ]
    (3) both together, briefly: D minimizes (2), G minimizes -E[ log D(x, G(x)) ] + c F(G)

x is the gray picture, y its colours, |.| a mean, s = 0.9 one-sided label smoothing and c
--feature-weight, large: (3) is to add colour and keep the rest. F compares what a network sees in
both pictures, beside their bytes (Johnson et al., "Perceptual Losses", 2016, arXiv:1603.08155).
With --features vgg16_bn, phi is torchvision's network for ImageNet, with the layers and weights w_i
of DeOldify, and (0) is left out. NoGAN is Antic's: DeOldify, 2019, github.com/jantic/DeOldify.

    python train_nogan.py --generator-epochs 15 --gan-epochs 3                 # downloads CIFAR-10
    python train_nogan.py --dataset shapes --width 16 --out runs/nogan-shapes  # made-up pictures
"""

import argparse
import copy
import sys

import torch
import torch.nn.functional as F

import data
import evaluate
import models

REAL_LABEL = 0.9  # s, D's target for real pictures: below 1, so that D never grows too sure
GOOD_CRITIC = 0.8  # the accuracy below which the critic has little to teach
STAGES = ["classifier", "generator", "critic", "gan"]  # each has its flag, --<stage>-epochs


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, epochs = parser.add_argument, data.number(int, 1, 100_000)
    add("--classifier-epochs", type=epochs, default=5,
        help="(0): the classifier, with --features classifier (%(default)s)")
    add("--generator-epochs", type=epochs, default=15, help="(1): G alone (%(default)s)")
    add("--critic-epochs", type=epochs, default=2, help="(2): D alone (%(default)s)")
    add("--gan-epochs", type=epochs, default=3, help="(3): both together (%(default)s)")
    add("--lr", type=data.number(float, 1e-8, 10), default=1e-3,
        help="Adam's, in (0) and (1) (%(default)s)")
    add("--gan-lr", type=data.number(float, 1e-8, 10), default=2e-4,
        help="Adam's, in (2) and (3), for both networks (%(default)s)")
    add("--features", choices=["classifier", "vgg16_bn"], default="classifier",
        help="phi: trained here on the pictures' labels, or ImageNet's, downloaded (%(default)s)")
    add("--feature-weight", type=data.number(float, 0, 1e6), default=300.0,
        help="weight of the feature loss against the adversarial loss in (3) (%(default)s)")
    add("--generator", choices=list(models.GENERATORS), default="maxpool",
        help="the U-Net's way down: pooling, or strided convolutions (%(default)s)")
    add("--width", type=data.number(int, 1, 512), default=64,
        help="channels of the networks' first layers (%(default)s)")
    add("--discriminator", choices=["image", "patch"], default="image",
        help="judge the whole picture, or each 16x16 patch (%(default)s)")
    data.add_flags(parser)
    models.add_flags(parser, out="runs/nogan")
    return parser


def feature_loss(network, gray, output, target, color):
    """F: L1 of the colours, and weighted L1 of the network's feature maps of both pictures.

    gray (N, 1, H, W), output and target (N, 3 or 2, H, W), as `data.to_gray_and_target` gives them.
    """
    painted, truth = (network.maps(data.to_rgb(gray, x, color)) for x in (output, target))
    loss = F.l1_loss(output, target)
    for weight, painted_map, true_map in zip(network.map_weights, painted, truth):
        loss = loss + weight * F.l1_loss(painted_map, true_map)
    return loss


def critic_losses(critic, gray, target, fake, autocast):
    """The two terms of (2). Real and fake are separate batches: BatchNorm must not mix them."""
    with autocast:
        real_logits, fake_logits = critic(gray, target), critic(gray, fake)
    bce = F.binary_cross_entropy_with_logits
    return (bce(real_logits, torch.full_like(real_logits, REAL_LABEL)),
            bce(fake_logits, torch.zeros_like(fake_logits)))


@torch.no_grad()
def classifier_accuracy(classifier, images, labels):
    """Share of uint8 images (N, 3, H, W) whose label (N,) has the largest logit."""
    classifier.eval()
    guesses = [classifier(batch / 255).argmax(dim=1) for batch in images.split(256)]
    return (torch.cat(guesses) == labels).float().mean().item()


def paint(generator, images, args, autocast):
    """Batches of uint8 images (N, 3, H, W) in the generator's colours; leaves it in eval mode."""
    with autocast:
        outputs = evaluate.colorize(generator, images, args.color)
        painted = torch.cat([(255 * output).round().to(torch.uint8) for output, _ in outputs])
    return data.Batches(painted, args.color, args.batch_size, args.seed)


@torch.no_grad()
def critic_accuracy(critic, batches, fakes):
    """Share of right verdicts on batches (gray, target) and fakes (gray, painted).

    As in training, BatchNorm normalizes by the batch; a copy keeps it from learning from these.
    """
    critic, right, verdicts = copy.deepcopy(critic), 0, 0
    for (gray, target), (_, fake) in zip(batches, fakes):
        real_logits, fake_logits = critic(gray, target), critic(gray, fake)
        right += (real_logits > 0).sum() + (fake_logits <= 0).sum()
        verdicts += 2 * real_logits.numel()
    return right.item() / verdicts


def train(args, run, checkpoint):
    device = models.choose_device(args.device)
    autocast, scaler = models.mixed_precision(device, args.amp)
    training, validation, dropped = data.load_training(args)
    by_labels = args.features == "classifier"
    if by_labels and (training.labels is None or len(training.labels.unique()) < 2):
        raise models.RunError(
            f"the pictures in {args.data_dir} have no labels to tell apart for --features "
            "classifier: put them in class folders, or use --features vgg16_bn"
        )
    images, val_images = training.images.to(device), validation.images.to(device)
    batches = data.Batches(images, args.color, args.batch_size, args.seed)
    epochs = args.generator_epochs + args.critic_epochs + args.gan_epochs
    epochs += args.classifier_epochs if by_labels else 0
    run.start(epochs, device, batches, val_images, dropped)

    torch.manual_seed(args.seed)
    channels = data.CHANNELS[args.color]
    generator = models.GENERATORS[args.generator](channels, args.width)
    critic = models.Discriminator(channels, args.width, args.discriminator)
    if by_labels:
        labels, val_labels = training.labels.to(device), validation.labels.to(device)
        features = models.Classifier(1 + int(torch.cat([labels, val_labels]).max()), args.width)
    else:
        features = models.VGG16()
        if not checkpoint:  # which has its weights
            with data.download_timeout():
                features.load_imagenet()
    for network in (generator, critic, features):
        network.to(device, memory_format=torch.channels_last)
    betas = (0.5, 0.999)
    optimizer_f = torch.optim.Adam(features.parameters(), fused=True)
    optimizer_g = torch.optim.Adam(generator.parameters(), betas=betas, fused=True)
    optimizer_d = torch.optim.Adam(critic.parameters(), lr=args.gan_lr, betas=betas, fused=True)
    state = {"generator": generator, "optimizer_g": optimizer_g, "scaler": scaler,
             "critic": critic, "optimizer_d": optimizer_d,
             "features": features, "optimizer_f": optimizer_f}
    if checkpoint:
        models.restore(checkpoint, **state)
    run.save(run.done, **state)  # before the first step, so that there is always one to resume

    # (0) The classifier: cross-entropy of its logits and the labels.
    if by_labels:
        first, epochs = run.begin_stage(
            "classifier", args.classifier_epochs, "a classifier for its feature maps")
        steps = args.classifier_epochs * len(batches)
        labelled = data.Batches(images, args.color, args.batch_size, args.seed, labels)
        for epoch in epochs:
            features.train()
            run.begin_epoch(epoch)
            first_step = (epoch - first) * len(batches)
            for step, (gray, target, label) in enumerate(labelled.epoch(epoch), first_step):
                optimizer_f.param_groups[0]["lr"] = models.learning_rate(args.lr, step, steps)
                with autocast:
                    logits = features(data.to_rgb(gray, target, args.color))
                loss = F.cross_entropy(logits, label)
                optimizer_f.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer_f)
                scaler.update()
                run.step(cross_entropy=loss)
            run.end_epoch(accuracy=classifier_accuracy(features, val_images, val_labels))
            run.save(epoch, **state)
    features.eval().requires_grad_(False)

    # (1) The generator alone: minimize F(G).
    first, epochs = run.begin_stage(
        "generator", args.generator_epochs, "the generator alone, on the feature loss")
    steps = args.generator_epochs * len(batches)
    for epoch in epochs:
        generator.train()
        run.begin_epoch(epoch)
        for step, (gray, target) in enumerate(batches.epoch(epoch), (epoch - first) * len(batches)):
            optimizer_g.param_groups[0]["lr"] = models.learning_rate(args.lr, step, steps)
            with autocast:
                output = generator(gray)  # (B, 3 or 2, H, W) in [-1, 1]
                loss = feature_loss(features, gray, output, target, args.color)
            optimizer_g.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer_g)
            scaler.update()
            run.step(feature=loss)
        run.end_epoch(generator)
        run.save(epoch, **state)

    # (2) The critic alone: real pictures against the frozen generator's.
    first, epochs = run.begin_stage(
        "critic", args.critic_epochs, "the critic alone, on pictures of the frozen generator")
    if epochs:  # Painted once, and not anew in each epoch: cheaper from two epochs on.
        fakes = paint(generator, images, args, autocast)
        val_batches = data.Batches(val_images, args.color, args.batch_size, args.seed)
        val_fakes = paint(generator, val_images, args, autocast)
    for epoch in epochs:
        run.begin_epoch(epoch)
        for (gray, target), (_, fake) in zip(batches.epoch(epoch), fakes.epoch(epoch)):
            d_real, d_fake = critic_losses(critic, gray, target, fake, autocast)
            optimizer_d.zero_grad(set_to_none=True)
            scaler.scale(d_real + d_fake).backward()
            scaler.step(optimizer_d)
            scaler.update()
            run.step(d_real=d_real, d_fake=d_fake)
        accuracy = critic_accuracy(critic, val_batches.epoch(epoch), val_fakes.epoch(epoch))
        run.end_epoch(accuracy=accuracy)
        run.save(epoch, **state)
    if epochs and accuracy < GOOD_CRITIC:
        print(f"warning: the critic tells only {accuracy:.0%} of the pictures right and will teach "
              "little: raise --critic-epochs", file=sys.stderr)

    # (3) Both together, briefly.
    first, epochs = run.begin_stage("gan", args.gan_epochs, "both together")
    if epochs and epochs[0] == first:
        optimizer_g.state.clear()  # Adam's moments are those of another loss
    steps = args.gan_epochs * len(batches)
    for epoch in epochs:
        generator.train()
        run.begin_epoch(epoch)
        for step, (gray, target) in enumerate(batches.epoch(epoch), (epoch - first) * len(batches)):
            for optimizer in (optimizer_g, optimizer_d):
                optimizer.param_groups[0]["lr"] = models.learning_rate(args.gan_lr, step, steps)
            with autocast:
                fake = generator(gray)  # (B, 3 or 2, H, W) in [-1, 1]

            # Update D, as in (2).
            critic.requires_grad_(True)
            d_real, d_fake = critic_losses(critic, gray, target, fake.detach(), autocast)
            optimizer_d.zero_grad(set_to_none=True)
            scaler.scale(d_real + d_fake).backward()
            scaler.step(optimizer_d)

            # Update G: minimize -log D(x, G(x)) + c F(G).
            critic.requires_grad_(False)  # its gradients would be thrown away
            with autocast:
                logits = critic(gray, fake)
                feature = feature_loss(features, gray, fake, target, args.color)
            adversarial = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
            optimizer_g.zero_grad(set_to_none=True)
            scaler.scale(adversarial + args.feature_weight * feature).backward()
            scaler.step(optimizer_g)
            scaler.update()

            run.step(d_real=d_real, d_fake=d_fake, adversarial=adversarial, feature=feature)
        run.end_epoch(generator)
        run.save(epoch, **state)


@evaluate.one_line_errors
def main(argv=None):
    args, checkpoint = models.parse_args(build_parser(), "train_nogan", argv, STAGES)
    models.check_discriminator(args)
    with evaluate.Run("train_nogan", args, checkpoint) as run:
        train(args, run, checkpoint)


if __name__ == "__main__":
    main()
