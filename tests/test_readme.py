"""What the README says can be done, done as it says."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench_figures
import data
import evaluate
import models
import train_unet

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code(heading):
    """The first Python block below a heading, or what stands in its place."""
    return re.search(r"```python\n(.*?)```", README[README.index(heading):], re.DOTALL)[1]


def test_the_readme_is_short_and_its_pictures_are_small():
    assert len(README.splitlines()) <= 280
    shown = set(re.findall(r"\]\((\.github/\S+?)\)", README))
    pictures = {f".github/{path.name}" for path in (ROOT / ".github").iterdir()
                if path.suffix in (".png", ".jpg", ".svg", ".webp")}
    assert shown == pictures
    assert sum((ROOT / path).stat().st_size for path in pictures) < 300_000


def test_every_anchor_of_the_readme_is_a_heading():
    headings = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-")
                for line in re.findall(r"^#+ (.*)", README, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= headings


def test_a_network_and_a_photo_from_python(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny(train_unet.main, out="runs/shapes")
    Image.fromarray(np.random.RandomState(0).randint(256, size=(50, 70, 3), dtype=np.uint8)).save(
        "photo.jpg")
    names = {}
    exec(code("## From Python"), names)
    assert len(code("## From Python").splitlines()) == 6
    assert names["painted"].shape == names["images"].shape and names["painted"].max() <= 1
    assert Image.open("colorized.png").size == (70, 50)


def test_a_network_of_ones_own_is_one_entry(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "GENERATORS", dict(models.GENERATORS))
    monkeypatch.setattr(models, "Plain", None, raising=False)
    exec(code("## For a researcher"), vars(models))
    run = tiny(train_unet.main, "--generator", "plain", "--color", "lab")
    generator = models.load_generator(run / "last.pt")
    assert type(generator).__name__ == "Plain"
    assert generator(torch.zeros(1, 1, 32, 32)).shape == (1, 2, 32, 32)


def test_outputs_from_elsewhere_are_measured(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tiny(train_unet.main)
    evaluate.main(["--ckpt", str(run / "last.pt"), "--save-pictures", "pictures"])
    for side, name in [("truth", "truth"), ("run", "theirs")]:
        Path(name).mkdir()
        Path("pictures", side).rename(Path(name, "test"))
    names = {}
    exec(code("*Outputs from elsewhere*"), names)
    test = data.load_pictures("shapes", "", 32, train=False).images
    painted = evaluate.colorize(models.load_generator(run / "last.pt"), test, "rgb")
    expected, _ = evaluate.measure(painted)
    assert names["metrics"]["psnr"] == pytest.approx(expected["psnr"], abs=0.02)  # of rounded bytes
    assert "colorfulness_ratio" in capsys.readouterr().out


def test_the_figures_of_results_show_the_best_and_the_worst_of_each_class(
    tiny, tmp_path, monkeypatch
):
    run, drawn = tiny(train_unet.main, "--epochs", 2), {}
    monkeypatch.setattr(evaluate, "draw_figure", lambda columns, rows: drawn.setdefault(
        len(drawn), (columns, rows)) and Image.new("RGB", (8, 8)))
    bench_figures.main(shlex.split(f"--ckpt {run}/last.pt --names U-Net --out-dir {tmp_path}"))
    assert {path.name for path in tmp_path.glob("*.webp")} == {"results.webp", "failures.webp"}
    test, labels = data.load_pictures("shapes", "", 32, train=False)
    truth, vivid = test / 255, evaluate.colorfulness(test / 255)
    output = torch.cat([rgb for rgb, _ in evaluate.colorize(
        models.load_generator(run / "last.pt"), test, "rgb")])
    gray = data.luma(truth).expand_as(truth)
    error, of_gray = evaluate.mse(output, truth), evaluate.mse(gray, truth)
    gain = (evaluate.psnr(output, truth) - evaluate.psnr(gray, truth)).where(
        vivid >= vivid.median(), -torch.inf)
    for i, score in [(0, gain), (1, error - of_gray)]:
        columns, rows = drawn[i]
        assert rows == ["gray", "U-Net", "truth"]
        best = {label.item(): score[labels == label].argmax() for label in labels.unique()}
        shown = {bench_figures.CLASSES.index(name): pictures for name, pictures in columns}
        for label, pictures in shown.items():
            assert torch.equal(pictures[2], truth[labels == label][best[label]])
