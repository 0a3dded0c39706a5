"""Pictures in, batches out: datasets, splits and colour spaces.

A data set is one uint8 tensor (N, 3, H, W) on the training device; CIFAR-10 is 150 MB, so no worker
process is needed to feed it. A batch is an index into it, a flip, a shift, a colour conversion:

    images, labels = load_pictures("shapes", "datasets", size=32, train=True)
    for gray, target in Batches(images, "rgb", batch_size=128, seed=0).epoch(1):
        ...                       # gray (B, 1, H, W) and target (B, 3, H, W), float32 in [-1, 1]

Every random choice about pictures comes from numpy's RandomState: its stream is frozen, so a seed
means the same pictures on every platform and in every version.
"""

import argparse
import contextlib
import io
import math
import os
import socket
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps

CHANNELS = {"rgb": 3, "lab": 2}  # what a generator paints in each colour space
SHAPES_TRAIN, SHAPES_TEST = 5000, 1000  # enough to learn from, made in about a second
SHAPES_TRAIN_SEED, SHAPES_TEST_SEED = 1, 2  # fixed, as CIFAR-10 is: --seed changes neither
BATCH_PIXELS = 256 * 32 * 32  # in a batch outside training, which bounds the memory for metrics
DOWNLOAD_TIMEOUT = 10  # seconds to wait for a silent server; torchvision would wait forever
NO_PICTURES = {"MPEG", "HDF5", "GRIB", "BUFR"}  # formats that Pillow knows and does not decode
CAMERA_SUFFIXES = {".heic", ".heif", ".avif", ".dng", ".cr2", ".cr3", ".nef", ".arw"}  # plug-ins'
Image.MAX_IMAGE_PIXELS = 2**28  # Pillow refuses twice that, 2 GB; phones make 200 megapixels
# AMD's torch for Windows is built without torch.distributed, of which it lacks even this:
dist.is_initialized = getattr(dist, "is_initialized", lambda: False)


class DataError(Exception):
    """A mistake about pictures that the user can mend; the message is one line."""


class Pictures(NamedTuple):
    images: torch.Tensor  # uint8 (N, 3, H, W), RGB
    labels: torch.Tensor | None  # int64 (N,), or None where there are no classes


def number(kind, low, high, step=None):
    """An argparse type: an int or float from `low` to `high`; on request, a multiple of `step`."""
    noun = f"multiple of {step}" if step else "whole number" if kind is int else "number"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or step and value % step:  # true of nan
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} from {low} to {high}")
        return value

    return parse


picture_size = number(int, 16, 1024, step=16)  # argparse's, too: a side that four poolings halve


def add_flags(parser):
    """The flags of every training script that are about pictures and batches."""
    add = parser.add_argument
    add("--dataset", choices=["cifar10", "folder", "shapes"], default="cifar10",
        help="cifar10 is downloaded; folder reads DIR/train and DIR/test; shapes is made up here")
    add("--data-dir", default="datasets", metavar="DIR",
        help="where CIFAR-10 lies or is downloaded to, or the image folder (%(default)s)")
    add("--size", type=picture_size, default=32,
        help="side of the pictures of --dataset folder or shapes, a multiple of 16 (%(default)s)")
    add("--color", choices=list(CHANNELS), default="rgb",
        help="rgb: from luma to RGB; lab: from L* to a*b* (%(default)s)")
    add("--limit", type=number(int, 4, 10**9), metavar="N", help="draw N training pictures (all)")
    add("--val-fraction", type=number(float, 0.001, 0.9), default=0.1,
        help="share of the training pictures kept for validation (%(default)s)")
    add("--split", choices=["random", "hue"], default="random",
        help="validation pictures: at random, or evenly out of the order by hue (%(default)s)")
    add("--batch-size", type=number(int, 2, 10**6), default=128, help="pictures a step (128)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0,
        help="of the weights, the draw of --limit, the split, order, flips, shifts (%(default)s)")


# --------------------------------------------------------------------------------------- datasets


