"""The 26 experiments of the paper: what their configs say, and what the program makes of them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from seglab.optim import WarmupPolyLR

ROOT = Path(__file__).parents[1] / "configs"
ADE, VOC, CITY = "ade20k", "voc_aug", "cityscapes"

# encoder: drop path, learning rate, weight decay, parameters of the whole network for ADE20K
UPERNET = {
    "swin_t": (0.3, 6e-5, 0.01, 59_941_862),
    "swin_s": (0.3, 6e-5, 0.01, 81_259_766),
    "swin_b": (0.3, 6e-5, 0.01, 121_279_716),
    "twins_svt_s": (0.2, 6e-5, 0.01, 53_856_300),
    "twins_svt_b": (0.2, 6e-5, 0.01, 87_724_460),
    "twins_svt_l": (0.3, 6e-5, 0.01, 132_782_892),
    "convnext_t": (0.4, 1e-4, 0.05, 60_242_636),
    "convnext_s": (0.3, 1e-4, 0.05, 81_877_196),
    "convnext_b": (0.4, 1e-4, 0.05, 122_102_956),
}
# Paper without, paper with equalization, MMSegmentation (None: it has no such recipe)
MIOU = {
    (ADE, "swin_t"): ("43.384", "43.576", "44.41"),
    (ADE, "swin_s"): ("47.298", "47.486", "47.72"),
    (ADE, "swin_b"): ("47.490", "47.648", "47.99"),
    (ADE, "twins_svt_s"): ("44.914", "45.018", "46.08"),
    (ADE, "twins_svt_b"): ("47.224", "47.500", "48.04"),
    (ADE, "twins_svt_l"): ("48.648", "48.894", "49.65"),
    (ADE, "convnext_t"): ("45.024", "45.300", "46.11"),
    (ADE, "convnext_s"): ("47.736", "47.866", "48.56"),
    (ADE, "convnext_b"): ("48.376", "48.684", "48.71"),
    (VOC, "swin_t"): ("78.750", "78.996", None),
    (VOC, "swin_s"): ("81.940", "82.138", None),
    (VOC, "swin_b"): ("82.200", "82.378", None),
    (VOC, "twins_svt_s"): ("80.448", "80.732", None),
    (VOC, "twins_svt_b"): ("82.048", "82.524", None),
    (VOC, "twins_svt_l"): ("82.168", "82.404", None),
    (VOC, "convnext_t"): ("80.668", "80.932", None),
    (VOC, "convnext_s"): ("82.472", "82.650", None),
    (VOC, "convnext_b"): ("82.934", "83.038", None),
    (CITY, "fcn_r101"): ("76.578", "76.972", "75.13"),
    (CITY, "pspnet_r101"): ("79.394", "79.858", "79.76"),
    (CITY, "deeplabv3_r101"): ("79.312", "79.720", "80.20"),
    (CITY, "deeplabv3plus_r101"): ("80.448", "80.592", "80.97"),
    (ADE, "fcn_r101"): ("39.780", "39.958", "39.91"),
    (ADE, "pspnet_r101"): ("43.970", "44.228", "44.39"),
    (ADE, "deeplabv3_r101"): ("44.854", "45.004", "45.00"),
    (ADE, "deeplabv3plus_r101"): ("45.144", "45.486", "45.47"),
}
# Head, its parameters at K = 19, the layers that fuse, branches of each
RESNET = {
    "fcn_r101": ("FCNHead", 23_605_779, {"conv_cat.conv": 2}),
    "pspnet_r101": ("PSPHead", 23_083_539, {"bottleneck.conv": 5}),
    "deeplabv3_r101": ("ASPPHead", 42_221_075, {"bottleneck.conv": 5}),
    # Its second fusion is depthwise and normalized right after: a factor would cancel there.
    "deeplabv3plus_r101": ("SepASPPHead", 17_697_923, {"bottleneck.conv": 5}),
}
R101_AND_AUXILIARY_AT_19 = 42_519_392 + 2_364_691
PER_CLASS = 513 + 257  # of a head and the auxiliary head
CLASSES = {ADE: 150, VOC: 21, CITY: 19}
EXPERIMENTS = sorted(MIOU)
QUICK = [(ADE, "swin_t"), (ADE, "twins_svt_s"), (ADE, "convnext_t"), (CITY, "deeplabv3plus_r101")]


def path_of(data: str, name: str) -> Path:
    return ROOT / data / (f"upernet_{name}.yaml" if name in UPERNET else f"{name}.yaml")


@cache
def read(data: str, name: str) -> tuple[str, dict[str, Any]]:
    """Text and content of a config."""
    text = path_of(data, name).read_text()
    return text, yaml.safe_load(text)


@pytest.fixture(params=EXPERIMENTS, ids="/".join)
def experiment(request: pytest.FixtureRequest) -> tuple[str, str]:
    key: tuple[str, str] = request.param
    return key


def test_every_config_is_in_the_table() -> None:
    files = {path for folder in (ADE, VOC, CITY) for path in (ROOT / folder).glob("*.yaml")}
    files -= {path for path in files if path.stem.startswith(("eseg_", "rsp_"))}  # other papers
    assert files == {path_of(*key) for key in EXPERIMENTS}
    assert len(files) == 26


def test_header_states_launch_line_reference_and_seeds(experiment: tuple[str, str]) -> None:
    text, _ = read(*experiment)
    relative = path_of(*experiment).relative_to(ROOT.parent)
    assert text.startswith(f"# python train.py fit --config {relative}\n")
    without, with_equalization, mmseg = MIOU[experiment]
    assert f"{without} without equalization, {with_equalization} with" in text
    assert (f"MMSegmentation: {mmseg}." in text) if mmseg else ("MMSegmentation: " not in text)
    assert "Seeds 0, 1, 2, 3, 4" in text


def test_batches_and_validation_add_up(experiment: tuple[str, str]) -> None:
    text, config = read(*experiment)
    stated = re.search(r"total batch (\d+)", text)
    assert stated is not None
    total = config["trainer"]["devices"] * config["data"]["init_args"]["batch_size"]
    assert total == int(stated[1]) == (8 if experiment[0] == CITY else 16)
    steps = config["trainer"]["max_steps"]
    assert steps == (80_000 if experiment[0] == CITY else 160_000)
    assert steps == 10 * config["trainer"]["val_check_interval"]
    assert config["model"]["total_batch"] == total
    assert "accumulate_grad_batches" not in config["trainer"]  # follows from the total batch


def test_crops_are_those_of_the_recipe(experiment: tuple[str, str]) -> None:
    _, config = read(*experiment)
    data = config["data"]["init_args"]
    wide = experiment[0] == CITY
    assert data["crop_size"] == ([512, 1024] if wide else [512, 512])
    assert data["scale"] == ([2048, 1024] if wide else [2048, 512])


@pytest.mark.parametrize("data", [ADE, VOC])
@pytest.mark.parametrize("name", UPERNET)
def test_upernet_recipes_follow_the_table(data: str, name: str) -> None:
    drop_path, rate, decay, _ = UPERNET[name]
    model = read(data, name)[1]["model"]
    assert model["network"]["init_args"]["encoder"]["init_args"]["drop_path"] == drop_path
    optimizer = model["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (rate, decay)
    is_convnext = name.startswith("convnext")
    assert read(data, name)[1]["trainer"].get("precision") == ("16-mixed" if is_convnext else None)
    inference = {"crop_size": [512, 512], "stride": [341, 341]} if is_convnext else None
    assert model.get("inference") == inference
    assert model["scheduler"]["init_args"]["warmup_steps"] == 1500


@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=() if key in QUICK else pytest.mark.slow) for key in EXPERIMENTS],
    ids="/".join,
)
def test_experiment_is_built_as_the_recipe_says(key: tuple[str, str]) -> None:
    experiment = build(*key)
    task = experiment.model
    n_parameters = sum(p.numel() for p in task.network.parameters())
    assert n_parameters == expected_parameters(*key)
    assert task.num_classes == CLASSES[key[0]]
    check_optimizer(key[1], *configure(experiment))
    check_fusions(key[1], task.network)


@pytest.mark.slow
@pytest.mark.parametrize("key", [*QUICK, (ADE, "fcn_r101"), (ADE, "pspnet_r101"), (VOC, "swin_t")])
def test_two_steps_run_on_miniature_data(key: tuple[str, str]) -> None:
    experiment = build(*key, "--model.network.init_args.head.init_args.channels", "32")
    task, (optimizer, _) = experiment.model, configure(experiment)
    task.log = task.log_dict = lambda *args, **kwargs: None
    task.train()
    image = torch.randint(0, 256, (2, 3, 72, 80), dtype=torch.uint8)
    mask = torch.randint(0, CLASSES[key[0]], (2, 72, 80), dtype=torch.uint8)
    for _ in range(2):
        loss = task.training_step({"image": image, "mask": mask, "name": ["a", "b"]}, 0)
        optimizer.zero_grad()
        loss.backward()
        assert [n for n, p in task.network.named_parameters() if p.grad is None] == []
        optimizer.step()
        assert torch.isfinite(loss)


def build(data: str, name: str, *more: str) -> Any:
    from seglab.cli import build_experiment

    return build_experiment(
        [
            *("--config", str(path_of(data, name))),
            *("--model.network.init_args.encoder.init_args.pretrained", "false"),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
            *("--trainer.strategy", "auto", "--trainer.precision", "32-true"),
            *("--trainer.logger", "false"),
            *more,
        ]
    )


def configure(experiment: Any) -> tuple[torch.optim.Optimizer, WarmupPolyLR]:
    experiment.model.trainer = experiment.trainer
    configured = experiment.model.configure_optimizers()
    return configured["optimizer"], configured["lr_scheduler"]["scheduler"]


def expected_parameters(data: str, name: str) -> int:
    if name in UPERNET:
        return UPERNET[name][3] - PER_CLASS * (150 - CLASSES[data])
    return R101_AND_AUXILIARY_AT_19 + RESNET[name][1] + PER_CLASS * (CLASSES[data] - 19)


def check_optimizer(name: str, optimizer: torch.optim.Optimizer, scheduler: WarmupPolyLR) -> None:
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    rates = {group["initial_lr"] for group in optimizer.param_groups}
    if name in UPERNET:
        _, rate, decay, _ = UPERNET[name]
        assert (decays, max(rates)) == ({0.0, decay}, rate)
        assert len(rates) == (6 if name.startswith("convnext") else 1)
    else:
        assert (decays, rates) == ({5e-4}, {0.01})
    assert scheduler.total_steps in (80_000, 160_000)
    scheduler.last_epoch = scheduler.total_steps - 1
    assert set(scheduler.get_lr()) == {0.0 if name in UPERNET else 1e-4}


def check_fusions(name: str, network: torch.nn.Module) -> None:
    from scale_equalization import find_fusions

    image = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    found = {fusion.name: len(fusion.branches) for fusion in find_fusions(network, image)}
    fusions = (
        {"bottleneck.conv": 5, "fpn_bottleneck.conv": 4} if name in UPERNET else RESNET[name][2]
    )
    assert found == {f"decode_head.{layer}": n for layer, n in fusions.items()}
