"""One's own photos: any format, size and name in, a PNG of the same size and lightness out."""

import itertools
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import lab_by_the_book
from PIL import Image, ImageCms

import data
import evaluate
import models


@pytest.fixture(params=["rgb", "lab"])
def color(request):
    return request.param


@pytest.fixture
def ckpt(tmp_path, color):
    """A checkpoint of an untrained generator, whose colours are as wild as can be."""
    torch.manual_seed(0)
    generator = models.UNet(data.CHANNELS[color], width=4)
    args = {"width": 4, "color": color, "size": 32, "generator": "maxpool"}
    path = tmp_path / "last.pt"
    models.save_checkpoint(path, "train_unet", args, 1, [], generator=generator)
    return path


@pytest.fixture
def colorize(ckpt, tmp_path, capsys):
    """colorize(photos..., flags...) -> (exit status, names below --out-dir, standard error)."""

    def run(*argv):
        capsys.readouterr()
        out = tmp_path / "out"
        try:
            evaluate.main(["--ckpt", str(ckpt), "--out-dir", str(out), "--images",
                           *map(str, argv)])
            status = 0
        except SystemExit as ended:
            status = ended.code
        names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
        return status, names, capsys.readouterr().err

    return run


def scene(width=48, height=36):
    """A smooth photo: hues across, lightness down, with black and white."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    rgb = np.stack([y, y * (0.5 + 0.5 * x), y * (1 - x)], axis=-1)
    return Image.fromarray((255 * rgb).round().astype(np.uint8))


def lightness(picture):
    rgb = np.asarray(picture.convert("RGB")).reshape(-1, 3) / 255
    return lab_by_the_book(rgb)[:, 0]


@pytest.mark.parametrize("mode, name", [
    ("L", "gray.png"), ("RGB", "photo.jpg"), ("RGBA", "alpha.png"), ("P", "palette.png"),
    ("CMYK", "print.jpg"), ("1", "bits.tif"), ("RGB", "web.webp"), ("P", "moving.gif"),
    ("RGB", "photo.tiff"), ("RGB", "Ein Bild mit Ümläuten 写真.png"), ("LA", "gray alpha.png"),
])
def test_every_mode_keeps_its_size_and_lightness(mode, name, colorize, tmp_path):
    photo = tmp_path / "in" / name
    photo.parent.mkdir()
    scene().convert(mode).save(photo)
    status, names, _ = colorize(photo)
    assert (status, names) == (0, [f"{photo.stem}.png"])
    output = Image.open(tmp_path / "out" / names[0])
    assert output.size == (48, 36) and output.mode == "RGB"
    difference = np.abs(lightness(output) - lightness(data.read_picture(photo)))
    assert difference.mean() < 0.5 and difference.max() < 2
    assert output.convert("HSV").getextrema()[1][1] > 20 or mode == "1"  # black has no colour


def test_the_first_frame_of_a_moving_picture_is_painted(colorize, tmp_path):
    white = Image.new("RGB", (20, 20), "white")
    white.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 20))])
    colorize(tmp_path / "moving.gif")
    assert lightness(Image.open(tmp_path / "out" / "moving.png")).mean() > 99


def test_sixteen_bits_are_scaled_not_clipped(colorize, tmp_path):
    deep = np.linspace(0, 65535, 48 * 36).reshape(36, 48).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    Image.fromarray((deep / 257).astype(np.uint8)).save(tmp_path / "flat.png")
    colorize(*(tmp_path / name for name in ("deep.png", "deep.tif", "flat.png")))
    outputs = [np.asarray(Image.open(tmp_path / "out" / name)).astype(int)
               for name in ("deep.png.png", "deep.tif.png", "flat.png")]
    assert np.array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() <= 2


@pytest.mark.parametrize("name", ["bytes.png", "bytes.tif"])
def test_bytes_in_sixteen_bits_stay_bytes(name, tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint16)).save(tmp_path / name)
    assert np.asarray(data.read_picture(tmp_path / name))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (33, 15), (300, 300)])
def test_every_size_is_kept(size, colorize, tmp_path):
    scene(*size).save(tmp_path / "photo.png")
    assert colorize(tmp_path / "photo.png", "--render-size", 48)[0] == 0
    assert Image.open(tmp_path / "out" / "photo.png").size == size


def test_a_photo_is_upright(colorize, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    scene(48, 36).save(tmp_path / "turned.jpg", exif=exif)
    colorize(tmp_path / "turned.jpg")
    output = Image.open(tmp_path / "out" / "turned.png")
    assert output.size == (36, 48) and 0x0112 not in output.getexif()
    assert lightness(output.crop((30, 0, 36, 48))).mean() < 20  # the black top is at the right


def test_exif_and_dpi_are_carried_and_the_profile_is_not(colorize, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a cat"
    exif[0x8769] = {0x9003: "2020:01:02 03:04:05"}
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    scene().save(tmp_path / "x.jpg", exif=exif, dpi=(300, 300), icc_profile=srgb)
    colorize(tmp_path / "x.jpg")
    output = Image.open(tmp_path / "out" / "x.png")
    assert output.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert output.getexif()[0x010E] == "a cat" and 0x0112 not in output.getexif()
    assert output.getexif().get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"
    assert "icc_profile" not in output.info


def test_an_impossible_dpi_costs_no_photo(colorize, tmp_path):
    for dpi in ((0, 0), (10**6, 72), (4e9, 4e9)):
        scene().save(tmp_path / "x.tif", dpi=dpi)
        assert colorize(tmp_path / "x.tif", "--overwrite")[:2] == (0, ["x.png"])
        assert "dpi" not in Image.open(tmp_path / "out" / "x.png").info


def test_a_photo_of_200_megapixels_is_not_refused_and_not_warned_of(tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with Image.open(tmp_path / "large.png") as photo:
            assert photo.size == (20_000, 10_000)
    assert seen == []


def test_a_photo_that_exhausts_memory_is_named_and_the_next_is_painted(
    colorize, tmp_path, monkeypatch
):
    paint = evaluate.colorize_photo

    def full(generator, color, photo, *flags):
        if photo.width == 50:
            raise MemoryError
        return paint(generator, color, photo, *flags)

    monkeypatch.setattr(evaluate, "colorize_photo", full)
    scene(50, 10).save(tmp_path / "1.jpg")
    scene(20, 10).save(tmp_path / "2.jpg")
    status, names, errors = colorize(tmp_path / "1.jpg", tmp_path / "2.jpg")
    assert (status, names) == (1, ["2.png"])
    assert errors.startswith(f"skipped {tmp_path / '1.jpg'}: MemoryError\n")


def test_a_colored_photo_is_colorized_from_its_gray(ckpt, color):
    colored = torch.from_numpy(np.array(scene())).permute(2, 0, 1)[None]
    gray, _ = data.to_gray_and_target(colored, color)
    no_color = gray.expand(-1, 3, -1, -1) if color == "rgb" else gray.new_zeros(1, 2, 36, 48)
    pixels = (255 * data.to_rgb(gray, no_color, color)).round().to(torch.uint8)
    colorless = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    generator = models.load_generator(ckpt)
    painted = [evaluate.colorize_photo(generator, color, photo, 32)
               for photo in (scene(), colorless)]
    one, two = (lab_by_the_book(np.asarray(x).reshape(-1, 3) / 255)[:, 1:] for x in painted)
    assert np.abs(one).mean() > 1
    assert np.abs(one - two)[lightness(scene()) > 30].mean() < 3


def test_a_picture_of_the_training_size_gets_what_the_generator_paints(ckpt, color):
    generator = models.load_generator(ckpt)
    picture = scene(32, 32)
    photo = np.asarray(evaluate.colorize_photo(generator, color, picture, 32))
    images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    (painted, _), = evaluate.colorize(generator, images, color)
    wanted = data.rgb_to_lab(painted)[:, 1:]
    lab = data.rgb_to_lab(torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] / 255)
    inside = (lab[:, :1] > 35) & (lab[:, :1] < 80)  # where most colours are in the gamut
    assert ((lab[:, 1:] - wanted).abs() * inside).median() < 1.5


def test_bands_leave_no_seam(ckpt, color, monkeypatch):
    generator, picture = models.load_generator(ckpt), scene(100, 80)
    whole = np.asarray(evaluate.colorize_photo(generator, color, picture, 32)).astype(int)
    monkeypatch.setattr(evaluate, "BAND_PIXELS", 700)
    bands = np.asarray(evaluate.colorize_photo(generator, color, picture, 32)).astype(int)
    assert np.abs(whole - bands).max() <= 1


def test_colors_outside_the_gamut_keep_their_lightness():
    grid = torch.cartesian_prod(*[torch.linspace(low, high, 15) for low, high in
                                  ((0, 100), (-110, 110), (-110, 110))])[:, :, None, None]
    rgb = data.lab_to_rgb_of_its_lightness(grid)
    assert rgb.min() >= 0 and rgb.max() <= 1
    assert (data.rgb_to_lab(rgb)[:, 0] - grid[:, 0]).abs().max() < 0.02
    rgb = torch.rand(1000, 3, 1, 1)  # inside, nothing changes
    assert (data.lab_to_rgb_of_its_lightness(data.rgb_to_lab(rgb)) - rgb).abs().max() < 2e-3


# ------------------------------------------------------------------------------- files and folders


def test_a_folder_keeps_its_paths_and_only_pictures_count(colorize, tmp_path):
    folder = tmp_path / "album"
    (folder / "a b" / "ü").mkdir(parents=True)
    for name in ("one.jpg", "a b/two.png", "a b/ü/three.PNG", "one.tif"):
        scene().save(folder / name)
    (folder / "notes.txt").write_text("not a picture, not looked at")
    scene().save(folder / "unnamed", "PNG")
    (folder / "a folder.jpg").mkdir()
    (folder / "film.mpg").write_bytes(b"not a picture, either")
    status, names, errors = colorize(folder)
    assert (status, names) == (0, ["a b/two.png", "a b/ü/three.png", "one.jpg.png", "one.tif.png"])
    assert errors == ""
    assert colorize(folder / "unnamed")[:2] == (0, sorted([*names, "unnamed.png"]))


def names_of(inputs, out="out"):
    """{photo's path: output's path below `out`} as list_photos gives them."""
    return {photo.as_posix(): output.relative_to(out).as_posix()
            for photo, output in evaluate.list_photos(map(str, inputs), Path(out))}


def test_two_photos_of_one_stem_both_keep_their_suffix_in_any_order():
    wanted = {"a/x.jpg": "x.jpg.png", "a/x.png": "x.png.png", "a/y.jpg": "y.png"}
    for photos in itertools.permutations(wanted):
        assert names_of(photos) == wanted
    assert names_of(["a/x.jpg", "a/x.jpg.tif"]) == {"a/x.jpg": "x.png",
                                                    "a/x.jpg.tif": "x.jpg.tif.png"}
    either = names_of(["a/X.jpg", "a/x.png", "b/y.jpg", "b/Y.jpg"])
    assert len({name.casefold() for name in either.values()}) >= 3  # some file systems have no case
    assert len(set(either.values())) == 4


def test_photos_of_one_name_in_two_inputs_keep_their_folders_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2019/x.jpg", "2020/x.jpg", "2020/a/y.jpg", "2020/z.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        scene().save(name)
    wanted = {"2019/x.jpg": "2019/x.jpg.png", "2020/x.jpg": "2020/x.jpg.png",
              "2020/a/y.jpg": "a/y.png", "2020/z.jpg": "z.png"}
    for inputs in (["2019", "2020"], ["2020", "2019"], ["2020", "2019/x.jpg", "2020/x.jpg"]):
        assert names_of(inputs) == wanted
    both = names_of(["p/a/x.jpg", "q/a/x.jpg"])  # all of the path, where nothing less will do
    assert [name[-13:] for name in both.values()] == ["p/a/x.jpg.png", "q/a/x.jpg.png"]
    assert names_of([".", "2019/x.jpg"])["2019/x.jpg"] == "2019/x.png"  # each photo once


def test_an_output_that_exists_is_kept_and_counts_as_done(colorize, tmp_path):
    album = tmp_path / "album"
    album.mkdir()
    for name in ("a.jpg", "b.jpg"):
        scene().save(album / name)
    assert colorize(album) == (0, ["a.png", "b.png"], "")
    output = tmp_path / "out" / "a.png"
    output.write_bytes(b"precious")
    scene().save(album / "c.jpg")
    status, names, errors = colorize(album)
    assert (status, names) == (0, ["a.png", "b.png", "c.png"])
    assert errors == "kept 2 that exist: --overwrite replaces them\n"
    assert output.read_bytes() == b"precious"
    scene().save(album / "a.webp")  # of the stem of another one: both have new names
    status, names, errors = colorize(album)
    assert (status, names) == (0, ["a.jpg.png", "a.png", "a.webp.png", "b.png", "c.png"])
    assert errors.startswith("kept 2 that") and output.read_bytes() == b"precious"
    (album / "d.jpg").write_bytes(b"junk")
    status, _, errors = colorize(album)
    assert status == 1 and errors.endswith("kept 4 that exist: --overwrite replaces them\n"
                                           "1 of 5 pictures were skipped\n")
    (album / "a.webp").unlink()
    (album / "d.jpg").unlink()
    status, _, errors = colorize(album, "--overwrite")
    assert (status, errors) == (0, "") and output.read_bytes() != b"precious"


def test_a_photo_is_never_replaced_by_its_own_colors(colorize, tmp_path):
    (tmp_path / "out").mkdir()
    photo = tmp_path / "out" / "photo.png"
    scene().save(photo)
    before = photo.read_bytes()
    status, _, errors = colorize(photo, "--overwrite")
    assert status == 2 and "another --out-dir" in errors and photo.read_bytes() == before


def test_a_photo_is_not_replaced_where_its_folder_has_two_names(colorize, tmp_path):
    scene().save(tmp_path / "photo.png")
    (tmp_path / "out").mkdir()  # one file of two names, as in a folder that is mounted twice
    os.link(tmp_path / "photo.png", tmp_path / "out" / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    status, _, errors = colorize(tmp_path / "photo.png", "--overwrite")
    assert status == 2 and "another --out-dir" in errors
    assert (tmp_path / "photo.png").samefile(tmp_path / "out" / "photo.png")
    assert (tmp_path / "photo.png").read_bytes() == before


def test_photos_of_one_path_on_two_drives_both_have_a_name(monkeypatch):
    drives, abspath = {"d": "D:", "e": "E:"}, os.path.abspath
    monkeypatch.setattr(os.path, "abspath", lambda path: abspath(path) if isinstance(
        path, str) else f"{drives[path.parts[0]]}/DCIM/x.jpg")
    assert names_of(["d/DCIM/x.jpg", "e/DCIM/x.jpg"]) == {
        "d/DCIM/x.jpg": "D/DCIM/x.jpg.png", "e/DCIM/x.jpg": "E/DCIM/x.jpg.png"}


def test_what_was_painted_into_a_folder_is_not_painted_again(colorize, tmp_path):
    (tmp_path / "album").mkdir()
    scene().save(tmp_path / "album" / "photo.jpg")
    for _ in range(2):
        status, names, _ = colorize(tmp_path / "album", "--overwrite",
                                    "--out-dir", tmp_path / "album" / "painted")
        assert status == 0
    assert sorted(os.listdir(tmp_path / "album" / "painted")) == ["photo.png"]


def test_photos_may_go_beside_their_folder_and_files_into_it(colorize, tmp_path):
    (tmp_path / "album").mkdir()
    scene().save(tmp_path / "album" / "photo.jpg")
    for photos, folder in ((tmp_path / "album", tmp_path),
                           (tmp_path / "album" / "photo.jpg", tmp_path / "album")):
        assert colorize(photos, "--out-dir", folder)[0] == 0
        assert (folder / "photo.png").exists()
    status, _, errors = colorize(tmp_path / "album", "--out-dir", tmp_path / "album")
    assert status == 2 and "is one of --images: choose another" in errors


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode, tmp_path):
    picture = scene().convert("RGBA")
    opaque = Image.linear_gradient("L").resize(picture.size)  # from the top down
    picture.putalpha(opaque.point(lambda value: 255 * (value > 99)))
    if mode == "P":
        picture.quantize().save(tmp_path / "photo.png")
    else:
        picture.convert(mode).save(tmp_path / "photo.png")
    assert np.asarray(data.read_picture(tmp_path / "photo.png"))[0].min() == 255


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_of_an_unknown_range_are_named_and_skipped(mode, colorize, tmp_path):
    values = np.linspace(0, 1 if mode == "F" else 2**30, 100).reshape(10, 10)
    Image.fromarray(values.astype(np.float32 if mode == "F" else np.int32)).save(tmp_path / "x.tif")
    status, names, errors = colorize(tmp_path / "x.tif")
    assert (status, names) == (2, []) and "8 or 16 bits" in errors


def test_what_is_no_picture_is_named_skipped_and_counted(colorize, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    album = tmp_path / "album"
    album.mkdir()
    scene(40, 40).save(album / "good.png")
    scene(100, 100).save(album / "bomb.png")
    whole = (album / "good.png").read_bytes()
    (album / "cut.png").write_bytes(whole[: len(whole) // 2])
    scene(40, 40).save(album / "cut.jpg")
    whole = (album / "cut.jpg").read_bytes()
    (album / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (album / "text.png").write_text("not a picture")
    (album / "empty.tif").write_bytes(b"")
    loop = album / "loop.png"
    loop.symlink_to(loop)
    (tmp_path / "out" / "way.png").mkdir(parents=True)  # in the way
    scene(40, 40).save(tmp_path / "way.tif")
    photos = [tmp_path / "none.jpg", loop, tmp_path / "way.tif", album]
    status, names, errors = colorize(*photos, "--overwrite")
    assert (status, names) == (1, ["good.png", "way.png"])
    *skipped, last = errors.splitlines()
    assert last == "8 of 9 pictures were skipped"
    bad = [album / name for name in ("bomb.png", "cut.jpg", "cut.png", "empty.tif", "text.png")]
    assert [line.partition(": ")[0] for line in skipped] == [
        f"skipped {path}" for path in [*photos[:3], *bad]]
    status, _, errors = colorize(album / "text.png")
    assert status == 2 and errors.splitlines()[-1].startswith("error: ")


def test_progress_is_a_line_a_photo(colorize, ckpt, tmp_path, capsys):
    for i in range(3):
        scene().save(tmp_path / f"{i}.jpg")
    evaluate.main(["--ckpt", str(ckpt), "--out-dir", str(tmp_path / "out"), "--images",
                   *(str(tmp_path / f"{i}.jpg") for i in range(3))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"2/3 {tmp_path / '1.jpg'} -> {tmp_path / 'out' / '1.png'}"


MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import evaluate
evaluate.main(sys.argv[2:])
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # peak memory in kB
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
def test_a_large_photo_is_cheap_and_memory_does_not_grow_with_the_count(ckpt, color, tmp_path):
    root = Path(evaluate.__file__).parent
    (tmp_path / "album").mkdir()
    scene(6000, 4000).save(tmp_path / "large.jpg")
    for i in range(200):
        scene(600, 400).save(tmp_path / "album" / f"{i}.jpg")
    few = sorted((tmp_path / "album").iterdir())[:20]

    def megabytes(*photos, out):
        command = [sys.executable, "-c", MEASURE, root, "--ckpt", ckpt, "--out-dir",
                   tmp_path / out, "--images", *photos]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1]) / 1024

    started = time.perf_counter()
    assert megabytes(tmp_path / "large.jpg", out="large") < 1500
    assert time.perf_counter() - started < 15
    assert megabytes(tmp_path / "album", out="all") < 1.1 * megabytes(*few, out="few")
