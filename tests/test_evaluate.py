"""Each metric against a plain, slow, independent computation, and at its fixed points."""

import ast
import collections
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import lab_by_the_book
from PIL import Image

import data
import evaluate
import models
import train_nogan
import train_unet


@pytest.fixture(scope="module")
def pair():
    """Random outputs and truths (5, 3, 16, 16): some alike, some far apart, one nearly gray."""
    random = np.random.RandomState(0)
    truth = random.rand(5, 3, 16, 16)
    amount = np.array([0.005, 0.02, 0.05, 0.3, 1.0]).reshape(5, 1, 1, 1)
    output = (truth + amount * random.randn(5, 3, 16, 16)).clip(0, 1)
    truth[4] = truth[4].mean(axis=0) + 0.01 * truth[4]
    return output, truth.clip(0, 1)


@pytest.fixture(scope="module")
def measured(pair):
    output, truth = (torch.from_numpy(x).float() for x in pair)
    # In uneven batches, so that a mean of the batches' means would show.
    return evaluate.measure([(output[:4], truth[:4]), (output[4:], truth[4:])])[0]


def lab(rgb):  # (N, 3, H, W) -> (N * H * W, 3)
    return lab_by_the_book(rgb.transpose(0, 2, 3, 1).reshape(-1, 3))


def test_mse_and_psnr(pair, measured):
    errors = [np.mean((o - t) ** 2) for o, t in zip(*pair)]
    assert measured["mse"] == pytest.approx(np.mean(errors), rel=1e-5)
    decibels = [min(60, 10 * math.log10(1 / error)) for error in errors]
    assert measured["psnr"] == pytest.approx(np.mean(decibels), rel=1e-5)


def test_ssim(pair, measured):
    window = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)]
                       for i in range(11)])
    window /= window.sum()
    values = []
    for o, t in zip(*(x.reshape(-1, 16, 16) for x in pair)):
        for i in range(6):
            for j in range(6):
                x, y = o[i : i + 11, j : j + 11], t[i : i + 11, j : j + 11]
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                c1, c2 = 0.01**2, 0.03**2
                values.append((2 * mx * my + c1) * (2 * cov + c2)
                              / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert measured["ssim"] == pytest.approx(np.mean(values), abs=1e-5)


def test_chroma_error_and_accuracies(pair, measured):
    o, t = map(lab, pair)
    assert measured["mae_ab"] == pytest.approx(np.abs(o - t)[:, 1:].mean(), rel=1e-4)
    for percent in (2, 5):
        near = [all(abs(p - q) <= percent / 100 * full for p, q, full in zip(x, y, (100, 220, 220)))
                for x, y in zip(o, t)]
        assert 0.05 < np.mean(near) < 0.95
        assert measured[f"acc_{percent}"] == pytest.approx(np.mean(near), abs=2e-3)


def hasler_suesstrunk(picture):
    r, g, b = 255 * picture
    rg, yb = (r - g).ravel(), (0.5 * (r + g) - b).ravel()
    return math.hypot(np.std(rg), np.std(yb)) + 0.3 * math.hypot(np.mean(rg), np.mean(yb))


def test_colorfulness(pair, measured):
    output, truth = ([hasler_suesstrunk(picture) for picture in x] for x in pair)
    assert measured["colorfulness"] == pytest.approx(np.mean(output), rel=1e-5)
    ratio = np.mean(output) / np.mean(truth)
    assert measured["colorfulness_ratio"] == pytest.approx(ratio, rel=1e-5)


def test_jensen_shannon_divergence_of_the_ab_histograms(pair, measured):
    histograms = []
    for x in pair:
        counts = {}
        for _, a, b in lab(x):
            where = (math.floor(a / 10 + 0.5), math.floor(b / 10 + 0.5))
            counts[where] = counts.get(where, 0) + 1 / (5 * 256)
        histograms.append(counts)
    p, q = histograms
    divergence = 0
    for where in {*p, *q}:
        middle = (p.get(where, 0) + q.get(where, 0)) / 2
        for one in (p.get(where, 0), q.get(where, 0)):
            divergence += 0.5 * one * math.log2(one / middle) if one else 0
    assert 0.05 < divergence < 0.95
    assert measured["ab_jsd"] == pytest.approx(divergence, abs=2e-3)


def test_identical_pictures_are_perfect():
    rgb = torch.rand(3, 3, 32, 32)
    metrics, psnrs = evaluate.measure([(rgb, rgb.clone())])
    perfect = {"mse": 0, "psnr": 60, "ssim": 1, "mae_ab": 0, "acc_2": 1, "acc_5": 1,
               "colorfulness_ratio": 1, "ab_jsd": 0}
    for name, value in perfect.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6), name
    assert psnrs.tolist() == [60, 60, 60]