def load_pictures(dataset, data_dir, size, train, limit=None, seed=0):
    """All training or all test pictures of a data set, as Pictures.

    `limit` draws that many at random by `seed`, before decoding. Raises DataError if none.
    """
    if dataset == "cifar10":
        return _load_cifar10(Path(data_dir), size, train, limit, seed)
    if dataset == "folder":
        return _load_folder(Path(data_dir), size, train, limit, seed)
    if dataset != "shapes" or size > 128:
        raise DataError(f"cannot make {dataset} of --size {size}: use shapes, --size 128 or less")
    n, shapes_seed = (SHAPES_TRAIN, SHAPES_TRAIN_SEED) if train else (SHAPES_TEST, SHAPES_TEST_SEED)
    chosen = torch.from_numpy(_draw(n, limit, seed))
    # In parts, because the floats that they are painted in need many times the memory.
    parts = [make_shapes(n, size, shapes_seed, some)[:2] for some in chosen.split(500)]
    return Pictures(*map(torch.cat, zip(*parts)))


def load_training(args):
    """Training and validation Pictures by the flags of `add_flags`, without the exactly gray ones.

    Returns (training, validation, number of gray pictures dropped).
    """
    pictures = load_pictures(args.dataset, args.data_dir, args.size, train=True, limit=args.limit,
                             seed=args.seed)
    colored = _pick(pictures, torch.nonzero(~is_gray(pictures.images)).flatten())
    n = len(colored.images)
    if args.split == "hue":
        training, validation = split_by_hue(colored.images, args.val_fraction)
    else:
        training, validation = split_random(n, args.val_fraction, args.seed)
    if len(training) < 2 or len(validation) < 1:
        raise DataError(f"{n} coloured pictures are too few for two to train on and one to "
                        "validate on: add pictures, raise --limit or lower --val-fraction")
    sizes = [over_processes(len(training), "MIN"), len(validation)]  # for equally many steps
    images, labels = _pick(colored, torch.cat([training[: sizes[0]], validation]))
    labels = [None, None] if labels is None else labels.split(sizes)
    training, validation = map(Pictures, images.split(sizes), labels)
    return training, validation, over_processes(len(pictures.images) - n, "SUM")


