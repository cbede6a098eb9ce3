"""Experiment: everything a config describes, parsed, built and, for trainer commands, run.

LightningCLI with the sections `trainer`, `data`, `model`, `seed_everything`, `ckpt_path` and those
of the callbacks it is given. What is changed, and why:

- `--ckpt_path` never overrides the config (Lightning's own lets the checkpoint's arguments win).
- Loggers, checkpoints, progress bar and the like are defaults that give way to whatever the
  config puts in their place; Lightning's would add up.
- The config in the run's folder may be overwritten, so that resuming into it works; each
  checkpoint carries the config too, so that `validate --ckpt_path` needs nothing else.
- Checkpoints are written whole or not at all, and a signal ends a training at a step's border.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO

from seglab.checkpoint_files import WholeFiles
from seglab.checkpoints import read_step, require_resumable
from seglab.cli.resume import Continued, MovedFolder
from seglab.cli.run_folder import RunFolder, claim_folder, experiment_name
from seglab.cli.user_errors import build_errors
from seglab.data.base import SegmentationDataModule
from seglab.lightning_internals import is_first_process
from seglab.reporting.costs import Costs
from seglab.reporting.evaluation_files import EvaluationFiles
from seglab.reporting.metrics_csv import MetricsTable
from seglab.reporting.pictures import PictureGrid
from seglab.reporting.progress import LowOverheadProgressBar
from seglab.reporting.results import ResultsPrinter
from seglab.reporting.run_charts import RunCharts
from seglab.reporting.score_files import ScoreFiles
from seglab.stopping import StopOnSignal
from seglab.task import SegmentationTask

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

LIGHTNINGS_OWN = ("best", "last", "hpc")
"""Checkpoints that Lightning finds itself."""

TRAINER_DEFAULTS = {
    "num_sanity_val_steps": 0,  # two batches of an untrained network tell nothing
    "sync_batchnorm": True,  # only with several CUDA devices, see instantiate_trainer
    "enable_model_summary": False,
}

LINKS = {
    "data.num_classes": ("model.num_classes", "model.network.init_args.num_classes"),
    "data.class_names": ("model.class_names",),
    "data.palette": ("model.palette",),
    "data.ignore_index": ("model.ignore_index",),
}
"""What the network must know of the data: attribute of the data module -> arguments it fills."""


class ConfigKeeper(SaveConfigCallback):
    """Saves the config to the run's folder and into each checkpoint, as plain data.

    That of a continued run takes the place of the old one when its first batch is done: whatever is
    refused before that must not change the folder.
    """

    def __init__(self, *args: Any, is_continued: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waits = is_continued
        if is_continued:  # the file stays one that begins the run anew
            self.config = self.config.clone()
            self.config.ckpt_path = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, if the run has a folder; without loggers it would go to the working directory."""
        if trainer.loggers and not self._waits:
            super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save the config of a continued run, once."""
        if self._waits:
            self._waits = False
            self.setup(trainer, pl_module, "fit")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add `config`, with the sections `model` and `data`."""
        sections = yaml.safe_load(self.parser.dump(self.config))
        checkpoint["config"] = {key: sections[key] for key in ("model", "data")}