def test_a_gray_picture_has_no_colorfulness():
    gray = torch.rand(3, 1, 32, 32).expand(-1, 3, -1, -1)
    assert evaluate.colorfulness(gray).abs().max() < 1e-4
    metrics, _ = evaluate.measure([(gray, gray)])
    ratio = metrics.pop("colorfulness_ratio")  # to a truth without colour: there is none
    assert math.isnan(ratio) and all(map(math.isfinite, metrics.values()))


def test_disjoint_colors_diverge_by_one_bit():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert evaluate.measure([(red, red.flip(1))])[0]["ab_jsd"] == pytest.approx(1)


# ----------------------------------------------------------------------------- the command


def test_rows_and_figure_of_the_command(tiny, tmp_path, capsys):
    runs = [tiny(train_unet.main, "--color", color, out=color) for color in ("rgb", "lab")]
    checkpoints = [str(run / "last.pt") for run in runs]
    figure, rows = tmp_path / "new" / "figure", tmp_path / "rows.json"
    command = ["--ckpt", *checkpoints, "--figure", str(figure), "--json", str(rows)]
    capsys.readouterr()
    evaluate.main(command)
    printed = capsys.readouterr().out

    rows = json.loads(rows.read_text())
    assert [row["name"] for row in rows] == ["gray", *checkpoints]
    keys = "name mse psnr ssim mae_ab acc_2 acc_5 colorfulness colorfulness_ratio ab_jsd".split()
    assert all(list(row) == keys for row in rows)
    assert rows[0]["colorfulness"] == pytest.approx(0, abs=1e-3)
    for row in rows:
        assert row["name"] in printed and f"{row['psnr']:.4f}" in printed

    test = data.load_pictures("shapes", "", 32, train=False).images
    generator = models.load_generator(checkpoints[1])
    metrics, _ = evaluate.measure(evaluate.colorize(generator, test, "lab"))
    assert rows[2] == {"name": checkpoints[1], **{k: pytest.approx(v) for k, v in metrics.items()}}
    truth = test.float() / 255
    luma = (0.299 * truth[:, :1] + 0.587 * truth[:, 1:2] + 0.114 * truth[:, 2:]).expand_as(truth)
    assert rows[0]["mse"] == pytest.approx(((luma - truth) ** 2).mean().item(), rel=1e-4)

    picture = np.asarray(Image.open(figure))
    evaluate.main(command)
    assert np.array_equal(picture, np.asarray(Image.open(figure)))  # the same pictures every time
    evaluate.main([*command, "--seed", "1"])
    assert not np.array_equal(picture, np.asarray(Image.open(figure)))


def test_the_figure_shows_best_and_worst_of_the_last_model(tiny, tmp_path, monkeypatch):
    def draw(generators, images, labels, saturation):
        drawn.append((list(generators), images, labels))
        return Image.new("RGB", (1, 1))

    drawn, run = [], tiny(train_unet.main)
    monkeypatch.setattr(evaluate, "draw_comparison", draw)
    evaluate.main(["--ckpt", str(run / "last.pt"), "--figure", str(tmp_path / "f.png")])
    generators, images, labels = drawn[-1]
    assert [title for title, _, _ in generators] == ["run"]
    assert labels == ["random"] * 8 + ["best"] * 3 + ["worst"] * 3

    def gains(images):  # in dB, over no colour at all
        psnrs = [evaluate.measure(evaluate.colorize(generator, images, "rgb"))[1]
                 for generator in (generators[0][1], None)]
        return psnrs[0] - psnrs[1]

    ranked = gains(data.load_pictures("shapes", "", 32, train=False).images).sort().values
    assert torch.allclose(gains(images[8:11]), ranked[-3:].flip(0), atol=1e-3)
    assert torch.allclose(gains(images[11:]), ranked[:3], atol=1e-3)


def test_one_checkpoint_is_in_memory_at_a_time(tiny, tmp_path, monkeypatch):
    alive, load = weakref.WeakSet(), models.load_generator

    def spy(path, device):
        assert not alive
        generator = load(path, device)
        alive.add(generator)
        return generator

    monkeypatch.setattr(models, "load_generator", spy)
    last = str(tiny(train_unet.main) / "last.pt")
    evaluate.main(["--ckpt", *[last] * 5, "--figure", str(tmp_path / "f.png")])