def in_batches(images, batch_size=None):
    """Split (N, 3, H, W) into batches of BATCH_PIXELS pixels, but of one picture at least."""
    return images.split(batch_size or max(1, BATCH_PIXELS // images.shape[2:].numel()))


def fingerprint(images):
    """An int that tells pictures (N, 3, H, W), in their order, from others: shape and CRC-32."""
    crc = zlib.crc32(str(tuple(images.shape)).encode())
    for batch in in_batches(images):
        crc = zlib.crc32(batch.cpu().contiguous().numpy(), crc)
    return over_processes(crc, "SUM")


def is_gray(images):
    """True for each picture (N, 3, H, W) in which R = G = B everywhere."""
    return torch.cat([(x == x[:, :1]).flatten(1).all(dim=1) for x in in_batches(images)])


def split_random(n, fraction, seed):
    """Train and validation: n >= 2 indices, int64, shuffled, cut at `fraction`, neither empty."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(n).astype(np.int64))
    held_out = min(max(round(n * fraction), 1), n - 1)
    return order[held_out:], order[:held_out]


def split_by_hue(images, fraction):
    """Train and validation indices: sorted by mean hue, evenly taken for validation.

    At a `fraction` of 0.1 these are every tenth, so that both sides have the same colours. Takes
    uint8 (N, 3, H, W); both results are int64 tensors, and neither is empty for N >= 2.
    """
    order, n = torch.argsort(mean_hue(images), stable=True), len(images)
    positions = np.floor(np.arange(n * fraction) / fraction).astype(np.int64)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[positions[positions < n][: n - 1]] = True
    return order[~chosen], order[chosen]


def mean_hue(images):
    """Mean HSV hue (Smith, 1978) in [0, 1) of uint8 pictures (N, 3, H, W), float64 (N,).

    A gray pixel counts as hue 0. Reds on either side of 0 average to cyan: good enough for strata.
    """
    means = []
    for batch in in_batches(images):  # float64 takes eight times the memory of bytes
        r, g, b = batch.double().unbind(1)
        top, chroma = batch.amax(1), (batch.amax(1) - batch.amin(1)).double()
        sixths = torch.where(top == r, (g - b) / chroma, torch.where(
            top == g, 2 + (b - r) / chroma, 4 + (r - g) / chroma))
        means.append(torch.where(chroma > 0, sixths / 6 % 1, 0.0).mean(dim=(1, 2)))
    return torch.cat(means)


def _pick(pictures, indices):
    """The pictures of the given indices, in that order and in the same memory, which is changed."""
    images, labels = pictures
    for band in images.chunk(16, dim=2):  # images[indices] would need the memory twice
        band[: len(indices)] = band[indices]
    return Pictures(images[: len(indices)], None if labels is None else labels[indices])


def _draw(n, limit, seed):
    """Sorted indices of `limit` out of n things, or of all n; of those, this process's share."""
    chosen = np.sort(np.random.RandomState(seed).permutation(n)[:limit])  # with None, all
    if dist.is_initialized():  # every k-th for each of k processes
        count = dist.get_world_size()
        chosen = chosen[dist.get_rank() :: count][: len(chosen) // count]
    return chosen


def over_processes(value, operation):
    """The "MIN", "MAX" or "SUM" of an int over all processes of torchrun; alone, the int itself."""
    if dist.is_initialized():
        value = torch.tensor(value)
        dist.all_reduce(value, getattr(dist.ReduceOp, operation))
    return int(value)


@contextlib.contextmanager
def downloading():
    """Inside, a server that is silent for DOWNLOAD_TIMEOUT seconds is an error.

    The first process goes in first, so that the others find what it has downloaded.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not first:
        over_processes(0, "SUM")  # waits for the first
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
    if first:
        over_processes(0, "SUM")


def _load_cifar10(root, size, train, limit, seed):
    if size != 32:
        raise DataError(f"CIFAR-10 is not {size}x{size}: use --size 32, or --dataset folder")
    from torchvision.datasets import CIFAR10 as cifar10  # takes seconds, so not at the start
    names = [*dict(cifar10.train_list + cifar10.test_list), "batches.meta", "readme.html", "."]
    written = [root / cifar10.base_folder / name for name in names] + [root / cifar10.filename]
    new = [path for path in (*written, root, *root.parents) if not os.path.lexists(path)]
    try:
        with downloading():
            dataset = cifar10(root, train=train, download=True)
    except BaseException as error:
        for path in new:  # what was written here goes, and folders in which nothing else lies
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        if isinstance(error, MemoryError) or not isinstance(error, Exception):
            raise
        raise DataError(f"CIFAR-10 is not whole at {root / cifar10.filename} and could not be "
                        f"downloaded or unpacked ({error}): put that file there, or use --dataset "
                        "folder --data-dir DIR (yours) or --dataset shapes (made up)") from error
    chosen = _draw(len(dataset.data), limit, seed)
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)[chosen].contiguous()
    return Pictures(images, torch.tensor(dataset.targets)[chosen])


def _load_folder(root, size, train, limit, seed):
    if (root / "test").is_dir():
        paths = _image_paths(root / ("train" if train else "test"))
    else:
        # By a hash of the path, not by position: more pictures leave the old ones on their sides.
        paths = _image_paths(root / "train")
        names = [path.relative_to(root / "train").as_posix() for path in paths]
        hashes = [zlib.crc32(os.fsencode(name)) for name in names]
        held_out = [value % 10 == 0 for value in hashes]
        if not any(held_out):
            held_out[hashes.index(min(hashes))] = True
        paths = [path for path, out in zip(paths, held_out) if out != train]
        print(f"{root / 'test'} is not there: {sum(held_out)} of {len(held_out)} pictures in "
              f"{root / 'train'} are held out, by a hash of the path below it", file=sys.stderr)
        if not paths:
            raise DataError(f"{root / 'train'} has too few pictures to hold some out: add more")
    paths = [paths[i] for i in _draw(len(paths), limit, seed)]
    needed, free = len(paths) * 3 * size * size, free_memory()
    line = (f"{len(paths):,} pictures of {size}x{size} need {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free: lower {'--limit or ' * train}--size to need less")
    if needed > free:
        raise DataError(line)
    if needed > free / 2:
        print(line, file=sys.stderr)
    images, decoded = _decode(paths, size, root)
    if paths and not decoded:
        raise DataError(f"no picture in {root} could be decoded: give --data-dir other pictures")
    return Pictures(images, _class_labels(root, decoded))


def free_memory():
    """Bytes that this process can still take; infinity where there is no /proc to say it."""
    with contextlib.suppress(OSError, IndexError):
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
        return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
    return math.inf


def _decode(paths, size, root):
    """Pictures, uint8 (N, 3, size, size), and their paths; damaged files are named and left out."""
    images, decoded = torch.empty(len(paths), 3, size, size, dtype=torch.uint8), []
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # here, too: what one thread sets, another may reset
        for start in range(0, len(paths), 64):
            some = paths[start : start + 64]
            pictures = [pool.submit(_read_thumbnail, path, size) for path in some]
            for path, picture in zip(some, pictures):
                try:
                    images[len(decoded)] = picture.result()
                    decoded.append(path)
                except MemoryError:
                    raise  # it is no fault of the file
                except Exception as error:  # a damaged file can raise almost any exception
                    print(f"skipped {path}: {error}", file=sys.stderr)
            last = start + len(some) == len(paths)
            if last or sys.stderr.isatty():
                print(f"decoded {len(decoded):,} of {len(paths):,} pictures in {root}",
                      end="\n" if last else "\r", file=sys.stderr, flush=True)
    return images[: len(decoded)], decoded


def _image_paths(folder):
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: --dataset folder reads DIR/train/ (and "
                        "DIR/test/) of the DIR in --data-dir")
    paths = picture_paths(folder)
    if not paths:
        raise DataError(f"there are no pictures in {folder}: put some there, flat or by class")
    stray = [path.name for path in paths if path.parent == folder]
    if 0 < len(stray) < len(paths) / 2:
        print(f"left out {len(stray)} of {len(paths)} pictures in {folder}, which lie beside the "
              f"class folders: {', '.join(stray[:3])}{', ...' * (len(stray) > 3)}", file=sys.stderr)
        paths = [path for path in paths if path.parent != folder]
    return paths


def picture_paths(folder):
    """The files below a folder that have a picture's suffix, sorted by their path as text.

    Linked folders are followed, none is read twice. What cannot be read is named on standard error.
    """
    readable = {suffix for suffix, kind in Image.registered_extensions().items()
                if kind in Image.OPEN and kind not in NO_PICTURES}
    paths, seen = [], set()
    for place, folders, files in os.walk(
        folder, followlinks=True, onerror=lambda error: print(f"skipped {error}", file=sys.stderr)
    ):
        folders.sort()
        if os.path.realpath(place) in seen:
            folders.clear()  # a link leads here, perhaps in a circle
        else:
            seen.add(os.path.realpath(place))
            paths += [Path(place, file) for file in files]
    unread = [path for path in paths if path.suffix.lower() in CAMERA_SUFFIXES - readable]
    if unread:
        print(f"left out {len(unread)} files like {min(unread)}: make them JPEG", file=sys.stderr)
    return [path for path in sorted(paths, key=Path.as_posix) if path.suffix.lower() in readable
            and (os.path.isfile(path) or not os.path.exists(path))]  # a broken link is named later


def _class_labels(root, paths):
    """The first folder below train/ or test/ is a picture's class; flat folders have none."""
    parts = [path.relative_to(root).parts[1:] for path in paths]
    if any(len(part) == 1 for part in parts):
        return None
    classes = sorted({x.name for x in [*root.glob("train/*"), *root.glob("test/*")] if x.is_dir()})
    return torch.tensor([classes.index(part[0]) for part in parts])


def read_picture(path):
    """A picture file of any mode as an upright RGB PIL image, in sRGB by its colour profile.

    16-bit values are scaled to 8 bits unless none is above 255, transparency is laid over white;
    `info` keeps EXIF and dpi. Raises what Pillow raises, and DataError for values of unknown range.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    info = image.info
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel: convert() would clip at 255
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise DataError("its values are not of 8 or 16 bits")
        scale = 1 if pixels.max() < 256 else 257
        image = Image.fromarray((pixels / scale).astype(np.uint8))
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert(mode)
    with contextlib.suppress(ImageCms.PyCMSError, OSError, TypeError):  # a broken profile, or none
        profile = ImageCms.ImageCmsProfile(io.BytesIO(info.get("icc_profile")))
        srgb = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    image = image.convert("RGB")
    image.info = {key: value for key, value in info.items() if key == "exif"
                  or key == "dpi" and all(0 < dots < 10**6 for dots in value)}
    return image


def _read_thumbnail(path, size):
    image = read_picture(path)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def make_shapes(n, size, seed, chosen=slice(None)):
    """n made-up scenes: sky above, ground below, and one object whose colour may be a surprise.

    Sky is blue, ground green, a disc (label 0) red, a square (label 1) yellow: the shape tells the
    colour, the lightness, which varies, hardly (squares are the lightest objects). A triangle
    (label 2) is orange or blue, equally likely. The two have equal luma and almost equal L*, and
    their mean in RGB is gray: nothing in the gray picture tells which one it was.

    Only the k `chosen` ones are painted, and returned: images uint8 (k, 3, size, size), labels
    int64 (k,), and the objects' pixels, bool (k, size, size).
    """
    random = np.random.RandomState(seed)

    def uniform(low, high):
        return torch.from_numpy(random.uniform(low, high, (n, 1, 1)).astype(np.float32))[chosen]

    grid = (torch.arange(size) + 0.5) / size
    y, x = grid[:, None], grid[None, :]  # (size, 1), (1, size), in [0, 1]
    labels = torch.from_numpy(random.randint(3, size=n).astype(np.int64))[chosen]
    orange = torch.from_numpy(random.randint(2, size=n).astype(bool))[chosen]

    right, down = x - uniform(0.35, 0.65), y - uniform(0.35, 0.65)  # from the object's centre
    radius = uniform(0.2, 0.3)
    disc = right**2 + down**2 < radius**2
    square = torch.maximum(right.abs(), down.abs()) < 0.9 * radius
    triangle = (down.abs() < radius) & (right.abs() < (down + radius) * 0.6)
    objects = torch.stack([disc, square, triangle])[labels, torch.arange(len(labels))]

    object_colors = torch.tensor([[215.0, 45, 60], [215, 190, 30], [50, 89.6, 175]])[labels]
    object_colors[(labels == 2) & orange] = torch.tensor([125, 85.4, 0])  # the others are blue

    def layer(colors, lightness):  # (n or 1, 3) and (n, 1, 1) -> (n, 3, 1, 1)
        return colors[:, :, None, None] * lightness[:, None]

    horizon = uniform(0.35, 0.75)[:, None]
    sky = layer(torch.tensor([[105.0, 165, 225]]), uniform(0.5, 1.1))
    ground = layer(torch.tensor([[85.0, 150, 60]]), uniform(0.5, 1.5))
    images = torch.where(y < horizon, sky, ground)
    images = torch.where(objects[:, None], layer(object_colors, uniform(0.7, 1.2)), images)
    shade = 1 + uniform(-0.3, 0.3) * (x - 0.5)  # light falls from one side
    images = (images * shade[:, None]).round().clamp(0, 255).to(torch.uint8)
    return images, labels, objects


# ---------------------------------------------------------------------------------------- batches


def memory_format(device):
    """Channels last, the faster; not on MPS, where BatchNorm fails in it (pytorch issue 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class Batches:
    """Shuffled, randomly flipped, colour-converted batches of pictures that stay on their device.

    images: uint8 (N, 3, H, W), N >= 2. A `batch_size` above N means one batch of all N. A last
    batch of one picture is left out, because BatchNorm cannot normalize it. `shift`, below H and
    W, moves each picture at random by up to so many pixels each way; mirrored edges fill in. Two
    Batches of as many pictures and of one seed go through them in the same order, with the same
    flips. Several processes share a batch: each has its part, of its own pictures.
    """

    def __init__(self, images, color, batch_size, seed, labels=None, shift=0):
        self.images, self.color, self.seed, self.labels = images, color, seed, labels
        self.shift = shift
        processes = dist.get_world_size() if dist.is_initialized() else 1
        self.batch_size = min(batch_size // processes, len(images))

    def __len__(self):
        """Batches an epoch."""
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest > 1)

    def epoch(self, epoch):
        """Yield (gray, target[, labels]); (seed, epoch) alone decides order, flips and shifts."""
        n, s, random = len(self.images), self.shift, np.random.RandomState([self.seed, epoch])
        order = torch.from_numpy(random.permutation(n).astype(np.int64))
        flips = torch.from_numpy(random.rand(n, 1, 1, 1) < 0.5)
        corners = torch.from_numpy(s - random.randint(-s, s + 1, (n, 2), np.int64))  # of crops
        parts = (x.to(self.images.device).split(self.batch_size) for x in (order, flips, corners))
        for chosen, flip, corner in list(zip(*parts))[: len(self)]:  # without a last batch of one
            batch = self.images[chosen]
            batch = torch.where(flip, batch.flip(-1), batch).float()
            (h, w), (y, x) = batch.shape[2:], corner.unbind(1)
            # A view of all crops, (B, 3, 2 s + 1, 2 s + 1, H, W), and then one of each picture.
            batch = F.pad(batch, [s] * 4, "reflect").unfold(2, h, 1).unfold(3, w, 1)
            batch = batch[torch.arange(len(batch), device=batch.device), :, y, x]
            gray, target = to_gray_and_target(batch, self.color)
            target = target.contiguous(memory_format=memory_format(target.device))
            yield (gray, target) if self.labels is None else (gray, target, self.labels[chosen])


# ----------------------------------------------------------------------------------------- colour
# CIE L*a*b* of sRGB (IEC 61966-2-1, CIE 15). Elementwise float32, not matrix products: those would
# lose digits to TF32 on a GPU and to autocast.

XYZ_FROM_RGB = np.array([[0.4124564, 0.3575761, 0.1804375],
                         [0.2126729, 0.7151522, 0.0721750],
                         [0.0193339, 0.1191920, 0.9503041]])
WHITE = XYZ_FROM_RGB.sum(axis=1)  # of the matrix itself, so that gray has a* = b* = 0
RGB_FROM_XYZ = np.linalg.inv(XYZ_FROM_RGB)
LUMA = np.array([[0.299, 0.587, 0.114]])  # Rec. 601
DELTA = 6 / 29  # where the cube root of f(t) hands over to a line


def rgb_to_lab(rgb):
    """sRGB (N, 3, H, W) in [0, 1] to float32 CIE L* in [0, 100], a* and b* within (-110, 110)."""
    rgb = rgb.float()
    power = ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, power)
    t = _mix(linear, XYZ_FROM_RGB / WHITE[:, None])
    cube_root = t.clamp(min=DELTA**3) ** (1 / 3)
    f = torch.where(t > DELTA**3, cube_root, t / (3 * DELTA**2) + 4 / 29)
    fx, fy, fz = f.unbind(1)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim=1)


def lab_to_rgb(lab):
    """CIE L*a*b* (N, 3, H, W) to float32 sRGB in [0, 1], clipped to the gamut; finite gradients."""
    return _encode(_linear_rgb(lab))


def lab_to_rgb_of_its_lightness(lab):
    """As `lab_to_rgb`, but colours outside the gamut lose chroma, never lightness.

    In linear RGB a colour and the gray of its luminance Y lie on a line; along it Y is constant,
    and so is L*. A colour outside moves towards the gray as far as it must.
    """
    linear = _linear_rgb(lab)
    y = _mix(linear, XYZ_FROM_RGB[1:2]).clamp(0, 1)
    away = linear - y
    room = torch.where(away > 0, 1 - y, y) / away.abs().clamp(min=1e-9)
    return _encode(y + away * room.amin(dim=1, keepdim=True).clamp(max=1))


def _linear_rgb(lab):
    lightness, a, b = lab.float().unbind(1)
    fy = (lightness + 16) / 116
    f = torch.stack([fy + a / 500, fy, fy - b / 200], dim=1)
    t = torch.where(f > DELTA, f**3, 3 * DELTA**2 * (f - 4 / 29))
    return _mix(t, RGB_FROM_XYZ * WHITE)


def _encode(linear):
    linear = linear.clamp(0, 1)
    power = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, power)


def _mix(channels, matrix):
    """Each output channel of (N, 3, H, W) is a row of `matrix` applied to the input channels."""
    x, y, z = channels.unbind(1)
    return torch.stack([float(p) * x + float(q) * y + float(r) * z for p, q, r in matrix], dim=1)


def luma(rgb):
    """Rec. 601 luma (N, 1, H, W) of float RGB (N, 3, H, W), in the same range."""
    return _mix(rgb, LUMA)


def to_gray_and_target(images, color):
    """What a generator sees and what it should paint, from RGB (N, 3, H, W), 0 to 255.

    rgb: gray is 2 * luma - 1 (N, 1, H, W), target is 2 * RGB - 1 (N, 3, H, W), of RGB in [0, 1].
    lab: gray is L*/50 - 1 (N, 1, H, W), target is (a*, b*)/110 (N, 2, H, W). All are float32.
    """
    rgb = images.float() / 255
    if color == "rgb":
        return (2 * luma(rgb) - 1).clamp(-1, 1), 2 * rgb - 1
    lab = rgb_to_lab(rgb)
    return (lab[:, :1] / 50 - 1).clamp(-1, 1), lab[:, 1:] / 110


def keep_gray(gray, output, color):
    """A generator's output (N, 3 or 2, H, W) with the gray that was given; it may leave [-1, 1].

    rgb: R, G and B are shifted alike until their luma is the input's. lab: as it is, without an L*.
    """
    return output if color == "lab" else output + (gray - luma(output))


def to_rgb(gray, output, color):
    """Float32 RGB (N, 3, H, W) of a generator's output in its input's gray, clipped to [0, 1]."""
    gray, output = gray.float(), output.float()
    if color == "rgb":
        return ((keep_gray(gray, output, color) + 1) / 2).clamp(0, 1)
    return lab_to_rgb(torch.cat([50 * (gray + 1), 110 * output], dim=1))
