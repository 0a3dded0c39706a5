import json

import pytest
import torch

import bench_recipe
import bench_speed


@pytest.mark.slow  # the workers of its DataLoaders take their time to start
@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_the_table_has_a_row_for_each_thing_changed(tmp_path, capsys):
    file = tmp_path / "speed.json"
    flags = "--system gan --width 1 --pictures 128 --repeats 1 --device cpu --json".split()
    rows = bench_speed.main([*flags, str(file)])
    assert json.loads(file.read_text()) == rows and "of the notebook's" in capsys.readouterr().out
    notebooks = [row["ratio"] for row in rows if row["name"].startswith("notebook")]
    assert len(notebooks) == 3 and max(notebooks) == 1
    assert all(row["pictures_per_s"] > 0 for row in rows) and len(rows) == 12


def test_the_arithmetic_of_a_step_is_that_of_the_convolutions():
    width, forward = 64, 0  # multiply-adds of the convolutions, a level at a time
    for level, side in enumerate([32, 16, 8, 4, 2]):
        w = width * 2**level
        forward += 9 * side**2 * ((1 if level == 0 else w // 2) * w + w * w)
        if level < 4:
            forward += 9 * side**2 * (2 * w * w + w * w) + (side // 2) ** 2 * 2 * w * w
    forward += 32**2 * width * 3
    assert bench_speed.flop_a_picture("unet", width) == pytest.approx(6 * forward, rel=0.01)


def test_what_a_notebook_feeds_is_what_the_loop_sees():
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    gray, target = bench_speed.PILPictures(images)[1]
    expected_gray, expected = bench_speed.data.to_gray_and_target(images[1:2], "rgb")
    assert torch.allclose(target, expected[0], atol=1e-6)
    assert (gray - expected_gray[0]).abs().max() < 2 / 255  # PIL rounds luma to bytes


def test_the_recipes_are_told_apart_and_the_verdict_is_of_their_rows(tmp_path, capsys):
    file = tmp_path / "recipe.json"
    flags = "--dataset shapes --limit 60 --width 2 --epochs 2 --batch-size 16".split()
    rows = bench_recipe.main([*flags, "--out", str(tmp_path / "run"), "--json", str(file)])
    assert [(row["recipe"], row["epoch"]) for row in rows] == [
        ("ours", 1), ("ours", 2), ("notebook", 1), ("notebook", 2)]
    assert json.loads(file.read_text()) == rows
    best, last = min(row["mse"] for row in rows[2:]), rows[1]["mse"]
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert f"best mse {best:.5f}, ours at the end {last:.5f}" in verdict
    passed = [row["epoch"] for row in rows[:2] if row["mse"] < best]
    assert (f"first better in epoch {passed[0]}" if passed else "never better") in verdict
