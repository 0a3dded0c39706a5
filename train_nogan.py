"""NoGAN: a feature loss, then the critic alone, then a short GAN.

In a GAN (train_gan.py), generator G and discriminator D learn from each other while neither knows
anything yet. NoGAN first trains each by itself, as far as that goes, and needs little of the GAN:

    (0) a small classifier of the training pictures' labels, for its feature maps phi_i
    (1) the generator alone minimizes the feature loss
            F(G) = E[ |G(x) - y| + sum_i w_i |phi_i(G(x)) - phi_i(y)| ]
    (2) the discriminator alone minimizes, on pictures of the frozen G, as a binary classifier,
            -E[ s log D(x, y) + (1 - s) log(1 - D(x, y)) ] - E[ log(1 - D(x, G(x))) ]
    (3) both together, briefly: D minimizes (2), G minimizes -E[ log D(x, G(x)) ] + c F(G)

x is the gray picture, y its colours, |.| a mean absolute value, s = 0.9 as in train_gan.py and c
--feature-weight, large: (3) is to add colour and keep the rest. F compares the colours and what phi
sees in both pictures, in RGB and with the gray x (Johnson et al., 2016, arXiv:1603.08155).
With --features vgg16_bn, phi is torchvision's for ImageNet, with DeOldify's layers and w_i, and (0)
is left out. NoGAN is Antic's: DeOldify, 2019, github.com/jantic/DeOldify. He calls D the critic.

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
D_RATE = 0.2  # D's learning rate over G's; at 1, one G painted red blots into dark corners
GOOD_CRITIC = 0.8  # the accuracy below which D has little to teach
STAGES = ["classifier", "generator", "critic", "gan"]  # each has its flag, --<stage>-epochs


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, epochs = parser.add_argument, data.number(int, 1, 100_000)
    add("--classifier-epochs", type=epochs, default=5,
        help="(0): the classifier, with --features classifier (%(default)s)")
    add("--generator-epochs", type=epochs, default=15, help="(1): G alone (%(default)s)")
    add("--critic-epochs", type=epochs, default=2, help="(2): D alone (%(default)s)")
    add("--gan-epochs", type=epochs, default=3, help="(3): both together (%(default)s)")
    add("--lr", type=data.number(float, 1e-8, 10), default=1e-3,
        help="learning rate in (0) and (1); it falls to 0 over each second half (%(default)s)")
    add("--gan-lr", type=data.number(float, 1e-8, 10), default=1e-3,
        help="G's learning rate in (3), 5 times D's; in (2) D's is constant (%(default)s)")
    add("--features", choices=["classifier", "vgg16_bn"], default="classifier",
        help="phi: trained here on the pictures' labels, or ImageNet's, downloaded (%(default)s)")
    add("--feature-weight", type=data.number(float, 0, 1e6), default=75.0,
        help="weight of the feature loss against the adversarial loss in (3) (%(default)s)")
    add("--discriminator", choices=["image", "patch"], default="image",
        help="judge the whole picture, or each 16x16 patch (%(default)s)")
    data.add_flags(parser)
    evaluate.add_flags(parser, out="runs/nogan")
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


def discriminator_losses(discriminator, gray, target, fake, autocast):
    """The two terms of (2), for D alone. Real and fake are apart: BatchNorm must not mix them."""
    bce = F.binary_cross_entropy_with_logits
    with autocast:
        real_logits, fake_logits = discriminator(gray, target), discriminator(gray, fake.detach())
    return (bce(real_logits, torch.full_like(real_logits, REAL_LABEL)),
            bce(fake_logits, torch.zeros_like(fake_logits)))


@torch.no_grad()
def classifier_accuracy(classifier, images, labels):
    """Share of uint8 images (N, 3, H, W) whose label (N,) has the largest logit."""
    classifier.eval()
    guesses = [classifier(batch / 255).argmax(dim=1) for batch in data.in_batches(images)]
    return (torch.cat(guesses) == labels).float().mean().item()


@torch.no_grad()
def discriminator_accuracy(discriminator, generator, batches, epoch):
    """Share of right verdicts on an epoch of `batches` and what the generator paints from it.

    BatchNorm takes the batch's statistics, as in training; a copy of D takes its updates.
    """
    discriminator, right, verdicts = copy.deepcopy(discriminator), 0, 0
    for gray, target in batches.epoch(epoch):
        fake = data.keep_gray(gray, generator(gray), batches.color)
        real_logits, fake_logits = discriminator(gray, target), discriminator(gray, fake)
        right += (real_logits > 0).sum() + (fake_logits <= 0).sum()
        verdicts += 2 * real_logits.numel()
    return right.item() / verdicts


def train_classifier(args, run, batches, val_labels, classifier, autocast, scaler):
    """(0) The classifier: cross-entropy of its logits and the labels."""
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    for epoch in run.stage(args.classifier_epochs, "classifier", "on labels", optimizer=optimizer):
        classifier.train()
        for gray, target, labels in batches.epoch(epoch):
            optimizer.param_groups[0]["lr"] = models.learning_rate(args.lr, run.progress)
            with autocast:
                logits = classifier(data.to_rgb(gray, target, args.color))
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            models.average_gradients(classifier)
            scaler.step(optimizer)
            scaler.update()
            run.log(cross_entropy=loss)
        run.end_epoch(accuracy=classifier_accuracy(classifier, run.validation, val_labels))


def train_generator(args, run, batches, averaged, feature_network, autocast, scaler):
    """(1) The generator alone: minimize F(G)."""
    generator = copy.deepcopy(averaged).requires_grad_(True)
    optimizer = torch.optim.Adam(generator.parameters(), fused=True)
    for epoch in run.stage(args.generator_epochs, "generator", "alone, on the feature loss",
                           generator_in_training=generator, optimizer=optimizer):
        generator.train()
        for gray, target in batches.epoch(epoch):
            optimizer.param_groups[0]["lr"] = models.learning_rate(args.lr, run.progress)
            with autocast:
                output = generator(gray)  # (B, 3 or 2, H, W) in [-1, 1]
                loss = feature_loss(feature_network, gray, output, target, args.color)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            models.average_gradients(generator)
            scaler.step(optimizer)
            scaler.update()
            models.update_average(averaged, generator, run.steps)
            run.log(feature=loss)
        run.end_epoch(averaged)


def train_discriminator(args, run, batches, generator, discriminator, optimizer, autocast, scaler):
    """(2) The discriminator alone, on pictures of the frozen generator."""
    validation = data.Batches(run.validation, args.color, args.batch_size, args.seed)
    optimizer.param_groups[0]["lr"] = D_RATE * args.gan_lr  # constant
    for epoch in run.stage(args.critic_epochs, "critic", "alone, on what the frozen G paints"):
        for gray, target in batches.epoch(epoch):
            with autocast, torch.no_grad():
                fake = data.keep_gray(gray, generator(gray), args.color)  # as in (3), not clipped
            d_real, d_fake = discriminator_losses(discriminator, gray, target, fake, autocast)
            optimizer.zero_grad()
            scaler.scale(d_real + d_fake).backward()
            models.average_gradients(discriminator)
            scaler.step(optimizer)
            scaler.update()
            run.log(d_real=d_real, d_fake=d_fake)
        accuracy = discriminator_accuracy(discriminator, generator, validation, epoch)
        run.end_epoch(accuracy=accuracy)
        if run.is_first and run.progress == 1 and accuracy < GOOD_CRITIC:
            print(f"warning: the critic tells only {accuracy:.0%} of the pictures right and will "
                  "teach little: raise --critic-epochs", file=sys.stderr)


def train_gan(args, run, batches, averaged, discriminator, optimizer_d, feature_network, autocast,
              scaler):
    """(3) Both together, briefly: train_gan.py's two updates, with F in the place of L1."""
    generator = copy.deepcopy(averaged).requires_grad_(True)  # whose pictures D has seen in (2)
    optimizer_g = torch.optim.Adam(generator.parameters(), betas=(0.5, 0.999), fused=True)
    for epoch in run.stage(args.gan_epochs, "gan", "both together",
                           generator_in_training=generator, optimizer_g=optimizer_g):
        generator.train()
        for gray, target in batches.epoch(epoch):
            rate = models.learning_rate(args.gan_lr, run.progress)
            optimizer_g.param_groups[0]["lr"] = rate
            optimizer_d.param_groups[0]["lr"] = D_RATE * rate
            with autocast:
                output = generator(gray)  # (B, 3 or 2, H, W) in [-1, 1]
                fake = data.keep_gray(gray, output, args.color)  # for D, as in train_gan.py

            # Update D, as in (2).
            discriminator.requires_grad_(True)
            d_real, d_fake = discriminator_losses(discriminator, gray, target, fake, autocast)
            optimizer_d.zero_grad()
            scaler.scale(d_real + d_fake).backward()
            models.average_gradients(discriminator)
            scaler.step(optimizer_d)

            # Update G: minimize -log D(x, G(x)) + c F(G).
            discriminator.requires_grad_(False)  # its gradients would be thrown away
            with autocast:
                logits = discriminator(gray, fake)
                feature = feature_loss(feature_network, gray, output, target, args.color)
            adversarial = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
            optimizer_g.zero_grad()
            scaler.scale(adversarial + args.feature_weight * feature).backward()
            models.average_gradients(generator)
            scaler.step(optimizer_g)
            scaler.update()

            models.update_average(averaged, generator, run.steps)
            run.log(d_real=d_real, d_fake=d_fake, adversarial=adversarial, feature=feature)
        run.end_epoch(averaged)


