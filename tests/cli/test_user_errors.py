"""What a user gets for a mistake: one sentence, an exit code, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from seglab.cli.user_errors import one_sentence

ROOT = Path(__file__).parents[2]
Run = Callable[..., None]


@pytest.fixture
def complaint(run: Run, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run a command line that must fail; returns exit code and stderr."""

    def complaint(*args: object) -> tuple[int, str]:
        with pytest.raises(SystemExit, match=r"\d") as caught:
            run(*args)
        lines = [line for line in capsys.readouterr().err.splitlines() if "seglab:" in line]
        assert len(lines) == 1
        assert "Traceback" not in lines[0]
        return int(caught.value.code), lines[0]

    return complaint


MISTAKES = [
    ("--model.netwrk 3", "SegmentationTask takes no 'netwrk'; did you mean 'network'?"),
    ("--modle.network 3", "did you mean 'model'?"),
    ("--confg quickstart", "did you mean 'config'?"),
    ("--trainer 3", "trainer is a section: its keys are given as --trainer.KEY VALUE"),
    ("--trainer.max_epochs two", "trainer.max_epochs: expected an integer or null, got 'two'"),
    ("--trainer.max_epoch 2", "did you mean 'max_epochs'?"),
    ("--trainer.max_steps 1e4", "trainer.max_steps: expected an integer, got '1e4'"),
    ("--data.sizee 3", "data.sizee: ScenesDataModule takes no 'sizee'; did you mean 'size'?"),
    ("--data.batch_size=many", "data.batch_size: expected an integer, got 'many'"),
    ("--data.palette [[1,2,3]]", "ScenesDataModule takes no 'palette'"),
    ("--data.seed.0 3", "data.seed is a list, give it whole"),
    ("--data SceneDataModule", "did you mean seglab.data.ScenesDataModule?"),
    ("--data seglab.data.SceneDataModule", "did you mean seglab.data.ScenesDataModule?"),
    ("--model.optimizer torch.optim.SGDD", "did you mean torch.optim.SGD?"),
    ("--model.optimizer.lrr 3", "takes no 'lrr'; did you mean 'lr'?"),
    ("--model.optimizer AdamW --model.optimizer.beta 1", "did you mean 'betas'?"),
    ("--model.scheduler.warmup_step 3", "did you mean 'warmup_steps'?"),
    ("--model.loss seglab.losses.CrossEntropy --model.loss.weigth 3", "mean 'class_weight'?"),
    ("--model.loss seglab.losses.CrossEntropi", "did you mean seglab.losses.CrossEntropy?"),
    ("--model.network.encoder.nam x", "TimmEncoder takes no 'nam'; did you mean 'name'?"),
    ("--model.network.encoder.init_args.nam x", "did you mean 'name'?"),
    ("--model.network.head.channels many", "head.channels: expected an integer, got 'many'"),
    ("--model.inference.flop true", "Inference takes no 'flop'; did you mean 'flip'?"),
    ("--scale_equalization.mode of", "expected 'fold' or 'reparametrize' or 'off', got 'of'"),
    ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr=x", "mean 'monitor'?"),
    ("--trainer.callbacks EarlyStoping", "did you mean lightning.pytorch.callbacks.EarlyStopping?"),
    ("--trainer.logger WandLogger", "did you mean lightning.pytorch.loggers.WandbLogger?"),
    ("--seed_everything abc", "seed_everything: expected an integer"),
    ("quickstart", "'quickstart' belongs to no option"),
    ("--trainer.max_epochs", "--trainer.max_epochs needs a value"),
    ("--trainer.logger.project x", "trainer.logger has no class to take 'project': name it"),
    ("--trainer.callbacks [EarlyStopping]", "EarlyStopping needs monitor"),
    ("--model.network seglab.models.SmpNetwork --model.network.arch Unet", "needs encoder"),
    ("--data FolderDataModule", "FolderDataModule needs root: --data.root"),
    ("--data.transforms [albumentations.Blurr]", "did you mean albumentations.Blur?"),
    ("--model.network.head seglab.models.heads.UPerHeads", "did you mean seglab.models.heads.UP"),
    ("--model.optimizer.init_args.lr fast", "lr in"),
    ("--model.optimizer.lr [1]", "model.optimizer.lr: expected a number, got [1]"),
    (
        "--model.optimizer AdamW --model.optimizer.betas 0.9",
        "expected a list of 2 numbers, got 0.9",
    ),
    ("--trainer.max_steps many", "trainer.max_steps: expected an integer, got 'many'"),
    ("--trainer.max_steps -3", "trainer.max_steps is -3; it must be at least -1"),
    ("--trainer.devices two", "trainer.devices: expected a number, auto, or a list"),
    ("--trainer.strategy dpp", "trainer.strategy: there is no 'dpp'; did you mean 'ddp'?"),
    ("--trainer.accelerator gpuu", "there is no 'gpuu'; did you mean 'gpu'?"),
    ("--trainer.precision bf16-mixd", "did you mean 'bf16-mixed'?"),
    ("--trainer.val_check_interval often", "expected a number or DD:HH:MM:SS, got 'often'"),
    ("--trainer.callbacks foo.Bar", "there is no class foo.Bar: foo cannot be imported"),
    ("--data.batch_size -1", "data.batch_size is -1; it must be at least 1"),
    ("--data.eval_batch_size 0", "data.eval_batch_size is 0; it must be at least 1"),
    ("--data.num_workers -1", "data.num_workers is -1; it must be at least 0"),
    ("--data.crop_size 3", "data.crop_size: expected a list of 2 integers or null, got 3"),
    ("--data.crop_size [3,a]", "expected a list of 2 integers or null, got [3, 'a']"),
    ("--data.crop_size [0,64]", "data.crop_size is [0, 64]; it must be at least 1"),
    ("--data.value_range [0]", "expected a list of 2 numbers or null, got [0]"),
    ("--data.class_groups [a]", "expected a table {texts: lists} or null, got ['a']"),
    ("--data.limit 3", "data.limit is 3; it must be above 0 and at most 1"),
    ("--data.drop_alpha maybe", "data.drop_alpha: expected true or false, got 'maybe'"),
    ("--model.network foo.Bar", "there is no class foo.Bar: foo cannot be imported"),
    ("--model.network seglab.modles.Segmenter", "did you mean seglab.models?"),
    ("--model.network seglab.models.hedas.UPerHead", "did you mean seglab.models.heads?"),
    ("--model.network Segmentor", "did you mean seglab.models.Segmenter?"),
    ("--model.network.head UPerHaed", "did you mean seglab.models.heads.UPerHead?"),
    ("--model.network.head.pool_scales 3", "expected a list of integers, got 3"),
    ("--model.network.encoder.name resnet5o", "timm has no model 'resnet5o'; nearest: resnet50"),
    ("--model.optimizer foo", "torch.optim has no foo. Classes of other modules are given by"),
    ("--model.scheduler WarmupPolyLRR", "did you mean seglab.optim.WarmupPolyLR?"),
    ("--model.loss Dice", "seglab.losses has no Dice"),
    ("--model.weights none.ckpt", "model.weights: checkpoint none.ckpt does not exist"),
    ("--model.total_batch 0", "model.total_batch is 0; it must be at least 1"),
    ("--scale_equalization.max_batches 0", "scale_equalization.max_batches is 0; it must be at"),
    ("--scale_equalization.exclude 3", "expected a list of texts, got 3"),
    ("--predictions.opacity 3", "predictions.opacity is 3; it must be at least 0 and at most 1"),
    ("--without scale_equalization", "did you mean '[scale_equalization]'?"),
    ("--without [sped]", "did you mean '[speed]'?"),
    ("--seed_everything -3", "seed_everything is -3; it must be at least 0"),
    ("--ckpt_path none.ckpt", "ckpt_path: none.ckpt does not exist: check the path"),
    ("--model.parameter_rules seglab.optim.NoDecay --model.parameter_rules.pattern x", "patterns"),
]
"""What a user types after `fit --config tiny.yaml`, and what is answered."""


