import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402

torch.set_num_threads(1)  # tiny networks gain nothing from more, and lose much on a busy machine


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; run with -m slow")


def lab_by_the_book(rgb):
    """CIE L*a*b* of sRGB (N, 3) in [0, 1], in float64, written from the formulas."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    rows = [(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750),
            (0.0193339, 0.1191920, 0.9503041)]
    x, y, z = (linear @ np.array(row) / sum(row) for row in rows)

    def f(t):
        return np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)

    return np.stack([116 * f(y) - 16, 500 * (f(x) - f(y)), 200 * (f(y) - f(z))], axis=1)


def epochs(main, n):
    """The flags that make a script train for n epochs, NoGAN in each of its stages."""
    nogan = main.__module__ == "train_nogan"
    stages = ["classifier-", "generator-", "critic-", "gan-"] if nogan else [""]
    return [word for stage in stages for word in (f"--{stage}epochs", str(n))]


@pytest.fixture
def fails(capsys):
    """fails(main, argv) runs a command that must end in one line `error: ...` and status 2."""

    def run(main, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in argv])
        assert ended.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ")
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    return run


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """tiny(main, ...) trains on a few made-up pictures, an epoch a stage; gives the run folder."""
    monkeypatch.setattr(data, "SHAPES_TRAIN", 400)
    monkeypatch.setattr(data, "SHAPES_TEST", 50)

    def run(main, *argv, out="run"):
        folder = tmp_path / out
        flags = "--dataset shapes --limit 60 --batch-size 16 --width 4".split()
        main([*flags, *epochs(main, 1), "--out", str(folder), *map(str, argv)])
        return folder

    return run
