import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(
    torch.__version__ < "2.11" and not torch.cuda.is_available(),
    reason="without a driver, fake CUDA tensors need a newer torch")
def test_shapes_types_devices_and_waits_on_cuda_without_a_card():
    # In a process of its own: fake CUDA tensors start threads, and then no test could fork.
    file = Path(__file__).with_name("fake_cuda.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    assert "15 passed" in run.stdout