def build_feature_network(args, labels, val_labels):
    """phi, on the CPU: a classifier of all labels (N,), yet to be trained, or ImageNet's VGG-16."""
    if args.features == "classifier":
        if labels is None or data.over_processes(len(labels.unique()), "MAX") < 2:
            raise models.RunError(f"the pictures in {args.data_dir} have no labels to tell apart: "
                                  "put them in class folders, or use --features vgg16_bn")
        last = data.over_processes(int(torch.cat([labels, val_labels]).max()), "MAX")
        return models.Classifier(1 + last, args.width)
    network = models.VGG16()
    if not args.resume:  # the checkpoint has its weights
        with data.downloading():
            network.load_imagenet()
    return network


def train(args, run):
    device = models.choose_device(args.device)
    autocast, scaler = models.mixed_precision(device, args.amp)
    training, validation, dropped = data.load_training(args)
    torch.manual_seed(args.seed)
    channels = data.CHANNELS[args.color]
    generator = models.GENERATORS[args.generator](channels, args.width)
    discriminator = models.Discriminator(channels, args.width, args.discriminator)
    feature_network = build_feature_network(args, training.labels, validation.labels)
    for network in (generator, discriminator, feature_network):
        network.to(device, memory_format=data.memory_format(device))

    batches = data.Batches(training.images.to(device), args.color, args.batch_size, args.seed)
    by_labels = args.features == "classifier"
    epochs = args.generator_epochs + args.critic_epochs + args.gan_epochs
    epochs += by_labels * args.classifier_epochs
    run.start(epochs, batches, validation.images.to(device), dropped)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), betas=(0.5, 0.999), fused=True)
    averaged = copy.deepcopy(generator).eval().requires_grad_(False)  # validated, and the result
    run.keep(generator=averaged, discriminator=discriminator, optimizer_d=optimizer_d,
             feature_network=feature_network, scaler=scaler)

    if by_labels:
        labels, val_labels = training.labels.to(device), validation.labels.to(device)
        labelled = data.Batches(batches.images, args.color, args.batch_size, args.seed, labels)
        train_classifier(args, run, labelled, val_labels, feature_network, autocast, scaler)
    feature_network.eval().requires_grad_(False)
    train_generator(args, run, batches, averaged, feature_network, autocast, scaler)
    train_discriminator(args, run, batches, averaged, discriminator, optimizer_d, autocast, scaler)
    train_gan(args, run, batches, averaged, discriminator, optimizer_d, feature_network,
              autocast, scaler)


@evaluate.one_line_errors
def main(argv=None):
    args, checkpoint = models.parse_args(build_parser(), "train_nogan", argv, STAGES)
    with evaluate.Run("train_nogan", args, checkpoint) as run:
        train(args, run)


if __name__ == "__main__":
    main()
