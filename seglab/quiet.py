"""Third-party messages that no user can act on, and that would bury those they can."""

import logging
import warnings

ADVERTISEMENT = "For seamless cloud"


def silence_noise() -> None:
    """Drop Lightning's advertisements and its use of names that torch has deprecated."""
    # torch 2.9 and later deprecate a class that Lightning 2.6 asks for at every batch.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return ADVERTISEMENT not in record.getMessage()
