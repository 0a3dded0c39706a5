"""The drawings in .github/*.svg say what the code does.

A shape in a drawing has the id of the unit that it leaves (`enc2`, or `enc2-in` where it enters;
`head-lab` with two colours), and a list of layers names the units that are made of them.
"""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import models
import train_gan
import train_nogan
import train_unet

FIGURES = Path(__file__).resolve().parents[1] / ".github"
NETWORKS = ["unet.svg", "strided.svg", "discriminators.svg"]
TRAINING = {
    "train_unet.svg": train_unet, "train_gan.svg": train_gan, "train_nogan.svg": train_nogan
}


def elements(figure):
    return list(ET.parse(FIGURES / figure).getroot().iter())


def words(element):
    return " ".join("".join(element.itertext()).split())


@pytest.mark.parametrize("figure", [*NETWORKS, *TRAINING])
def test_a_drawing_is_small_well_formed_and_needs_no_other_file(figure):
    source = (FIGURES / figure).read_text(encoding="utf-8")
    assert len(source.encode()) < 10_000
    root, *_ = elements(figure)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox").startswith("0 0 830 ")
    links = re.findall(r"""(?:href=["']|url\()(.*?)["')]""", source)
    ids = [element.get("id") for element in elements(figure) if element.get("id")]
    assert {link[0] for link in links} == {"#"} and {link[1:] for link in links} <= set(ids)
    assert len(ids) == len(set(ids))
    assert source.count("//") == 1  # the name space's
    assert not re.search("DOCTYPE|@import|@font-face|<script|<image|<foreignObject", source)


# ----------------------------------------------------------------------------------- the networks


def networks(figure, colors):
    """{what their ids begin with: network} of a drawing, for 3 colours or Lab's 2."""
    with torch.device("meta"):
        if figure == "discriminators.svg":
            return {head: models.Discriminator(colors, head=head) for head in ("image", "patch")}
        return {"": models.GENERATORS["strided" if figure == "strided.svg" else "maxpool"](colors)}


def units(networks):
    return {name: unit for prefix, network in networks.items()
            for name, unit in network.named_modules(prefix=prefix)}


def shapes(networks, colors):
    """{id: "C × H × W"} of what enters and leaves each unit for a 32x32 picture."""
    seen = {}
    for name, unit in units(networks).items():
        def keep(unit, inputs, output, name=name):
            seen[name], seen[f"{name}-in"] = output.shape[1:], inputs[0].shape[1:]
        unit.register_forward_hook(keep)
    gray, color = (torch.empty(2, n, 32, 32, device="meta") for n in (1, colors))
    for network in networks.values():
        network(gray, color) if isinstance(network, models.Discriminator) else network(gray)
    return {name: " × ".join(map(str, shape)) for name, shape in seen.items()}


def layers(unit):
    """What a unit is made of, in the drawings' words."""
    found = []
    for layer in unit.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            side, stride = layer.kernel_size[0], layer.stride[0]
            kind = "conv" if isinstance(layer, nn.Conv2d) else "transposed conv"
            found.append(f"{side}×{side} {kind}" + f", stride {stride}" * (stride > 1))
        elif isinstance(layer, nn.Upsample):
            found.append(f"×{layer.scale_factor:g} {layer.mode}")
        elif isinstance(layer, nn.BatchNorm2d):
            found.append("BatchNorm")
        elif isinstance(layer, nn.LeakyReLU):
            found.append(f"LeakyReLU {layer.negative_slope}")
        elif isinstance(layer, nn.ReLU):
            found.append("ReLU")
    return found


@pytest.mark.parametrize("figure", NETWORKS)
def test_a_drawing_names_the_shapes_that_the_network_has(figure):
    drawn = {element.get("id"): words(element) for element in elements(figure)
             if re.fullmatch(r"\d+ × \d+ × \d+", words(element))}
    built = shapes(networks(figure, 3), 3)
    built |= {f"{name}-lab": shape for name, shape in shapes(networks(figure, 2), 2).items()}
    assert drawn == {name: built[name] for name in drawn}
    if figure != "discriminators.svg":
        assert drawn.keys() >= dict(networks(figure, 3)[""].named_children()).keys()


