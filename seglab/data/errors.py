"""The error of everything that is wrong with a data set; a leaf, so anyone may import it."""

from collections.abc import Mapping
from types import MappingProxyType

_WORKER_PREFIX = "Caught "


class DataError(ValueError):
    r"""A data set on disk, or what was asked of it, does not fit; the message holds the cure.

    A loader worker hands its exception to the main process wrapped into a traceback of text
    (`torch._utils.ExceptionWrapper`); the sentence that matters is its last line, so that line
    becomes the message here, whatever the number of workers.

    >>> wrapped = "Caught DataError in DataLoader worker process 0.\nTraceback\nDataError: no"
    >>> str(DataError(wrapped))
    'no'
    """

    def __init__(self, message: str) -> None:
        if message.startswith(_WORKER_PREFIX) and "DataLoader worker" in message:
            message = message.rstrip().rsplit("\n", 1)[-1].partition(": ")[2]
        super().__init__(message)


class MissingDataError(DataError, FileNotFoundError):
    """A folder or file that the data set needs is not there."""


class UnpairedError(DataError):
    """Images have no mask.

    Args:
        message: Which ones.
        n_missing: How many have none.
        n_found: How many have one.
        blended: First file that lies where a mask should, of a kind that blends values.
    """

    def __init__(
        self, message: str, n_missing: int = 0, n_found: int = 0, blended: str = ""
    ) -> None:
        super().__init__(message)
        self.n_missing, self.n_found, self.blended = n_missing, n_found, blended


class NoLayoutError(DataError):
    """No known layout of images and masks fits a folder.

    Args:
        message: What is there instead.
        is_near: Whether one fits some of the images.
    """

    def __init__(self, message: str, is_near: bool = False) -> None:
        super().__init__(message)
        self.is_near = is_near


class UnreadableError(DataError):
    """A file cannot be decoded: it is cut short, or not what its name says."""


class FormatError(DataError):
    """An image holds other bands or values than were asked for.

    Args:
        fact: What it holds.
        cure: What a user of a data module can set.
        setting: The key that it is set by.
    """

    def __init__(self, fact: str, cure: str = "", setting: str = "") -> None:
        super().__init__(fact + cure)
        self.fact, self.setting = fact, setting


class LabelValueError(DataError):
    """A mask has values that are neither a class nor ignored."""

    def __init__(self, message: str, n_pixels: Mapping[int, int] = MappingProxyType({})) -> None:
        super().__init__(message)
        self.n_pixels = dict(n_pixels)  # by raw value