@pytest.mark.parametrize(("typed", "said"), MISTAKES)
def test_wrong_argument_is_named(complaint: Callable, tiny: Path, typed: str, said: str) -> None:
    code, sentence = complaint("fit", "--config", tiny, *typed.split())
    assert code == (1 if "does not exist" in said else 2)
    assert said in sentence
    assert len(sentence) < 300


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modl": {"weights": None}}, "modl"),
        ({"trainer": {"max_epoch": 3}}, "max_epoch"),
        ({"model": {"losss": None}}, "losss"),
        ({"data": {"init_args": {"batchsize": 3}}}, "did you mean 'batch_size'?"),
    ],
)
def test_wrong_key_in_a_config_is_named(
    complaint: Callable, tiny: Path, tmp_path: Path, change: dict, said: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(change))
    code, sentence = complaint("fit", "--config", tiny, "--config", path)
    assert code == 2
    assert said in sentence
    assert str(path) in sentence


TOLD_WITHOUT_TORCH = [
    ("fit", "nothing says what the data is: give a config with --config FILE"),
    ("doctor", "nothing says what the data is"),
    ("validate", "nothing says what the data is"),
    ("fit --config none.yaml", "config none.yaml does not exist, here or among those shipped"),
    ("fit --config quikstart", "did you mean quickstart?"),
    ("browse --config quickstart --data.siz 3", "did you mean 'size'?"),
    ("fot", "no command 'fot'; did you mean 'fit'?"),
    ("fit --resume none", "--resume: there is no folder none"),
    ("fit --config camvid/upernet_resnet18 --data.root none", "there is no folder none in "),
    ("doctor --config ade20k/upernet_swin_t --data.root none", "seglab prepare` with the same con"),
    ("fit --config camvid/upernet_resnet18 --data.class_names car", "expected a list of texts"),
    ("fit --config camvid/upernet_resnet18 --data.value_map 3", "a table {integers: integers}"),
    ("fit --config camvid/upernet_resnet18 --data.palette red", "expected a list of lists or null"),
    ("validate --ckpt_path none.ckpt", "ckpt_path: none.ckpt does not exist"),
    ("predict --ckpt_path none.ckpt --input a.png", "ckpt_path: none.ckpt does not exist"),
    ("export --ckpt_path none.ckpt", "ckpt_path: none.ckpt does not exist"),
    ("export --ckpt_path none.ckpt --format onxn", "invalid choice: 'onxn'"),
    ("init", "the following arguments are required: folder; `seglab init --help` shows"),
    ("init here --outptu x", "did you mean --output?"),
    ("doctor --config quickstart --num_worker 3", "did you mean 'num_workers'?"),
    ("doctor --config quickstart --num_workers 0", "--num_workers is 0; it must be at least 1"),
    ("browse --config quickstart --output x.foo", "no name of a picture: end it in .png"),
    ("equalize --config quickstart --outptu x", "did you mean 'output'?"),
    ("summary --config quickstart --size big", "--size 'big' is not HEIGHT,WIDTH"),
    ("prepare cocoo x.json", "no format 'cocoo'; there are coco and labelme"),
    *((f"fit --config quickstart {typed}", said) for typed, said in MISTAKES),
]

