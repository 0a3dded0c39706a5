"""The trained network that comes along, .github/colorizer.pt, and tests/shrink.py, its maker."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import models
import shrink
import train_gan

COLORIZER = Path(__file__).resolve().parents[1] / ".github" / "colorizer.pt"


def test_it_is_small_and_holds_only_what_evaluate_needs():
    assert COLORIZER.stat().st_size <= 4_500_000
    checkpoint = models.load_checkpoint(COLORIZER)
    assert set(checkpoint) == {"format", *models.CHECKPOINT_KEYS}
    assert {x.dtype for x in checkpoint["generator"].values()} == {torch.float16, torch.int64}
    flags = checkpoint["args"]
    assert flags["width"] == 16 and checkpoint["epoch"] >= 20 and flags["limit"] is None
    assert flags["data_dir"] == "datasets/cifar10" and not Path(flags["out"]).is_absolute()


def test_its_pictures_keep_their_gray_and_are_not_gray(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_TEST", 200)
    generator = models.load_generator(COLORIZER)
    assert {x.dtype for x in generator.parameters()} == {torch.float32}
    test = data.load_pictures("shapes", "", 32, train=False).images
    painted, truth = map(torch.cat, zip(*evaluate.colorize(generator, test, "rgb")))
    inside = (painted > 0).all(1) & (painted < 1).all(1)  # where no channel had to be clipped
    luma = torch.tensor([0.299, 0.587, 0.114])
    drift = torch.einsum("nchw,c->nhw", painted - truth, luma)[inside]
    assert inside.float().mean() > 0.5 and drift.abs().max() < 1e-4
    evaluate.main(["--ckpt", str(COLORIZER), "--dataset", "shapes", "--json",
                   str(tmp_path / "rows.json"), "--figure", str(tmp_path / "figure.png")])
    gray, row = json.loads((tmp_path / "rows.json").read_text())
    assert gray["colorfulness_ratio"] < 1e-3
    assert row["colorfulness_ratio"] > 0.1  # these are no photographs: it does not know them


def test_a_photo_is_colorized_by_one_command(tmp_path, capsys):
    sky = np.linspace(60, 220, 96)[:, None].repeat(128, 1).astype(np.uint8)
    Image.fromarray(sky).save(tmp_path / "photo.png")
    evaluate.main(["--ckpt", str(COLORIZER), "--images", str(tmp_path / "photo.png"),
                   "--out-dir", str(tmp_path / "colorized")])
    painted = np.asarray(Image.open(tmp_path / "colorized" / "photo.png"))
    assert painted.shape == (96, 128, 3) and np.ptp(painted.astype(int), axis=2).mean() > 2
    lightness = data.rgb_to_lab(torch.from_numpy(painted / 255).float().movedim(2, 0)[None])[0, 0]
    gray = data.rgb_to_lab(torch.from_numpy(sky / 255).float().expand(1, 3, -1, -1))[0, 0]
    assert (lightness - gray).abs().mean() < 0.5


def test_shrinking_keeps_what_is_painted(tiny, tmp_path, fails):
    run, small = tiny(train_gan.main), tmp_path / "small.pt"
    shrink.main([str(run / "last.pt"), str(small)])
    assert small.stat().st_size < (run / "last.pt").stat().st_size / 4
    gray = torch.rand(4, 1, 32, 32) * 2 - 1
    whole, half = (models.load_generator(path)(gray) for path in (run / "last.pt", small))
    assert (whole - half).abs().max() < 0.02
    assert "generator_in_training" in fails(train_gan.main, ["--resume", small, "--epochs", "2"])
    with pytest.raises(SystemExit):
        shrink.main([str(tmp_path / "none.pt"), str(small)])