@pytest.mark.parametrize("figure", NETWORKS)
def test_a_drawing_names_the_layers_that_the_network_has(figure):
    built, drawn = units(networks(figure, 3)), []
    ids = {element.get("id") for element in elements(figure)}
    for element in elements(figure):
        for unit in element.get("data-layers", "").split():  # or a run of them, "a+b+c"
            names = unit.split("+")
            found = sum((layers(built[name]) for name in names), [])
            times = int(element.get("data-times", 1))
            assert found == times * (found[: len(found) // times])
            assert ", ".join(found[: len(found) // times]) == words(element), unit
            assert names[-1] in ids
            drawn += names
    leaves = [name for name, unit in built.items() if layers(unit) and not list(unit.children())]
    left_out = [name for name in leaves if not f"{name}.".startswith(tuple(f"{d}." for d in drawn))]
    assert not left_out


def test_the_discriminators_drawing_names_their_receptive_fields():
    sees = {element.get("id"): words(element) for element in elements("discriminators.svg")}
    for head, network in networks("discriminators.svg", 3).items():
        side = 1
        for layer in reversed([unit for unit in network.modules() if isinstance(unit, nn.Conv2d)]):
            side = (side - 1) * layer.stride[0] + layer.kernel_size[0]
        assert sees[f"{head}-sees"] == f"{min(side, 32)} × {min(side, 32)}"


# ----------------------------------------------------------------------------------- the training


def drawn_training(figure):
    """{stage: {network: "trains" or "frozen"}} of a drawing, from ids such as critic-generator."""
    stages = {}
    for element in elements(figure):
        if words(element) in ("trains", "frozen") and element.get("id"):
            stage, network = element.get("id").split("-")
            stages.setdefault(stage, {})[network] = words(element)
    return stages


@pytest.mark.parametrize("figure, script", TRAINING.items())
def test_a_drawing_of_training_names_flags_and_numbers_that_exist(figure, script):
    text = words(elements(figure)[0])
    flags = script.build_parser()._option_string_actions
    assert set(re.findall(r"--[\w-]+", text)) <= flags.keys()
    by_id = {element.get("id"): words(element) for element in elements(figure)}
    if "real-label" in by_id:
        assert float(by_id["real-label"]) == script.REAL_LABEL


def test_the_gan_figure_shows_which_network_each_update_trains(tiny):
    updated = []

    def note(optimizer, args, kwargs):  # G sees one channel, D four
        first = optimizer.param_groups[0]["params"][0]
        updated.append({1: "generator", 4: "discriminator"}[first.shape[1]])

    hook = register_optimizer_step_pre_hook(note)
    tiny(train_gan.main)
    hook.remove()
    drawn = drawn_training("train_gan.svg").values()
    assert [{n: "trains" if n == name else "frozen" for n in update}
            for name, update in zip(updated, drawn)] == list(drawn)


def test_the_nogan_figure_shows_what_each_stage_trains_and_what_is_frozen(tiny, monkeypatch):
    saved, save = [], models.save_checkpoint

    def save_and_read(path, *args, **states):
        save(path, *args, **states)
        saved.append(models.load_checkpoint(path))

    monkeypatch.setattr(models, "save_checkpoint", save_and_read)
    tiny(train_nogan.main)
    drawn = drawn_training("train_nogan.svg")
    assert list(drawn) == train_nogan.STAGES and len(saved) == 1 + len(drawn)
    for (stage, shown), before, after in zip(drawn.items(), saved, saved[1:]):
        changed = {name for name in ("generator", "discriminator", "feature_network")
                   if any(not torch.equal(value, after[name][key])
                          for key, value in before[name].items())}
        assert changed == {name for name, status in shown.items() if status == "trains"}, stage
