"""What test_torchrun.py starts in several processes: scripts, one after the other, watched.

    torchrun --nproc_per_node 2 tests/torchrun_worker.py SCRIPT FLAG ... [then SCRIPT FLAG ...]

At the end of a run, each process writes <rank>.pt into its folder: the state of all it keeps, and
of the first averaged gradients what they were before and after. SABOTAGE in the environment, "nan"
or "kill": in the second epoch, the last process meets a loss that is not finite, or is killed.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
import models  # noqa: E402

torch.set_num_threads(1)
gradients, average, log = [], models.average_gradients, evaluate.Run.log
keep_going = evaluate.Run.__exit__


def watch_average(network):
    def flat():
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    before = flat()
    average(network)
    gradients.append((before, flat()))


def watch_log(self, **losses):
    if self.epoch == 2 and models.RANK == models.PROCESSES - 1:
        if os.environ.get("SABOTAGE") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("SABOTAGE") == "nan":
            losses = {name: loss * float("nan") for name, loss in losses.items()}
    log(self, **losses)


def watch_exit(self, *error):
    if error[0] is None:
        kept = {**self.state, **self.stage_state}.items()
        states = {name: value.state_dict() for name, value in kept}
        torch.save({"state": states, "gradients": gradients[0]}, self.out / f"{models.RANK}.pt")
    return keep_going(self, *error)


models.average_gradients = watch_average
evaluate.Run.log, evaluate.Run.__exit__ = watch_log, watch_exit
torch.distributed.destroy_process_group = lambda: None  # the next run goes on in the same group
for run in "\0".join(sys.argv[1:]).split("\0then\0"):
    script, *flags = run.split("\0")
    gradients.clear()
    importlib.import_module(script).main(flags)
