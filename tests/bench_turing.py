"""Can you tell? How often a person takes a model's colours for the true ones.

    python tests/bench_turing.py --ckpt runs/unet/last.pt runs/gan/last.pt runs/nogan/last.pt

It writes turing.html, a page by itself: a gray test picture over the true and a painted one, side
by side in random order. Who cannot tell is fooled half the time. Zhang et al., 2016
(arXiv:1603.08511), and Nazeri et al., 2018 (arXiv:1803.05400), measure realism in this way.
"""

import argparse
import base64
import io
import json
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402

PAGE = r"""<!doctype html><meta charset="utf-8"><title>Can you tell?</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; font: 18px/1.6 system-ui, sans-serif; text-align: center }
img { width: min(40vw, 32vh); image-rendering: pixelated; margin: 3px; border: 5px solid #0000 }
img.real { border-color: #2f9e4f } .painted { opacity: .5 } p { white-space: pre-line }
</style><h2>Can you tell?</h2><div id="play"><img><br><img onclick="choose(0)">
<img onclick="choose(1)"></div><p id="say"></p><script>
let trials = TRIALS, [gray, ...sides] = document.images, now = 0, fooled = {};  // model: [k, n]
function ask() {
  say.textContent = `${now + 1} of ${trials.length}: which one is real? Tap it, or press ← or →`;
  [gray.src, sides[0].src, sides[1].src] = trials[now].pictures;
  sides[0].className = sides[1].className = "";
}
function choose(side) {  // the first time it is the answer, the second time it goes on
  if (sides[0].className) return ++now < trials.length ? ask() : finish();
  const {model, real} = trials[now], tally = fooled[model] ||= [0, 0];
  sides[real].className = "real"; sides[1 - real].className = "painted";
  tally[0] += side != real; tally[1]++; say.textContent =
    `${side == real ? "Right" : "Fooled"}: the framed one is real. Go on with ← or → or a tap`;
}
const interval = (p, n, z = 1.96) => [-z, z].map(z => Math.round(100 / (1 + z * z / n) *  // Wilson
  (p + z * z / 2 / n + z * Math.sqrt(p * (1 - p) / n + z * z / 4 / n / n))));
function finish() {
  play.remove(); say.textContent = Object.entries(fooled).map(([model, [k, n]]) =>
    `${model} fooled you ${k} times of ${n}: ${Math.round(100 * k / n)} %, 95 % interval ` +
    `${interval(k / n, n).join(" to ")} %\n\n`).join("") + "50 % is as good as the truth. " +
    "An interval of ± 10 points takes up to 93 answers for each model, one of ± 5 points 381.";
}
onkeydown = ({key, repeat}) => ["ArrowLeft", "ArrowRight"].forEach(
  (arrow, side) => key == arrow && !repeat && choose(side));
ask();</script>"""


def png(rgb):  # (3, H, W) in [0, 1]
    file = io.BytesIO()
    Image.fromarray((255 * rgb).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@evaluate.one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", required=True, help="last.pt of one or more runs")
    parser.add_argument("--pictures", type=data.number(int, 1, 9999), default=20, help="a model")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and their order")
    parser.add_argument("--out", default="turing.html", help="the page (%(default)s)")
    args = parser.parse_args(argv, argparse.Namespace(dataset=None, data_dir=None, size=None))

    trained, turns = [models.load_checkpoint(path)["args"] for path in args.ckpt], len(args.ckpt)
    images = evaluate.load_test_pictures(args, trained)
    torch.manual_seed(args.seed)
    images = images[torch.randperm(len(images))[: turns * args.pictures]]
    gray, truth = map(torch.cat, zip(*evaluate.colorize(None, images, "rgb")))
    painted, sides = torch.empty_like(truth), torch.randint(2, (len(images),)).tolist()
    for i, (path, flags) in enumerate(zip(args.ckpt, trained)):  # the models take turns
        outputs = evaluate.colorize(models.load_generator(path), images[i::turns], flags["color"])
        painted[i::turns] = torch.cat([output for output, _ in outputs])
    trials = [{"model": args.ckpt[i % turns], "real": real,  # 0: left, 1: right
               "pictures": [png(gray[i]), *map(png, [painted[i], truth[i]][:: 2 * real - 1])]}
              for i, real in enumerate(sides)]
    page = PAGE.replace("TRIALS", json.dumps(trials).replace("<", r"\u003c"))
    Path(args.out).write_text(page, encoding="utf-8")
    print(f"wrote {args.out}, with {len(trials)} pictures")


if __name__ == "__main__":
    main()