def test_a_ratio_that_does_not_exist_is_null_in_json(tiny, tmp_path, capsys):
    (tmp_path / "gray" / "test").mkdir(parents=True)
    Image.linear_gradient("L").resize((32, 32)).save(tmp_path / "gray" / "test" / "1.png")
    last = tiny(train_unet.main) / "last.pt"
    evaluate.main(["--ckpt", str(last), "--dataset", "folder", "--data-dir", str(tmp_path / "gray"),
                   "--figure", str(tmp_path / "f.png"), "--json", str(tmp_path / "rows.json")])
    assert " nan " in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)
    assert [row["colorfulness_ratio"] for row in rows] == [None, None]


def test_checkpoints_of_one_folder_are_told_apart_by_their_names(tiny, tmp_path, monkeypatch):
    titles, draw = [], evaluate.draw_figure
    monkeypatch.setattr(evaluate, "draw_figure", lambda columns, labels: titles.append(
        [title for title, _ in columns]) or draw(columns, labels))
    run, other = tiny(train_unet.main, "--epochs", 2, "--keep-every", 1), tiny(
        train_unet.main, out="other")
    checkpoints = [run / "epoch_001.pt", other / "last.pt", run / "last.pt"]
    evaluate.main(["--ckpt", *map(str, checkpoints), "--figure", str(tmp_path / "f.png")])
    assert titles[-1] == ["gray", "epoch_001", "other", "last", "truth"]
    assert evaluate.name_runs(["a/run/last.pt", "b/run/last.pt", "truth/last.pt", "other/last.pt"]
                              ) == ["1 run", "2 run", "3 truth", "other"]


def test_the_batch_size_changes_nothing_but_the_batches(tiny, tmp_path, monkeypatch):
    last, rows, sizes = str(tiny(train_unet.main) / "last.pt"), [], set()
    forward = models.UNet.forward
    monkeypatch.setattr(models.UNet, "forward",
                        lambda self, x: sizes.add(len(x)) or forward(self, x))
    for flags in ([], ["--batch-size", "7"]):
        sizes.clear()
        evaluate.main(["--ckpt", last, *flags, "--figure", str(tmp_path / "f.png"),
                       "--json", str(tmp_path / "rows.json")])
        rows.append(json.loads((tmp_path / "rows.json").read_text())[1])
        assert rows[-1].pop("name") == last
    assert sizes == {7, 1, 14}  # 50 test pictures, and 14 in the figure
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)


@pytest.mark.parametrize("name, kind", [("f.jpg", "JPEG"), ("f.WEBP", "WEBP"), ("f", "PNG")])
def test_the_figure_is_of_the_kind_that_its_name_says(name, kind, tiny, tmp_path):
    last = tiny(train_unet.main) / "last.pt"
    evaluate.main(["--ckpt", str(last), "--figure", str(tmp_path / name)])
    assert Image.open(tmp_path / name).format == kind


def test_the_figure_is_gray_then_models_then_truth():
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    unet = models.UNet(3, width=4)
    figure = np.asarray(evaluate.draw_comparison([("a run with a long name", unet, "rgb")], images))
    cells = figure[22 + 48, 4 + 48 :: 100]  # the middle of each cell of the first row
    truth = images[0, :, 16, 16].tolist()
    assert len(cells) == 3
    assert cells[0].tolist() == [round(0.299 * truth[0] + 0.587 * truth[1] + 0.114 * truth[2])] * 3
    assert cells[2].tolist() == truth


def test_checkpoints_of_other_pictures_need_a_flag_that_says_which(tiny, tmp_path, fails):
    small, large = tiny(train_unet.main, out="a"), tiny(train_unet.main, "--size", 48, out="b")
    command = ["--ckpt", small / "last.pt", large / "last.pt", "--figure", tmp_path / "f.png"]
    assert "--size 48" in fails(evaluate.main, command)
    evaluate.main([*map(str, command), "--size", "48"])
    assert Image.open(tmp_path / "f.png").size == (62 + 4 * 100, 22 + 14 * 100)


