"""Third-party messages that no user can act on, and that would bury those they can."""

import logging
import warnings

ADVERTISEMENT = "For seamless cloud"


def silence_noise(command: str) -> None:
    """Drop Lightning's advertisements and warnings that are beside the point here.

    Args:
        command: Such as "fit"; what an evaluation need not hear, a training may.
    """
    # torch 2.9 and later deprecate a class that Lightning 2.6 asks for at every batch.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # A resumed run has its own folder, and keeps its own best checkpoint there.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    if command != "fit":
        # Training's callbacks have nothing to do in an evaluation.
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return ADVERTISEMENT not in record.getMessage()
