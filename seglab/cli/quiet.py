"""Third-party messages that no user can act on, and that would bury those they can."""

import logging
import warnings

BESIDE_THE_POINT = (
    "For seamless cloud",  # an advertisement
    "Seed set to",  # config.yaml says so
    "GPU available: False",  # the warning that one is there and not used stays
    "TPU available: False",
    "`weights_only` was not set",  # every checkpoint is read with it
    "`Trainer.fit` stopped",  # the table's headline says after how many steps
)
"""Beginnings of Lightning's messages that tell a user nothing."""

LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.seed",
)


def silence_noise(command: str) -> None:
    """Drop Lightning's advertisements and warnings that are beside the point here.

    Args:
        command: Such as "fit"; what an evaluation need not hear, a training may.
    """
    # torch 2.9 and later deprecate a class that Lightning 2.6 asks for at every batch.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # A resumed run has its own folder, and keeps its own best checkpoint there.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    if command != "fit":
        # Training's callbacks have nothing to do in an evaluation.
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_to_the_point)


def _is_to_the_point(record: logging.LogRecord) -> bool:
    return not any(beginning in record.getMessage() for beginning in BESIDE_THE_POINT)