TELL = """
import contextlib, io, json, sys, time
from seglab.cli import main
for line in json.loads(sys.argv[1]):
    start, err = time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main(line.split())
    loaded = "torch" in sys.modules
    print(json.dumps([err.getvalue(), time.process_time() - start, loaded]))
"""


def test_mistakes_are_told_before_torch_is_loaded() -> None:
    lines = json.dumps([line for line, _ in TOLD_WITHOUT_TORCH])
    done = subprocess.run(
        [sys.executable, "-c", TELL, lines], capture_output=True, text=True, cwd=ROOT
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    # CPU time, which is the same on a busy machine; one alone took 7 to 9 seconds
    assert sum(seconds for _, seconds, _ in found) < 10
    for (line, said), (err, seconds, has_loaded) in zip(TOLD_WITHOUT_TORCH, found, strict=True):
        assert said in err, line
        assert err.count("\n") == 1, line
        assert not has_loaded, line
        assert seconds < 2, line


@pytest.mark.parametrize(
    "typed",
    [
        "--trainer.devices auto --trainer.precision bf16-mixed --trainer.limit_train_batches 0.5",
        "--trainer.max_time 00:01:00:00 --trainer.deterministic warn --trainer.logger false",
        "--model.optimizer.lr 1e-3 --model.inference.scales [1.0,2.0] --without [speed]",
        '--trainer.val_check_interval {"minutes":3} --data.crop_size null --data.scale [9,9]',
        "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/loss",
        "--model.network.head seglab.models.heads.FCNHead --model.network.head.in_index 1",
        "--model.loss seglab.losses.CrossEntropy --model.loss.class_weight [1,1,1,1,1,1,1,1]",
        "--model.optimizer AdamW --model.optimizer.betas [0.9,0.99] --data.seed=null",
        "--data.init_args.batch_size 3 --model.scheduler null --seed_everything true",
        "--scale_equalization.mode off --speed.compile true --speed.channels_last false",
        "--trainer.profiler simple --trainer.plugins null --trainer.devices 0,1",
        '--trainer.devices [0,1] --trainer.max_time {"days":1} --trainer.strategy ddp_spawn',
        "--model.scheduler StepLR --model.scheduler.step_size 3 --trainer.max_steps -1",
        "--model.scheduler torch.optim.lr_scheduler.StepLR",
        '--data.class_groups {"thing":["lake","oasis"]} --data.limit 0.5 --data.limit names.txt',
        "--data.predict_folder some.folder --data.transforms [albumentations.Blur]",
        "--model.network.encoder.checkpoint_path some.ckpt --model.network.encoder.trainable 2",
        "--model.network.encoder.name hf-hub:timm/any --predictions.folder some.where",
        "--model.loss DiceLoss --model.loss.mode multiclass --scale_equalization.include [a.*]",
        "--resume here --model.scheduler.total_steps 4 --model.network.head.channels 8",
        "--model.loss CrossEntropyLoss --trainer.limit_train_batches 3",
    ],
)
def test_right_arguments_are_let_through(tiny: Path, typed: str) -> None:
    from seglab.cli.check import check_arguments

    check_arguments(["--config", str(tiny), *typed.split()], is_whole=True)


def test_all_shipped_configs_are_let_through() -> None:
    from seglab.cli.check import check_arguments
    from seglab.cli.shipped_configs import find_config, shipped_configs

    for name in shipped_configs():
        check_arguments(["--config", str(find_config(name))], is_whole=True)


@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger", "CometLogger"])
def test_missing_package_is_named(
    complaint: Callable, tiny: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seglab.cli import check

    monkeypatch.setattr(check, "find_spec", lambda package: None)
    code, sentence = complaint("fit", "--config", tiny, "--trainer.logger", name)
    assert code == 2
    assert f"is not installed, and {name} needs it: pip install " in sentence


def test_config_that_is_no_yaml_is_named(complaint: Callable, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    for content, said in (("model: [1, 2", "is no YAML"), ("fit", "must hold sections")):
        path.write_text(content)
        sentence = complaint("fit", "--config", path)[1]
        assert "broken.yaml" in sentence
        assert said in sentence


def test_missing_files_are_named(complaint: Callable, tiny: Path) -> None:
    assert "none.yaml" in complaint("fit", "--config", "none.yaml")[1]
    code, sentence = complaint("fit", "--config", tiny, "--ckpt_path", "none.ckpt")
    assert (code, "ckpt_path: none.ckpt does not exist" in sentence) == (1, True)
    assert "none.ckpt does not exist" in complaint("validate", "--ckpt_path", "none.ckpt")[1]


def folder_data(path: Path, **options: object) -> Path:
    """A config with a `data` section only."""
    data = {"class_path": "seglab.data.FolderDataModule", "init_args": options}
    path.write_text(yaml.safe_dump({"data": data}))
    return path


def test_missing_data_folder_is_named(complaint: Callable, tiny: Path, tmp_path: Path) -> None:
    options = {"root": f"{tmp_path}/none", "class_names": ["a", "b"]}
    config = folder_data(tmp_path / "folder.yaml", **options)
    args = ["--config", tiny, "--config", config, "--trainer.default_root_dir", tmp_path]
    code, sentence = complaint("fit", *args)
    assert code == 1
    assert f"{tmp_path}/none" in sentence


def test_checkpoint_of_other_classes_is_explained(
    complaint: Callable, fitted: Path, tiny: Path, tmp_path: Path
) -> None:
    options = {"root": str(tmp_path), "class_names": ["a", "b"], "predict_folder": str(tmp_path)}
    config = folder_data(tmp_path / "two.yaml", **options)
    (tmp_path / "image.png").write_bytes((fitted / "pictures/step_0000002.png").read_bytes())
    args = ["--config", config, "--trainer.default_root_dir", tmp_path]
    code, sentence = complaint("predict", *args, "--ckpt_path", fitted / "checkpoints/last.ckpt")
    assert code == 1
    assert "was made for 8 classes, but the data has 2" in sentence


def test_checkpoint_without_config_says_what_to_give(complaint: Callable, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    _, sentence = complaint("validate", "--ckpt_path", tmp_path / "bare.ckpt")
    assert "holds no config: give the model and data section with --config" in sentence


def test_unknown_command_suggests_the_nearest(complaint: Callable) -> None:
    assert complaint("fot") == (2, "seglab: no command 'fot'; did you mean 'fit'?")


def test_traceback_is_there_for_those_who_ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        run("validate", "--ckpt_path", "none.ckpt", "--traceback")
    monkeypatch.setenv("SEGLAB_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        run("validate", "--ckpt_path", "none.ckpt")


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="not from here"), one_sentence():
        raise ValueError("not from here")
    with pytest.raises(AttributeError, match="nothing"), one_sentence():
        _ = None.nothing  # type: ignore[attr-defined]


def test_help_and_version_load_no_torch() -> None:
    code = (
        "import sys; from seglab.cli import main; main([sys.argv[1]]); print('torch' in"
        " sys.modules)"
    )
    for option, said in (("--help", "predict"), ("--version", "seglab 0")):
        done = subprocess.run(
            [sys.executable, "-c", code, option], capture_output=True, text=True, cwd=ROOT
        )
        assert said in done.stdout
        assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--trainer.devices", "0"], "is not a valid input using cpu accelerator"),
        (["--model.optimizer.lr", "-1"], "Invalid learning rate: -1.0"),
        (["--model.network.head.dropout", "3"], "dropout probability has to be between 0 and 1"),
        (["--model.network.encoder.name", "resnet18.none"], "timm has no weights 'none'"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(
    complaint: Callable, tiny: Path, tmp_path: Path, args: list[str], said: str
) -> None:
    root = ("--trainer.default_root_dir", tmp_path / "logs")
    code, sentence = complaint("fit", "--config", tiny, *root, *args)
    assert code == 1
    assert said in sentence
    assert "Namespace" not in sentence
    assert len(sentence) < 200
    assert not (tmp_path / "logs").exists()


def test_later_config_says_what_it_overrides(
    run: Run, capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    later = tmp_path / "later.yaml"
    change = {
        "trainer": {"max_epochs": 9, "accelerator": "cpu", "max_steps": 5},
        "data": {"init_args": {"size": 64}},
    }
    later.write_text(yaml.safe_dump(change))
    with pytest.raises(SystemExit):
        run("summary", "--config", tiny, "--config", later, "--size", "big")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: {later} comes later and overrides data.size (32 -> 64), trainer.max_epochs (2 -> 9)"
    ]
    with pytest.raises(SystemExit):
        run("summary", "--trainer.max_epochs", 3, "--config", tiny, "--size", "big")
    assert "overrides trainer.max_epochs (3 -> 2)" in capsys.readouterr().err