def test_two_folders_of_pictures_need_a_flag_that_says_which(tiny, tmp_path, fails):
    checkpoints = []
    for name in "ab":
        for side in ("train", "test"):
            folder = tmp_path / name / side
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = np.random.RandomState(i).randint(256, size=(32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
        flags = ["--dataset", "folder", "--data-dir", tmp_path / name]
        checkpoints.append(tiny(train_unet.main, *flags, out=f"run-{name}") / "last.pt")
    command = ["--ckpt", *checkpoints, "--figure", tmp_path / "f.png"]
    assert "--data-dir" in fails(evaluate.main, command)
    evaluate.main([*map(str, command), "--data-dir", str(tmp_path / "b")])


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tiny, tmp_path, fails, monkeypatch):
    def full_disk(self, file, kind):
        file.write(b"half")
        raise OSError("No space left on device")

    run, figure = tiny(train_unet.main), tmp_path / "f.png"
    figure.write_bytes(b"the old one")
    monkeypatch.setattr(Image.Image, "save", full_disk)
    line = fails(evaluate.main, ["--ckpt", run / "last.pt", "--figure", figure])
    assert f"cannot write {figure}" in line and "No space left" in line
    assert figure.read_bytes() == b"the old one" and not list(tmp_path.glob("*.new"))


def test_no_script_imports_torchvision_at_its_start():
    for script in Path(evaluate.__file__).parent.glob("*.py"):
        at_the_start = [ast.unparse(node) for node in ast.parse(script.read_text("utf-8")).body
                        if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert "import torch" in at_the_start
        assert not any("torchvision" in line for line in at_the_start)


def test_curves_show_the_numbers_of_the_log():
    rising = [{"epoch": i, "loss": 4.5 - i, "psnr": 20.0 + i, "mse": 0.1} for i in (1, 2, 3)]
    level = [{"epoch": i, "loss": 2.5, "psnr": 22.0, "mse": 0.1} for i in (1, 2, 3)]
    figure = evaluate.draw_curves([("rising", rising), ("level", level)])
    assert figure.size == (960, 240)  # a row of panels, 320 wide: loss, psnr, and room for a third
    colors = [tuple(bytes.fromhex(color[1:])) for color in evaluate.CURVE_COLORS[:2]]
    left, right, top, bottom = 50, 300, 60, 190  # of the first panel's axes
    one, two = colors
    assert figure.getpixel((left, top + 2)) == one == figure.getpixel((right, bottom - 2))  # falls
    assert figure.getpixel((320 + left, bottom - 2)) == one  # rises
    assert figure.getpixel((left + 60, (top + bottom) // 2)) == two  # and the other stays
    assert figure.getpixel((640 + left, top)) == (255, 255, 255)


def test_curves_name_each_stage_where_it_begins(monkeypatch):
    words, text = [], evaluate.ImageDraw.ImageDraw.text
    monkeypatch.setattr(evaluate.ImageDraw.ImageDraw, "text", lambda self, at, what, *args, **kw: (
        words.append((what, at)) or text(self, at, what, *args, **kw)))
    history = [{"epoch": 1, "stage": "generator", "feature": 1.0, "psnr": 24.0},
               {"epoch": 2, "stage": "generator", "feature": 0.5, "psnr": 25.0},
               {"epoch": 3, "stage": "critic", "accuracy": 0.9},
               {"epoch": 4, "stage": "gan", "feature": 0.75, "psnr": 24.5, "pictures_per_s": 9.0}]
    figure = evaluate.draw_curves([("nogan", history)])
    x, y = {}, {}
    for what, at in words:
        x.setdefault(what, at[0]), y.setdefault(what, at[1])
    assert {"nogan", "feature", "psnr", "generator", "gan"} <= x.keys()
    assert {"epoch 1", "2", "4", "24", "25"} <= x.keys()
    assert "pictures_per_s" not in x and "stage" not in x
    assert x["generator"] < x["2"] < x["gan"] < x["4"]
    counts = collections.Counter(what for what, _ in words)  # feature and psnr, and accuracy
    assert (counts["generator"], counts["critic"], counts["gan"]) == (2, 1, 2)
    assert min(y["generator"], y["gan"]) > y["epoch 1"] > 380  # below the panel, not on its curves
    assert figure.getpixel((round(x["gan"]) // 2, 120)) != (255, 255, 255)  # a line


def test_curves_of_several_checkpoints_are_one_picture(tiny, tmp_path, monkeypatch):
    drawn, draw = [], evaluate.draw_curves
    unet, nogan = tiny(train_unet.main, out="unet"), tiny(train_nogan.main, out="nogan")
    with Image.open(unet / "curves.png") as one, Image.open(nogan / "curves.png") as other:
        assert one.size[0] == other.size[0] and one.size[1] < other.size[1]
    monkeypatch.setattr(evaluate, "draw_curves", lambda runs: drawn.append(runs) or draw(runs))
    command = ["--ckpt", unet / "last.pt", nogan / "last.pt", "--curves", tmp_path / "both.png"]
    evaluate.main([str(word) for word in command])
    assert [(title, len(history)) for title, history in drawn[0]] == [("unet", 1), ("nogan", 4)]
    assert Image.open(tmp_path / "both.png").format == "PNG"


def test_saturation_multiplies_a_and_b_and_keeps_lightness(tmp_path, tiny):
    rgb = 0.5 + 0.05 * torch.rand(4, 3, 16, 16)  # far from the gamut's border
    before, after = data.rgb_to_lab(rgb), data.rgb_to_lab(evaluate.saturated(rgb, 3.0))
    assert torch.allclose(after[:, :1], before[:, :1], atol=1e-3)
    assert torch.allclose(after[:, 1:], 3 * before[:, 1:], atol=1e-2)
    vivid = torch.rand(4, 3, 16, 16)
    lightness = data.rgb_to_lab(evaluate.saturated(vivid, 3.0))[:, :1]
    assert torch.allclose(lightness, data.rgb_to_lab(vivid)[:, :1], atol=1e-2)

    run, rows = tiny(train_unet.main), {}
    for k in ("0", "1", "2"):
        command = ["--ckpt", run / "last.pt", "--figure", tmp_path / f"{k}.png", "--json",
                   tmp_path / "rows.json", "--saturation", k]
        evaluate.main([str(word) for word in command])
        gray, rows[k] = json.loads((tmp_path / "rows.json").read_text())
        assert gray["colorfulness"] == 0
    assert rows["0"]["colorfulness_ratio"] < 0.01
    assert rows["1"]["colorfulness_ratio"] < rows["2"]["colorfulness_ratio"]
    assert (tmp_path / "1.png").read_bytes() != (tmp_path / "2.png").read_bytes()


def test_pictures_are_saved_under_equal_names(tiny, tmp_path, fails):
    run, folder = tiny(train_unet.main), tmp_path / "pictures"
    command = ["--ckpt", run / "last.pt", "--figure", tmp_path / "f.png", "--save-pictures", folder]
    evaluate.main([str(word) for word in command])
    names = [path.name for path in sorted((folder / "truth").iterdir())]
    test = data.load_pictures("shapes", "", 32, train=False).images
    assert names == [path.name for path in sorted((folder / "run").iterdir())]
    assert len(names) == len(test) and names[:2] == ["00000.png", "00001.png"]

    def read(name):
        pictures = [np.asarray(Image.open(path)) for path in sorted((folder / name).iterdir())]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    assert torch.equal(read("truth"), test)
    painted, _ = next(evaluate.colorize(models.load_generator(run / "last.pt"), test, "rgb"))
    assert (read("run") - 255 * painted).abs().max() < 0.51  # rounded, after a sum in another order
    assert f"{folder} exists: choose another" in fails(evaluate.main, command)


def test_a_title_of_any_letters_and_lines_is_drawn():
    row = {"epoch": 1, "psnr": 20.0}
    assert evaluate.draw_curves([("two\nlines", [row]), ("", [row])]).size == (960, 240)
    pictures = torch.zeros(2, 3, 32, 32)
    assert evaluate.draw_figure([("two\nlines" * 9, pictures)]).size == (104, 222)


def test_one_folder_of_pictures_may_be_named_in_two_ways(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        for side in ("train", "test"):
            (tmp_path / "a" / side).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), (i, 9 * i, 40), np.uint8)).save(
                tmp_path / "a" / side / f"{i}.png")
    run = tiny(train_unet.main, "--dataset", "folder", "--data-dir", "a")
    checkpoint = models.load_checkpoint(run / "last.pt")
    checkpoint["args"]["data_dir"] = "a"  # as in a checkpoint that is to be given away
    torch.save(checkpoint, run / "relative.pt")
    paths = [str(run / name) for name in ("last.pt", "relative.pt")]
    evaluate.main(["--ckpt", *paths, "--json", "rows.json"])
    _, one, two = json.loads((tmp_path / "rows.json").read_text())
    assert one["mse"] == two["mse"]
