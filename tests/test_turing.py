import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import bench_turing
import data
import evaluate
import models
import train_gan
import train_unet


@pytest.fixture
def page(tiny, tmp_path):
    """The page of two models, its trials, and the checkpoints that it was made from."""
    paths = [str(tiny(train_unet.main, out="unet") / "last.pt"),
             str(tiny(train_gan.main, "--color", "lab", out="</script>") / "last.pt")]
    out = tmp_path / "turing.html"
    bench_turing.main(["--ckpt", *paths, "--pictures", "12", "--seed", "1", "--out", str(out)])
    html = out.read_text(encoding="utf-8")
    return html, json.loads(re.search(r"let trials = (\[.*\]), \[gray", html)[1]), paths


def pixels(url):
    kind, encoded = url.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))))


def test_the_page_needs_no_other_file_and_enlarges_without_smoothing(page):
    html, _, _ = page
    assert "//" not in re.sub(r"data:image/png;base64,[\w+/=]+| // .*", "", html)
    assert not re.search(r"<link|@import|url\(|import\(|fetch\(|<script src", html)
    assert html.count("</script>") == 1  # whatever a run folder is called
    assert "image-rendering: pixelated" in html


def test_the_models_take_turns_and_the_true_picture_is_on_either_side(page):
    _, trials, paths = page
    assert [trial["model"] for trial in trials] == paths * 12
    for path in paths:
        right = sum(trial["real"] for trial in trials if trial["model"] == path)
        assert 2 <= right <= 10
    assert len({trial["pictures"][1 + trial["real"]] for trial in trials}) == len(trials)


def test_the_page_shows_test_pictures_and_what_evaluate_paints(page):
    _, trials, paths = page
    tests = data.load_pictures("shapes", "datasets", 32, train=False).images
    for path, color in zip(paths, ("rgb", "lab")):
        mine = [trial for trial in trials if trial["model"] == path]
        shown = [[pixels(url) for url in trial["pictures"]] for trial in mine]
        truth = torch.stack([torch.from_numpy(three[1 + trial["real"]].copy()).permute(2, 0, 1)
                             for trial, three in zip(mine, shown)])
        assert all((tests == picture).all(dim=(1, 2, 3)).any() for picture in truth)
        generator = models.load_generator(path)
        painted, _ = next(evaluate.colorize(generator, truth, color))
        gray, _ = next(evaluate.colorize(None, truth, color))
        for trial, three, paint, luma in zip(mine, shown, painted, gray):
            for picture, expected in ((three[2 - trial["real"]], paint), (three[0], luma)):
                assert abs(picture - 255 * expected.permute(1, 2, 0).numpy()).max() < 0.51


def test_the_same_seed_gives_the_same_page_and_another_seed_another(tiny, tmp_path):
    path, pages = tiny(train_unet.main) / "last.pt", []
    for seed in (0, 0, 1):
        out = str(tmp_path / "turing.html")
        bench_turing.main(["--ckpt", str(path), "--seed", str(seed), "--out", out])
        pages.append((tmp_path / "turing.html").read_bytes())
    assert pages[0] == pages[1] != pages[2]


def test_the_page_says_how_many_answers_an_interval_takes():
    rates = np.linspace(0, 1, 1_000_001)

    def half_width(n):  # Wilson's interval: the rates that 50 % of n answers are 1.96 sigma off
        inside = rates[abs(0.5 - rates) <= 1.96 * np.sqrt(rates * (1 - rates) / n)]
        return (inside[-1] - inside[0]) / 2

    told = re.search(r"10 points takes up to (\d+) .* 5 points (\d+)", bench_turing.PAGE)
    for n, points in (int(told[1]), 0.10), (int(told[2]), 0.05):
        assert half_width(n) <= points < half_width(n - 1)
