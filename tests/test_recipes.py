"""The 26 experiments beside MMSegmentation's own config files, which its wheel carries.

Skipped unless MMSegmentation can be imported (`benchmarks/mmseg_reference.py` says how). Theirs are
built by their registries, ours as the command line builds them; what is compared are the objects
that come out: parameter groups, all learning rates, data settings, and one step's loss and
gradients.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mmseg_reference as reference
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from seglab.models.mmseg import encoder_to_mmseg, to_mmseg

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = [
    f"{folder}/{path.stem}"
    for folder in ("ade20k", "voc_aug", "cityscapes")
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
    if not path.stem.startswith(("eseg_", "rsp_"))  # other papers: MMSegmentation has no recipe
]
pytestmark = [
    pytest.mark.skipif(not reference.is_there(), reason="MMSegmentation is not importable"),
    pytest.mark.filterwarnings("ignore"),
]
FAST = ("ade20k/upernet_swin_t", "cityscapes/deeplabv3plus_r101")
NARROW = 32


@pytest.fixture(scope="session")
def registry() -> Any:
    """MMSegmentation's registry of modules; its optimizers, schedules and transforms as well."""
    return open_registry()


def open_registry() -> Any:
    build = reference.builder()
    import mmseg.datasets
    import mmseg.engine  # noqa: F401  # registers ConvNeXt's optimizer constructor
    from mmengine.registry import init_default_scope

    init_default_scope("mmseg")  # as its own scripts do: names in configs have no prefix
    return build


@dataclass(frozen=True)
class Pair:
    """An experiment built twice, its weights left as memory was: they are not looked at."""

    name: str
    path: str  # of their config
    config: Any
    theirs: nn.Module
    ours: Any
    configured: dict[str, Any]  # our optimizer and schedule


def build_pair(name: str, registry: Any) -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_", "trunc_normal_"):
            patch.setattr(nn.init, kind, lambda tensor, *args, **kwargs: tensor)
        theirs, config = build_theirs(name, registry)
        ours = build_ours(name)
    path, _ = reference.recipe(*name.split("/"))
    return Pair(name, path, config, theirs, ours, ours.model.configure_optimizers())


