"""The networks, and the checkpoints they are saved in.

    UNet, StridedUNet   gray (N, 1, H, W) -> colour (N, 3 or 2, H, W) in [-1, 1]
    Discriminator       gray and colour -> logits: real or generated?
    Classifier, VGG16   RGB (N, 3, H, W) in [0, 1] -> the feature maps that NoGAN compares

All return float32 whatever the precision inside, so that losses and colours are computed in it.
Below them: where a network runs (device, mixed precision), and how it is saved, resumed and loaded.
"""

import argparse
import contextlib
import functools
import os
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

CHECKPOINT_FORMAT = 2  # 1: U-Nets that went up by transposed convolutions
CHECKPOINT_KEYS = {"script": str, "args": dict, "epoch": int, "history": list, "generator": dict}
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# On --resume: where it runs and what it keeps may change, not what is learned.
MAY_CHANGE = {"device", "amp", "data_dir", "out", "keep_every"}


class RunError(Exception):
    """A mistake about a run or its checkpoint that the user can mend; the message is one line."""


def in_short(error):
    """What an exception says, in one line of at most 200 letters."""
    return textwrap.shorten(str(error).strip() or type(error).__name__, 200, placeholder=" ...")


# --------------------------------------------------------------------------------------- networks


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1; on a CPU, maps of 2x2 (a U-Net's bottom) by matrix product."""

    def forward(self, x):  # (N, C, H, W) -> (N, C', H, W)
        if x.device.type == "cpu" and x.shape[2:] == (2, 2):  # there oneDNN takes twice as long
            patches = F.unfold(x, kernel_size=3, padding=1).mT  # (N, 4, 9 C)
            return F.linear(patches, self.weight.flatten(1), self.bias).mT.unflatten(2, (2, 2))
        return super().forward(x)


def _convolution(channels_in, channels_out, kernel_size, stride=1, padding=1):
    """A convolution with BatchNorm and LeakyReLU: what all networks below are made of."""
    convolution = Conv3x3 if (kernel_size, stride, padding) == (3, 1, 1) else nn.Conv2d
    return nn.Sequential(
        convolution(channels_in, channels_out, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(channels_out), nn.LeakyReLU(0.2, inplace=True))


def _two_convolutions(channels_in, channels_out):
    first = _convolution(channels_in, channels_out, kernel_size=3)
    return first.extend(_convolution(channels_out, channels_out, kernel_size=3))


class UNet(nn.Module):
    """The five-level max-pool U-Net of Ronneberger et al., 2015 (arXiv:1505.04597).

    gray (N, 1, H, W), H and W multiples of 16 -> (N, out_channels, H, W) in [-1, 1], float32.
    `width`: channels at full resolution, 64 in the paper: 29 million parameters (there 31).
    """

    def __init__(self, out_channels, width=64):
        super().__init__()
        w = width
        self.enc1 = _two_convolutions(1, w)
        self.enc2 = _two_convolutions(w, 2 * w)
        self.enc3 = _two_convolutions(2 * w, 4 * w)
        self.enc4 = _two_convolutions(4 * w, 8 * w)
        self.bottom = _two_convolutions(8 * w, 16 * w)
        self.up4, self.dec4 = self._up(16 * w, 8 * w), _two_convolutions(16 * w, 8 * w)
        self.up3, self.dec3 = self._up(8 * w, 4 * w), _two_convolutions(8 * w, 4 * w)
        self.up2, self.dec2 = self._up(4 * w, 2 * w), _two_convolutions(4 * w, 2 * w)
        self.up1, self.dec1 = self._up(2 * w, w), _two_convolutions(2 * w, w)
        self.head = nn.Conv2d(w, out_channels, kernel_size=1)

    def forward(self, gray):
        e1 = self.enc1(gray)  # (N, w, H, W)
        e2 = self.enc2(F.max_pool2d(e1, 2))  # (N, 2w, H/2, W/2)
        e3 = self.enc3(F.max_pool2d(e2, 2))  # (N, 4w, H/4, W/4)
        e4 = self.enc4(F.max_pool2d(e3, 2))  # (N, 8w, H/8, W/8)
        x = self.bottom(F.max_pool2d(e4, 2))  # (N, 16w, H/16, W/16)
        # CUDA's autocast upsamples in float32; cat would then make e4 to e1 float32, too.
        x = self.dec4(torch.cat([self.up4(x).to(e4.dtype), e4], dim=1))  # (N, 8w, H/8, W/8)
        x = self.dec3(torch.cat([self.up3(x).to(e3.dtype), e3], dim=1))  # (N, 4w, H/4, W/4)
        x = self.dec2(torch.cat([self.up2(x).to(e2.dtype), e2], dim=1))  # (N, 2w, H/2, W/2)
        x = self.dec1(torch.cat([self.up1(x).to(e1.dtype), e1], dim=1))  # (N, w, H, W)
        return torch.tanh(self.head(x).float())  # (N, out_channels, H, W)

    @staticmethod
    def _up(channels_in, channels_out):
        # The paper's transposed convolution of stride 2 leaves its grid in flat skies (Odena et
        # al., 2016, doi:10.23915/distill.00003). The 1x1 convolution costs less before upsampling.
        return nn.Sequential(nn.Conv2d(channels_in, channels_out, kernel_size=1),
                             nn.Upsample(scale_factor=2, mode="bilinear"))


class StridedUNet(nn.Module):
    """The U-Net of Nazeri et al., 2018 (arXiv:1803.05400): strides instead of pooling.

    Takes and returns what UNet does. One 4x4 convolution a level: 17 million parameters.
    """

    def __init__(self, out_channels, width=64):
        super().__init__()
        w = width
        up = functools.partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1, bias=False)
        same = nn.ZeroPad2d((1, 2, 1, 2))  # 4x4 kernels keep the size with 3 pixels of padding
        self.enc1 = nn.Sequential(same, *_convolution(1, w, 4, padding=0))
        self.enc2 = _convolution(w, 2 * w, 4, stride=2)
        self.enc3 = _convolution(2 * w, 4 * w, 4, stride=2)
        self.enc4 = _convolution(4 * w, 8 * w, 4, stride=2)
        self.bottom = _convolution(8 * w, 8 * w, 4, stride=2)
        self.up4, self.act4 = up(8 * w, 8 * w), self._activation(16 * w)
        self.up3, self.act3 = up(16 * w, 4 * w), self._activation(8 * w)
        self.up2, self.act2 = up(8 * w, 2 * w), self._activation(4 * w)
        self.up1, self.act1 = up(4 * w, w), self._activation(2 * w)
        self.head = nn.Conv2d(2 * w, out_channels, kernel_size=1)

    def forward(self, gray):
        e1 = self.enc1(gray)  # (N, w, H, W)
        e2 = self.enc2(e1)  # (N, 2w, H/2, W/2)
        e3 = self.enc3(e2)  # (N, 4w, H/4, W/4)
        e4 = self.enc4(e3)  # (N, 8w, H/8, W/8)
        x = self.bottom(e4)  # (N, 8w, H/16, W/16)
        x = self.act4(torch.cat([self.up4(x), e4], dim=1))  # (N, 16w, H/8, W/8)
        x = self.act3(torch.cat([self.up3(x), e3], dim=1))  # (N, 8w, H/4, W/4)
        x = self.act2(torch.cat([self.up2(x), e2], dim=1))  # (N, 4w, H/2, W/2)
        x = self.act1(torch.cat([self.up1(x), e1], dim=1))  # (N, 2w, H, W)
        return torch.tanh(self.head(x).float())  # (N, out_channels, H, W)

    @staticmethod
    def _activation(channels):
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


GENERATORS = {"maxpool": UNet, "strided": StridedUNet}  # the values of --generator


class Discriminator(nn.Module):
    """A conditional DCGAN discriminator (Radford et al., 2015): is this colour real for this gray?

    gray (N, 1, H, W) and color (N, color_channels, H, W) -> float32 logits, above 0 for "real".
    head "image": one verdict on the whole picture, (N, 1). 32 px are halved to 4x4 and one 4x4
    convolution judges them; in larger pictures the verdict is the mean over what remains.
    head "patch": one verdict on each patch, (N, 1, H/2 - 2, W/2 - 2), as in pix2pix (Isola et al.,
    2017). A logit sees 16x16 pixels, a quarter of a CIFAR-10 picture's area.
    """

    def __init__(self, color_channels, width=64, head="image"):
        super().__init__()
        w = width
        layers = [nn.Conv2d(1 + color_channels, w, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        if head == "image":
            layers += _convolution(w, 2 * w, 4, stride=2)  # (N, 2w, H/4, W/4)
            layers += _convolution(2 * w, 4 * w, 4, stride=2)  # (N, 4w, H/8, W/8)
            layers += [nn.Conv2d(4 * w, 1, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]  # (N, 1)
        else:
            layers += _convolution(w, 2 * w, 4)  # (N, 2w, H/2 - 1, W/2 - 1)
            layers += [nn.Conv2d(2 * w, 1, 4, padding=1)]  # (N, 1, H/2 - 2, W/2 - 2)
        self.layers = nn.Sequential(*layers)

    def forward(self, gray, color):
        return self.layers(torch.cat([gray, color], dim=1)).float()


class Classifier(nn.Module):
    """A small VGG-like classifier, wanted for its feature maps: three units, a mean, a linear map.

    RGB (N, 3, H, W) in [0, 1] -> logits (N, classes); `maps` gives the feature maps.
    """

    map_weights = (1.0, 1.0, 1.0)  # on CIFAR-10, each map's L1 is about as large as the pixels'

    def __init__(self, classes, width=64):
        super().__init__()
        w = width
        self.unit1 = _two_convolutions(3, w)
        self.unit2 = _two_convolutions(w, 2 * w)
        self.unit3 = _two_convolutions(2 * w, 4 * w)
        self.head = nn.Linear(4 * w, classes)

    def maps(self, rgb):
        m1 = self.unit1(2 * rgb - 1)  # (N, w, H, W)
        m2 = self.unit2(F.max_pool2d(m1, 2))  # (N, 2w, H/2, W/2)
        m3 = self.unit3(F.max_pool2d(m2, 2))  # (N, 4w, H/4, W/4)
        return [m1.float(), m2.float(), m3.float()]

    def forward(self, rgb):
        return self.head(self.maps(rgb)[-1].mean(dim=(2, 3))).float()


class VGG16(nn.Module):
    """torchvision's vgg16_bn (Simonyan and Zisserman, 2014), as far as its feature maps are wanted.

    `maps` gives those before the last three poolings, and `map_weights` their weights, as in
    DeOldify's loss.py; RGB (N, 3, H, W) in [0, 1]. Its own weights are yet to be loaded.
    """

    map_layers, map_weights = (22, 32, 42), (20.0, 70.0, 10.0)

    def __init__(self):
        super().__init__()
        from torchvision.models import vgg16_bn  # takes seconds, so not at the start
        with torch.device("meta"):  # no memory, no time for what will be loaded or left out
            layers = vgg16_bn().features[: self.map_layers[-1] + 1]
        self.layers = layers.to_empty(device="cpu")
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # ImageNet's
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)

    def maps(self, rgb):
        x, maps = (rgb - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.map_layers:
                maps.append(x.float())
        return maps  # (N, 256, H/4, W/4), (N, 512, H/8, W/8), (N, 512, H/16, W/16)

    def load_imagenet(self):
        """Load torchvision's ImageNet weights, cached or downloaded. Raises RunError."""
        from torchvision.models import VGG16_BN_Weights
        weights = VGG16_BN_Weights.IMAGENET1K_V1
        try:
            state = weights.get_state_dict(check_hash=True, weights_only=True)
            zero = torch.tensor(0)  # BatchNorm's counters are younger than the file
            self.layers.load_state_dict({name: state.get(f"features.{name}", zero)
                                         for name in self.layers.state_dict()})
        except Exception as error:  # a damaged file can raise almost any exception
            file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            raise RunError(f"the weights of vgg16_bn are not whole at {file} and could not be "
                           f"downloaded ({in_short(error)}): put {weights.url} there, or use "
                           "--features classifier") from error


# ------------------------------------------------------------------------ where and how they train


def join_processes():
    """Under torchrun, wait for all of its processes: then they can work together."""
    if PROCESSES > 1 and not dist.is_initialized():
        nccl = torch.cuda.is_available() and dist.is_nccl_available()  # which Windows has not
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
        if RANK > 0:  # the first one speaks for all
            sys.stdout = open(os.devnull, "w")


@torch.no_grad()
def average(tensors):
    """Set tensors to their means over all processes, in one all-reduce. Alone, do nothing."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def average_gradients(network):
    """After backward(): the gradients of the batch that all processes have together."""
    average([p.grad for p in network.parameters() if p.grad is not None])


def choose_device(name):
    """A torch.device from --device; "auto" is CUDA, else MPS, else the CPU. Raises RunError.

    Sets cuDNN up for it: float32 means float32, not TF32, and it searches for its fastest kernels.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = "cuda" if cuda else "mps" if mps and PROCESSES == 1 else "cpu"  # gloo has no MPS
    try:
        if name == "cuda" and PROCESSES > 1:  # each process has a card of its own
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.zeros(1, device=name).device
        if device.type not in ("cuda", "mps", "cpu"):
            raise ValueError("it is not for training")
    except Exception as error:  # each kind of device has errors of its own
        raise RunError(f"--device {name} cannot be used: use auto or cpu ({in_short(error)})")
    return device


def amp_dtype(device, amp):
    """The 16-bit type that autocast uses under --amp, or None for float32 throughout."""
    if amp == "off" or (amp == "auto" and device.type != "cuda"):
        return None
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return torch.float16  # NVIDIA's cards before Ampere only emulate bfloat16
    return torch.bfloat16


def mixed_precision(device, amp):
    """(autocast, scaler) for a training loop; both do nothing in float32.

    Autocast computes in 16 bits where that is safe. The GradScaler keeps small gradients from
    becoming 0 in float16; bfloat16 has the range of float32 and needs none.
    """
    dtype = amp_dtype(device, amp)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def learning_rate(lr, progress):
    """`lr` up to a `progress` of 0.5, then linearly down to 0 at 1, as in CycleGAN."""
    return lr * min(1.0, 2 * (1 - progress))


@torch.no_grad()
def update_average(averaged, network, step):
    """Move `averaged`, a copy of `network`, a little towards it, after step `step`, counted from 0.

    An exponential moving average of weights and BatchNorm's statistics, over about the last tenth
    of the steps, at most 1,000: it lacks the noise of single steps, and soon forgets the start.
    """
    decay = min(0.999, (1 + step) / (10 + step))
    old, new = ([x for x in [*net.parameters(), *net.buffers()] if x.is_floating_point()]
                for net in (averaged, network))  # all but BatchNorm's counters
    torch._foreach_lerp_(old, new, 1 - decay)  # one kernel for all weights


# ------------------------------------------------------------------------------------ checkpoints


@contextlib.contextmanager
def replacing(path):
    """A binary file beside `path` (parents are made), renamed over it once it is whole and flushed.

    A crash leaves the old file whole; no two processes write into one. Raises RunError.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise RunError(f"cannot write {path}: it is a folder or a device, choose another place")
    beside = Path(path).with_name(f".{os.getpid()}-{os.urandom(4).hex()}.new")  # pids may recur
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for attempt in range(25, 0, -1):
            try:
                os.replace(beside, path)
                break
            except PermissionError:  # Windows, while another program reads the file
                if attempt == 1:
                    raise
                time.sleep(0.2)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError):  # torch.save's, for whatever stopped it
            error = error.__context__ or error
        if isinstance(error, KeyboardInterrupt):
            raise error from None
        raise RunError(f"cannot write {path}: make room, close the program that holds it, or "
                       f"choose another place ({in_short(error)})")
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def claim(folder):
    """Make a run's folder and keep other runs out of it until what this returns is closed.

    The claim ends with the process, too. Raises RunError where another has it or it is read-only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write into {folder}")
        if os.name == "nt":  # Windows deletes a temporary file with the process that has it open
            lock = os.open(folder / "claimed", os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        else:
            import fcntl
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if folder.is_dir() and isinstance(error, (BlockingIOError, FileExistsError)):  # Windows'
            raise RunError(f"another run writes into {folder}: wait for it or choose another --out")
        raise RunError(f"cannot write {folder}: choose another place ({in_short(error)})")
    for leftover in [*folder.glob(".[0-9]*.new"), *folder.glob("samples/.[0-9]*.new")]:  # of a kill
        leftover.unlink()
    return lock


def save_checkpoint(path, script, args, epoch, history, **state):
    """Write one file that rebuilds its model and says how it was trained.

    args: dict of plain values. history: the rows of the log, dicts. state: what else to keep;
    networks, optimizers and scalers by their state_dict. Raises RunError; the old file stays whole.
    """
    content = dict(format=CHECKPOINT_FORMAT, script=script, args=args, epoch=epoch, history=history)
    for name, value in state.items():
        content[name] = value.state_dict() if hasattr(value, "state_dict") else value
    with replacing(path) as file:
        torch.save(content, file)


def load_checkpoint(path):
    """The dict that `save_checkpoint` wrote, on the CPU. Raises RunError.

    Only tensors and plain values are read: no code can run. CRCs are checked; torch.load does not.
    """
    if not Path(path).is_file():
        raise RunError(f"there is no checkpoint {path}: give the last.pt of a run folder")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} fails its CRC")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost any exception
        raise RunError(f"{path} is damaged or no checkpoint ({in_short(error)}): use another, or "
                       "train again") from error
    version = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if isinstance(version, int) and version != CHECKPOINT_FORMAT:
        advice = "update the code" if version > CHECKPOINT_FORMAT else "train again"
        raise RunError(f"{path} has format {version}, not {CHECKPOINT_FORMAT}: {advice}")
    if version != CHECKPOINT_FORMAT or not all(
            isinstance(checkpoint.get(key), kind) for key, kind in CHECKPOINT_KEYS.items()):
        raise RunError(f"{path} was not written by these scripts: give the last.pt of a run folder")
    return checkpoint


def build_generator(checkpoint):
    """The trained generator of a loaded checkpoint, in eval mode on the CPU. Raises RunError."""
    weights, args = checkpoint["generator"], checkpoint["args"]
    try:
        generator = GENERATORS[args["generator"]](weights["head.weight"].shape[0], args["width"])
        generator.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError("the checkpoint's weights are not those of its flags "
                       f"({in_short(error)}): use another, or train again") from error
    return generator.eval()


def load_generator(path, device="cpu"):
    """The trained generator of a checkpoint file, in eval mode on `device`. Raises RunError."""
    return build_generator(load_checkpoint(path)).to(device)


def parse_args(parser, script, argv, stages=()):
    """Parse the command line; with --resume, take every flag that is not given from the checkpoint.

    Returns (args, checkpoint or None). Raises RunError where a flag contradicts the checkpoint;
    MAY_CHANGE and more epochs do not, in `stages` that the run is not past.
    """
    words = sys.argv if argv is None else argv
    if RANK > 0 and not {"-h", "--help"}.intersection(words):
        join_processes()  # with the first one, when that has found no mistake in the flags
    args = parser.parse_args(argv)
    if args.resume is None:
        if vars(args).get("discriminator") == "image" and args.size < 32:
            raise RunError(f"--discriminator image needs --size 32, not {args.size}: use patch")
        return args, None
    checkpoint = load_checkpoint(args.resume)
    if checkpoint["script"] != script:
        raise RunError(f"{args.resume} is a run of {checkpoint['script']}.py: resume it with that")
    saved, stage = checkpoint["args"], checkpoint.get("stage")
    past = {f"{name}_epochs" for name in stages[: stages.index(stage) if stage in stages else 0]}
    places = [Path(x).parent for x in (args.resume, os.path.realpath(args.resume))]  # of a link
    saved["out"] = str(next((x for x in places if (x / "log.csv").exists()), places[0]))
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    if saved.get("processes", 1) != PROCESSES:
        raise RunError(f"{args.resume} is of {saved.get('processes', 1)} processes, not "
                       f"{PROCESSES}: use torchrun with as many, or start a new run")
    for name, before in saved.items():
        given, flag = getattr(args, name), "--" + name.replace("_", "-")
        if given == before or name in MAY_CHANGE:
            continue
        if not (name.endswith("epochs") and name not in past and given > before):
            over = " and is past that stage" if name in past else ""
            raise RunError(f"{flag} {given} contradicts {args.resume}, which has {before}{over}: "
                           f"leave {flag} out, or start a new run")
        print(f"{flag} raised from {before} to {given}: a new rate schedule", file=sys.stderr)
    return args, checkpoint


def restore(checkpoint, **objects):
    """Load the saved state of networks, optimizers and scalers back into them. Raises RunError."""
    try:
        for name, value in objects.items():
            # A GradScaler that was off saved nothing, and --amp may change.
            if checkpoint[name] or name != "scaler":
                value.load_state_dict(checkpoint[name])
            if isinstance(value, torch.optim.Optimizer):  # on MPS, weights lie otherwise in memory
                for p, state in value.state.items():
                    state |= {k: torch.empty_like(p).copy_(v) for k, v in state.items() if v.dim()}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"the checkpoint's {name} does not fit these flags and pictures, or is "
                       f"missing ({in_short(error)}): use its run's last.pt and flags") from error
