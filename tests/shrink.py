"""Of a checkpoint, what evaluate.py needs, in half the bytes: how .github/colorizer.pt was made.

    python tests/shrink.py runs/colorizer/last.pt .github/colorizer.pt

Kept are the generator, in half precision, the flags and the log. It cannot be resumed: optimizers,
the discriminator and the weights in training stay behind.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
import models  # noqa: E402


@evaluate.one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="last.pt of a run")
    parser.add_argument("small", help="the file to write")
    args = parser.parse_args(argv)
    whole = models.load_checkpoint(args.checkpoint)
    weights = {name: value.half() if value.is_floating_point() else value
               for name, value in whole["generator"].items()}
    flags = whole["args"] | {"data_dir": os.path.relpath(whole["args"]["data_dir"])}
    models.save_checkpoint(args.small, whole["script"], flags, whole["epoch"], whole["history"],
                           generator=weights)
    print(f"{args.small}: {os.path.getsize(args.small) / 1e6:.2f} MB, "
          f"{args.checkpoint} had {os.path.getsize(args.checkpoint) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