def with_slow_ones(names: list[str]) -> list[Any]:
    return [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(scope="module", params=with_slow_ones(EXPERIMENTS))
def pair(request: pytest.FixtureRequest, registry: Any) -> Pair:
    """Each experiment in turn; building takes seconds."""
    return build_pair(request.param, registry)


def our_config(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return content


def build_ours(name: str, *more: str) -> Any:
    from seglab.cli import build_experiment

    arguments = [
        *("--config", str(CONFIGS / f"{name}.yaml"), "--trainer.accelerator", "cpu"),
        *("--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.logger", "false"),
        *("--trainer.precision", "32-true"),
        *("--model.network.init_args.encoder.init_args.pretrained", "false"),
    ]
    experiment = build_experiment([*arguments, *more])
    experiment.model.trainer = experiment.trainer
    return experiment


def build_theirs(name: str, registry: Any, **heads: Any) -> tuple[Any, Any]:
    """Their network, both heads changed by `heads`, and the whole config."""
    _, config = reference.recipe(*name.split("/"))
    model = reference.on_one_process(config.model)
    for head in (model.decode_head, model.auxiliary_head):
        head.update(heads)
    return registry(model), config


# --- parameter groups ----------------------------------------------------------------------------


def our_settings(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """(rate, decay) of every parameter by MMSegmentation's name, carried there by the exporter."""
    of = {
        id(p): (group["initial_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    columns = []
    for place in (0, 1):
        marked = {
            name: torch.tensor(of[id(p)][place], dtype=torch.float64).expand(p.shape)
            for name, p in network.named_parameters()
        }
        inside = {n.removeprefix("encoder."): v for n, v in marked.items() if n[:8] == "encoder."}
        renamed = {
            f"backbone.{n}": v for n, v in encoder_to_mmseg(network.encoder, inside).items()
        } | {n: v for n, v in marked.items() if n[:8] != "encoder."}
        columns.append({name: one_value(v) for name, v in renamed.items() if "_index" not in name})
    rates, decays = columns
    return {name: (rates[name], decays[name]) for name in rates}


def one_value(filled: Tensor) -> float:
    low, high = filled.aminmax()
    assert low == high  # a tensor joined of several of ours
    return float(low)


def their_optimizer(network: nn.Module, config: Any) -> torch.optim.Optimizer:
    from mmengine.optim import build_optim_wrapper

    settings = config.optim_wrapper.copy()
    settings["type"] = "OptimWrapper"  # theirs for half precision wants a GPU
    settings.pop("loss_scale", None)
    optimizer: torch.optim.Optimizer = build_optim_wrapper(network, settings).optimizer
    return optimizer


def test_every_parameter_has_their_rate_and_decay(pair: Pair) -> None:
    optimizer = their_optimizer(pair.theirs, pair.config)
    expected_of = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    expected = {name: expected_of[id(p)] for name, p in pair.theirs.named_parameters()}
    configured = pair.configured
    found = our_settings(pair.ours.model.network, configured["optimizer"])
    assert found.keys() == expected.keys()
    for name, (rate, decay) in expected.items():
        assert found[name] == (pytest.approx(rate, rel=1e-12), decay), name
    known = ("betas", "eps", "momentum", "dampening", "nesterov", "amsgrad")
    defaults = optimizer.defaults
    options = {key: configured["optimizer"].defaults[key] for key in known if key in defaults}
    assert type(configured["optimizer"]) is type(optimizer)
    assert options == {key: defaults[key] for key in options}


# --- learning rates ------------------------------------------------------------------------------


@cache
def their_rates(schedulers: str, base: float, n_steps: int) -> list[float]:
    """Rate of every iteration, as their schedulers go through them one by one."""
    from mmengine.registry import PARAM_SCHEDULERS

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    steppers = [
        PARAM_SCHEDULERS.build(settings, default_args={"optimizer": optimizer})
        for settings in yaml.safe_load(schedulers)
    ]
    rates = []
    for _ in range(n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        for stepper in steppers:
            stepper.step()
    return rates


def test_every_iteration_has_their_learning_rates(pair: Pair) -> None:
    config = pair.config
    n_steps, schedulers = (
        config.train_cfg.max_iters,
        yaml.safe_dump([dict(settings) for settings in config.param_scheduler]),
    )
    configured = pair.configured
    scheduler = configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    assert scheduler.total_steps == n_steps == our_config(pair.name)["trainer"]["max_steps"]
    base = config.optim_wrapper.optimizer.lr
    expected = np.array(their_rates(schedulers, base, n_steps))
    found = []
    for scheduler.last_epoch in range(n_steps):
        found.append(scheduler.get_lr())
    # Groups of another base rate keep their ratio to it, which ends at 0 where there are several.
    for rates, base_of_group in zip(np.transpose(found), scheduler.base_lrs, strict=True):
        assert base_of_group == base or config.param_scheduler[-1].eta_min == 0
        np.testing.assert_allclose(
            rates, expected * (base_of_group / base), rtol=1e-7, atol=1e-9 * base
        )


# --- data and run --------------------------------------------------------------------------------


def steps_of(pipeline: Any) -> dict[str, Any]:
    return {step.type: step for step in pipeline}


def their_pipelines(config: Any) -> list[dict[str, Any]]:
    """Of all training sets: VOC's is made of two."""
    dataset = config.train_dataloader.dataset
    return [steps_of(part.pipeline) for part in dataset.get("datasets", [dataset])]


def test_training_images_are_made_their_way(pair: Pair) -> None:
    from mmcv.transforms import Pad
    from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop

    config = pair.config
    resize, flip, colour, pad = pair.ours.datamodule.default_transforms()
    for steps in their_pipelines(config):
        order = [name for name in steps if name not in ("LoadAnnotations", "PackSegInputs", "Pad")]
        assert order == [
            *("LoadImageFromFile", "RandomResize", "RandomCrop", "RandomFlip"),
            "PhotoMetricDistortion",
        ]
        theirs = steps["RandomResize"]
        assert theirs.keep_ratio
        assert (resize.scale, resize.ratio) == (theirs.scale, theirs.ratio_range)
        crop = RandomCrop(**{k: v for k, v in steps["RandomCrop"].items() if k != "type"})
        size = resize.height, resize.width
        assert (size, resize.cat_max_ratio) == (crop.crop_size, crop.cat_max_ratio)
        assert crop.ignore_index == 255
        assert (type(flip).__name__, flip.p) == ("HorizontalFlip", steps["RandomFlip"].prob)
        assert steps["RandomFlip"].get("direction", "horizontal") == "horizontal"
        distortion = PhotoMetricDistortion(
            **{k: v for k, v in steps["PhotoMetricDistortion"].items() if k != "type"}
        )
        assert (colour.brightness, colour.hue) == (
            distortion.brightness_delta,
            distortion.hue_delta,
        )
        assert colour.contrast == (distortion.contrast_lower, distortion.contrast_upper)
        assert colour.saturation == (distortion.saturation_lower, distortion.saturation_upper)
        assert (pad.height, pad.width, pad.fill_mask) == (*crop.crop_size, 255)
        assert tuple(config.model.data_preprocessor.size) == crop.crop_size
        if "Pad" in steps:  # raw pixels
            filled = Pad(**{k: v for k, v in steps["Pad"].items() if k != "type"}).pad_val
            assert (pad.fill, pad.fill_mask) == ((filled["img"],) * 3, filled["seg"])
        else:  # normalized ones
            preprocessor = config.model.data_preprocessor
            assert (preprocessor.pad_val, preprocessor.seg_pad_val) == (0, 255)
            assert np.abs(np.subtract(pad.fill, preprocessor.mean)).max() <= 0.5


def raw_labels(data: str) -> np.ndarray:
    """Every value that the files of a data set hold; Cityscapes' are train ids."""
    values = {
        "ade20k": [*range(151)],
        "voc_aug": [*range(21), 255],
        "cityscapes": [*range(19), 255],
    }
    return np.array([values[data]], dtype=np.uint8)


def test_labels_are_read_their_way(pair: Pair, tmp_path: Path) -> None:
    import cv2
    from mmseg.datasets.transforms import LoadAnnotations

    data = pair.name.split("/")[0]
    config = pair.config
    raw, path = raw_labels(data), tmp_path / "a_gtFine_labelTrainIds.png"
    cv2.imwrite(str(path), raw)
    found = pair.ours.datamodule.labels(raw, path)
    evaluated = steps_of(config.val_dataloader.dataset.pipeline)["LoadAnnotations"]
    for settings in [*(steps["LoadAnnotations"] for steps in their_pipelines(config)), evaluated]:
        load = LoadAnnotations(**{k: v for k, v in settings.items() if k != "type"})
        sample = {"seg_map_path": str(path), "seg_fields": [], "reduce_zero_label": None}
        sample["reduce_zero_label"] = settings.get("reduce_zero_label", False)
        assert (load(sample)["gt_seg_map"] == found).all()


def test_batches_and_evaluation_are_theirs(pair: Pair) -> None:
    config = pair.config
    ours, text = pair.ours, our_config(pair.name)
    data, task = ours.datamodule, ours.model
    devices, per_device = (int(n) for n in re.search(r"_(\d)xb(\d)-", pair.path).groups())
    assert (text["trainer"]["devices"], data.batch_size) == (devices, per_device)
    assert config.train_dataloader.batch_size == per_device
    assert task.total_batch == devices * per_device
    # Ours are a matter of speed alone: what a sample looks like depends on seed, epoch and index.
    assert data.num_workers >= config.train_dataloader.num_workers
    assert data.eval_batch_size == config.val_dataloader.batch_size == 1
    resize = steps_of(config.val_dataloader.dataset.pipeline)["Resize"]
    assert resize.keep_ratio
    if data.eval_scale is None:  # Cityscapes' images have that size
        assert (pair.name[:10], resize.scale) == ("cityscapes", (2048, 1024))
    else:
        assert data.eval_scale == resize.scale
    test = config.model.test_cfg
    assert task.inference.crop_size == (test.crop_size if test.mode == "slide" else None)
    assert task.inference.stride == (test.stride if test.mode == "slide" else None)
    is_half = config.optim_wrapper.type == "AmpOptimWrapper"
    assert text["trainer"].get("precision") == ("16-mixed" if is_half else None)
    assert task.eval_precision == ("32" if is_half else "same")  # their loops evaluate in float32
    assert config.optim_wrapper.get("clip_grad") is text["trainer"].get("gradient_clip_val") is None
    assert text["trainer"]["val_check_interval"] == config.train_cfg.val_interval
    assert text["trainer"]["benchmark"] is config.env_cfg.cudnn_benchmark
    assert config.default_hooks.checkpoint.interval == config.train_cfg.val_interval


# --- one step ------------------------------------------------------------------------------------


def rates_of_drop_path(network: nn.Module) -> list[float]:
    """Of all blocks in their order; Twins' are two in a row in one place, which are told as one."""
    kinds = (m for m in network.modules() if type(m).__name__ == "DropPath")
    return [float(m.drop_prob) for m in kinds if m.drop_prob]


def test_dropout_is_theirs(pair: Pair) -> None:
    theirs, config, network = pair.theirs, pair.config, pair.ours.model.network
    for head in ("decode_head", "auxiliary_head"):
        ratio = getattr(config.model, head).dropout_ratio
        assert getattr(network, head).dropout.p == getattr(theirs, head).dropout.p == ratio
        assert type(getattr(theirs, head).dropout) is nn.Dropout2d
    expected, found = rates_of_drop_path(theirs.backbone), rates_of_drop_path(network.encoder)
    assert max(expected, default=0.0) == pytest.approx(
        config.model.backbone.get("drop_path_rate", 0.0)
    )
    if "twins" not in pair.name:  # theirs applies it up to three times a block: see test_families
        np.testing.assert_allclose(sorted(found), sorted(expected), atol=1e-7)


def one_step(experiment: str, registry: Any, channels: int | None) -> dict[str, float]:
    """Largest relative errors of losses and gradients of a batch, in double precision."""
    heads = {"dropout_ratio": 0.0} | ({"channels": channels} if channels else {})
    theirs, _ = build_theirs(experiment, registry, **heads)
    reference.scramble(theirs)
    init = "--model.network.init_args"
    more = [f"{init}.{head}.init_args.dropout=0.0" for head in ("head", "auxiliary")]
    if channels:
        more += [f"{init}.{h}.init_args.channels={channels}" for h in ("head", "auxiliary")]
    if "r101" not in experiment:
        more.append(f"{init}.encoder.init_args.drop_path=0.0")
    for module in theirs.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    task = build_ours(experiment, *more).model
    network = task.network
    network.load_state_dict(network.translate_state(theirs.state_dict()))
    theirs.load_state_dict(to_mmseg(network), strict=True)
    network.double(), theirs.double(), theirs.train(), task.train()
    return compare_step(task, theirs)


def compare_step(task: Any, theirs: Any) -> dict[str, float]:
    image = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    mask = torch.randint(0, task.num_classes, (2, 64, 96), dtype=torch.uint8)
    mask[:, :9] = 255
    logged: dict[str, Tensor] = {}
    task.log_dict = lambda values, **_: logged.update(values)
    loss = task.training_step({"image": image, "mask": mask, "name": ["a", "b"]}, 0)
    samples = reference.samples(image, mask.long())
    preprocessor = theirs.data_preprocessor
    preprocessor.size = (64, 96)
    prepared = preprocessor(samples, training=True)
    normalized = task.network.normalize(image)
    losses = theirs.loss(normalized, prepared["data_samples"])
    expected = losses["decode.loss_ce"] + losses["aux.loss_ce"]
    loss.backward(), expected.backward()
    return {
        "input": relative(prepared["inputs"].double(), normalized),
        "decode": relative(logged["train/loss_decode"], losses["decode.loss_ce"]),
        "aux": relative(task.auxiliary_weight * logged["train/loss_aux"], losses["aux.loss_ce"]),
        "loss": relative(loss, expected),
        "gradients": max(gradient_errors(task.network, theirs)),
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def gradient_errors(network: Any, theirs: nn.Module) -> Iterator[float]:
    """Of every tensor, relative to its norm or to 1e-6 of the whole gradient's."""
    own = {name: p.grad for name, p in network.named_parameters()}
    inside = {n.removeprefix("encoder."): g for n, g in own.items() if n[:8] == "encoder."}
    found = {n: g for n, g in own.items() if n[:8] != "encoder."}
    found |= {f"backbone.{n}": g for n, g in encoder_to_mmseg(network.encoder, inside).items()}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() <= found.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        yield float((found[name] - gradient).norm() / max(gradient.norm(), 1e-6 * whole))


@pytest.mark.parametrize("name", with_slow_ones(EXPERIMENTS))
def test_one_step_has_their_loss_and_gradients(name: str, registry: Any) -> None:
    torch.manual_seed(0)
    errors = one_step(name, registry, channels=NARROW)
    print(name, {key: f"{error:.1e}" for key, error in errors.items()})
    assert errors["input"] < 1e-6  # theirs is float32
    assert max(errors["decode"], errors["aux"], errors["loss"]) < 1e-9
    assert errors["gradients"] < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ade20k/upernet_swin_t", "ade20k/deeplabv3plus_r101"])
def test_one_step_of_the_full_heads_is_theirs(name: str, registry: Any) -> None:
    torch.manual_seed(0)
    errors = one_step(name, registry, channels=None)
    print(name, {key: f"{error:.1e}" for key, error in errors.items()})
    assert max(errors["decode"], errors["aux"], errors["loss"]) < 1e-9
    assert errors["gradients"] < 1e-7