class Experiment(LightningCLI):
    """Parses the arguments of one command, builds what they describe and runs the command.

    Args:
        command: One of `TRAINER_COMMANDS`.
        args: Its command-line arguments.
        sections: Callback classes with a section of their own in the config, by its name.
        run: False stops when all is built: `.model`, `.datamodule`, `.trainer`, `.config`.
        continued: The run whose folder is to be written to; a new folder if None.
    """

    def __init__(
        self,
        command: str,
        args: list[str],
        sections: Mapping[str, type[Callback]],
        run: bool = True,
        continued: Continued | None = None,
    ) -> None:
        self.sections = sections
        self.runs = run
        self.continued = continued
        self.folder: RunFolder | None = None
        super().__init__(
            SegmentationTask,
            SegmentationDataModule,
            subclass_mode_data=True,
            save_config_callback=ConfigKeeper,
            save_config_kwargs={"overwrite": True, "is_continued": continued is not None},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={
                "exit_on_error": False,
                **{name: {"exit_on_error": False} for name in TRAINER_COMMANDS},
            },
            auto_configure_optimizers=False,
            args=[command, *args],
        )
        if self.folder is not None:
            self.folder.release()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks' sections and the links from data to model."""
        for name, callback in self.sections.items():
            parser.add_lightning_class_args(callback, name)
        parser.add_argument(
            "--without",
            type=list[Literal[tuple(self.sections)]],  # type: ignore[misc]
            default=[],
            help="Sections whose callback is left out.",
        )
        for source, targets in LINKS.items():
            for target in targets:
                parser.link_arguments(source, target, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning's own warns whenever it is handed arguments instead of `sys.argv`."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """The config wins: Lightning would let the checkpoint's arguments override it."""

    def instantiate_classes(self) -> None:
        """Build everything; whatever other libraries refuse is the config's fault."""
        with build_errors():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with our defaults where the config leaves room."""
        config = self._get(self.config_init, "trainer")
        config.sync_batchnorm &= _trains_on_cuda(config.accelerator)  # torch has it on CUDA only
        if config.benchmark is None and not config.deterministic:
            config.benchmark = True
        if config.enable_checkpointing is None and (
            self.subcommand != "fit" or config.fast_dev_run
        ):
            config.enable_checkpointing = False
        if config.logger is not False and self.runs and not config.fast_dev_run:
            config.logger = self._loggers(config)
        parser = self._parser(self.subcommand)
        without = self._get(self.config, "without")
        parser.callback_keys = [key for key in parser.callback_keys if key not in without]
        given = _listed(config.callbacks)
        config.callbacks = given + _default_callbacks(config, given, str(self.subcommand))
        if self.continued is not None:
            config.callbacks.append(MovedFolder())
        plugins = _listed(config.plugins)
        own = any(isinstance(plugin, CheckpointIO | AsyncCheckpointIO) for plugin in plugins)
        if not own and getattr(config.strategy, "_checkpoint_io", None) is None:
            config.plugins = [*plugins, WholeFiles()]
        with self._folder_discarded_on_error():
            return super().instantiate_trainer(**kwargs)

    def _loggers(self, config: Any) -> list[Logger]:
        """CSV and TensorBoard into the run's folder; others beside them, own ones instead."""
        given = [] if config.logger in (None, True) else _listed(config.logger)
        if any(isinstance(logger, CSVLogger | TensorBoardLogger) for logger in given):
            return given  # they say where the run's folder is
        path, n_steps = self._settle_folder(config.default_root_dir)
        tensorboard = TensorBoardLogger(
            path.parent, "", path.name, purge_step=n_steps or None, default_hp_metric=False
        )
        return [MetricsTable(path, n_steps), tensorboard, *given]

    def _settle_folder(self, root: str | None) -> tuple[Path, int]:
        """The run's folder, and the steps that are done in it."""
        if self.continued is not None:
            if is_first_process():
                self.folder = RunFolder(self.continued.folder, made=[])
            return self.continued.folder, self.continued.step
        sources = [self._get(self.config, "ckpt_path"), *(self._get(self.config, "config") or [])]
        name = experiment_name(None if sources[-1] is None else str(sources[-1]))
        kind = "version" if self.subcommand == "fit" else str(self.subcommand)
        if not is_first_process():  # writes nothing; learns rank 0's folder from `trainer.log_dir`
            return Path(root or "logs", name, kind), 0
        self.folder = claim_folder(Path(root or "logs", name), kind)
        return self.folder.path, 0

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name in ("validate", "test"):  # our table says it all; Lightning's would repeat it
            self._subcommand_parsers[name].set_defaults(verbose=False)
        # Predictions go to files; keeping them in memory too would fill it.
        self._subcommand_parsers["predict"].set_defaults(return_predictions=False)

    def before_instantiate_classes(self) -> None:
        """Look for the checkpoint before anything is built for it."""
        path = self._get(self.config, "ckpt_path")
        if path is not None:
            self._get(self.config, "model").weights = None  # the checkpoint takes their place
        if path is not None and path not in LIGHTNINGS_OWN and "://" not in path:
            if not Path(path).exists():
                raise FileNotFoundError(f"ckpt_path: {path} does not exist: check the path.")
            if Path(path).is_file():  # sharded checkpoints are folders
                require_resumable(path, is_training=self.subcommand == "fit")

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.runs:
            return
        path = self._get(self.config, "ckpt_path") if subcommand == "fit" else None
        # Before the run: a continued one overwrites the very file.
        begun = read_step(Path(path)) if path is not None and Path(path).is_file() else None
        with self._folder_discarded_on_error():
            super()._run_subcommand(subcommand)
        if begun == self.trainer.global_step and is_first_process():
            print(
                f"nothing was left to train: {path} is at step {begun}, where this training ends; "
                "a larger --trainer.max_steps or --trainer.max_epochs goes on"
            )

    @contextmanager
    def _folder_discarded_on_error(self) -> Iterator[None]:
        """Leave no empty run folder behind where nothing came of a run."""
        try:
            yield
        except BaseException:
            if self.folder is not None:
                self.folder.discard_if_nothing_happened()
                self.folder.release()
            raise


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _default_callbacks(config: Any, given: list[Callback], command: str) -> list[Callback]:
    """What a run has unless the config brings a callback of the same kind."""
    defaults: list[Callback] = [Costs(), PictureGrid()]
    if config.enable_progress_bar is not False:
        defaults.append(LowOverheadProgressBar())
    defaults.append(ResultsPrinter())  # speaks after the bar has been cleared away
    if command in ("fit", "validate", "test"):
        defaults.append(EvaluationFiles())
    if command == "fit":
        defaults.append(RunCharts())
    if command == "fit" and config.logger is not False and not config.fast_dev_run:
        defaults.append(LearningRateMonitor("step"))
    if command == "fit" and not config.fast_dev_run:
        defaults.append(StopOnSignal())
    if config.enable_checkpointing is not False:
        defaults += best_and_last()
    kinds = (
        Costs,
        RunCharts,
        ProgressBar,
        ModelCheckpoint,
        LearningRateMonitor,
        PictureGrid,
        ResultsPrinter,
        ScoreFiles,
    )
    taken = tuple(kind for kind in kinds if any(isinstance(c, kind) for c in given))
    return [callback for callback in defaults if not isinstance(callback, taken)]


def best_and_last() -> list[Callback]:
    """The checkpoints of a run: the best by mIoU, and the last."""
    # Fixed names, overwritten: a script can name `checkpoints/best.ckpt` before training ends.
    # Not `save_last`: that one is written only when the best is, and would not be the last.
    return [
        ModelCheckpoint(
            monitor="val/mIoU", mode="max", filename="best", enable_version_counter=False
        ),
        ModelCheckpoint(filename="last", enable_version_counter=False),
    ]


def _trains_on_cuda(accelerator: Any) -> bool:
    import torch

    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
