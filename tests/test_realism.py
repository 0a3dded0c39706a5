"""The measures of bench_realism.py: against independent computations, and at their fixed points."""

import bench_realism
import numpy as np
import pytest
import torch
from PIL import Image

import data
import train_unet


def test_frechet_distance_is_that_of_a_computation_by_the_book():
    random = np.random.RandomState(0)
    painted = random.randn(500, 6) @ random.randn(6, 6) + random.randn(6)
    true = (random.randn(400, 6) @ random.randn(6, 6)) * [1, 2, 3, 4, 5, 100]
    x, y = painted / true.std(axis=0, ddof=1), true / true.std(axis=0, ddof=1)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root_of_product = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).sum().real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b)
    expected -= 2 * root_of_product
    value = bench_realism.frechet(torch.from_numpy(painted), torch.from_numpy(true))
    assert value == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_at_its_fixed_points():
    features = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).double()
    features = torch.cat([(features - features.mean(0)) / features.std(0), torch.ones(300, 2)], 1)
    assert bench_realism.frechet(features, features) == pytest.approx(0, abs=1e-9)
    shifted = features + torch.tensor([3.0, 0, 0, 0, -4, 0, 0])
    assert bench_realism.frechet(shifted, features) == pytest.approx(25)
    doubled = features * torch.tensor([2.0, 2, 1, 1, 1, 1, 1])  # (2 - 1)^2 for each of the two
    assert bench_realism.frechet(doubled, features) == pytest.approx(2)


def test_a_checkerboard_stands_out_of_the_power_spectrum():
    pictures = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pictures = 0.4 + 0.2 * pictures

    def lines(rgb):
        power = bench_realism.power_spectrum(rgb)
        return [bench_realism.grid(power, period) for period in (2, 4)]

    assert lines(pictures) == pytest.approx([1, 1], abs=0.1)
    x = torch.arange(32)
    for period, expected in ((2, [True, False]), (4, [False, True])):
        stripes = (x % period < period / 2) * torch.rand(64, 1, 32, 1)  # across, of any strength
        red = pictures + 0.2 * stripes * torch.tensor([1.0, -1, 0]).view(1, 3, 1, 1)
        assert [value > 1.5 for value in lines(red)] == expected
        assert [value > 1.5 for value in lines(red.mT)] == expected


@pytest.mark.parametrize("kind, epochs", [("resnet", "1"), ("small", "4")])
def test_a_judge_learns_its_classes_and_is_kept(kind, epochs, tiny, tmp_path, capsys):
    run = tiny(train_unet.main)
    judge, file = tmp_path / "judge.pt", tmp_path / "rows.json"
    command = ["--ckpt", run / "last.pt", "--judge", kind, "--judge-file", judge, "--json", file]
    command = [str(word) for word in command] + ["--judge-epochs", epochs, "--saturation", "3"]
    rows = bench_realism.main(command)
    names = [row["name"] for row in rows]
    assert names == ["truth", "gray", str(run / "last.pt"), f"{run / 'last.pt'}, saturation 3"]
    assert rows[2]["frechet"] != rows[3]["frechet"]
    assert rows[0]["frechet"] < 1e-6 and rows[1]["frechet"] > 1
    assert rows[0]["grid_2"] == pytest.approx(1, abs=0.2) and rows[1]["grid_2"] is None
    if kind == "small":  # a third would be chance
        assert rows[0]["class_acc"] > 0.6 > rows[1]["class_acc"]

    assert "epoch" in capsys.readouterr().out
    assert bench_realism.main(command) == rows
    assert "epoch" not in capsys.readouterr().out  # it was read, not trained again
    images = data.load_pictures("shapes", "", 32, train=False).images
    loaded = torch.load(judge, weights_only=True)
    network = bench_realism.build_judge(kind, 3)
    network.load_state_dict(loaded["state"])
    with torch.inference_mode():
        logits, features = bench_realism.judged(network.eval(), images / 255)
        assert torch.allclose(network.fc(features), logits)


@pytest.mark.parametrize("kind, named", [("resnet", "of kind small"), ("small", "other pictures")])
def test_the_judge_is_not_the_one_that_its_file_holds(kind, named, tiny, tmp_path, fails):
    judge = bench_realism.build_judge("small", 3)
    saved = {"kind": "small", "test_pictures": 0, "state": judge.state_dict()}
    torch.save(saved, tmp_path / "judge.pt")
    run = tiny(train_unet.main)
    command = ["--ckpt", run / "last.pt", "--judge", kind]
    assert named in fails(bench_realism.main, [*command, "--judge-file", tmp_path / "judge.pt"])


def test_test_pictures_without_classes_cannot_be_judged(tiny, tmp_path, fails):
    for i in range(4):
        place = tmp_path / "test" / f"{i}.png"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (60 * i, 9, 9)).save(place)
    run = tiny(train_unet.main)
    command = ["--ckpt", run / "last.pt", "--dataset", "folder", "--data-dir", tmp_path]
    assert "no labels" in fails(bench_realism.main, command)
