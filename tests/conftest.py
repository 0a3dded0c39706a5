import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; run with -m slow")


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
    """tiny(main, ...) trains on a few made-up pictures and returns the run folder."""
    monkeypatch.setattr(data, "SHAPES_TRAIN", 400)
    monkeypatch.setattr(data, "SHAPES_TEST", 50)

    def run(main, *argv, out="run"):
        folder = tmp_path / out
        flags = "--dataset shapes --limit 60 --batch-size 16 --width 4 --epochs 1".split()
        main([*flags, "--out", str(folder), *map(str, argv)])
        return folder

    return run
