"""One sentence on stderr for what a user can mend; a traceback for what a programmer must.

A user's mistake is a config that does not parse, an error that this project raised on purpose, or
a file that is not there. Everything else is a bug, here or below, and keeps its traceback.
"""

import errno
import inspect
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module

from seglab.cli.arguments import ConfigError
from seglab.cli.program import program_name

OWN_PACKAGES = ("seglab", "scale_equalization")
CONFIGURED = ("lightning", "torch.optim")
"""Packages that raise a ValueError for an argument of the config when the run begins."""
BAD_USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes; the last is the shell's for Ctrl-C
TRACEBACK_VARIABLE = "SEGLAB_TRACEBACK"


DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


WRONG_PLACES = (FileExistsError, IsADirectoryError, NotADirectoryError)
"""A path that the user gave is a file or a folder where it should be the other, or be new."""


class BuildError(Exception):
    """Something that a config asks for refused to be built; says why."""


@contextmanager
def build_errors() -> Iterator[None]:
    """While an experiment is built, what other libraries refuse was asked for by the config.

    Raises:
        BuildError: In place of their errors.
    """
    try:
        yield
    except ImportError as error:
        sentence = _of_missing_package(str(error), error.name)
        raise BuildError(sentence or " ".join(str(error).split())) from error
    except (ValueError, TypeError, RuntimeError) as error:
        if explain(error) is not None:
            raise
        raise BuildError(f"{explain_parsing(str(error))} (--traceback shows where)") from error


def _of_missing_package(message: str, name: str | None = None) -> str | None:
    """A sentence for a package that is not there, if a message is about one."""
    found = re.search(r"Requirement '([\w.-]+)", message)
    name = found[1] if found else name
    if name is None:
        return None
    return f"the package {name} is not installed, and the config needs it: pip install {name}"


class StoppedError(Exception):
    """A training that a signal has ended; everything is said and saved.

    Args:
        sentence: Where, and how to go on.
        signum: The signal.
    """

    def __init__(self, sentence: str, signum: int) -> None:
        super().__init__(sentence)
        self.code = 128 + signum  # as shells report it


@contextmanager
def one_sentence(show_traceback: bool = False) -> Iterator[None]:
    """Turn a user's mistake inside the block into a sentence and an exit code.

    Args:
        show_traceback: Let every error through, as the variable `SEGLAB_TRACEBACK` does.

    Raises:
        SystemExit: 2 for arguments and configs, 1 for the rest, 130 after Ctrl-C.

    >>> with one_sentence():
    ...     raise KeyError("a bug")
    Traceback (most recent call last):
    KeyError: 'a bug'
    """
    try:
        yield
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain as it leaves
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FAILURE) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # the Trainer has cleaned up already
            _leave("interrupted", INTERRUPTED)
        raise
    except StoppedError as stop:
        _leave(str(stop), stop.code)
    except Exception as error:
        sentence = explain(error)
        if sentence is None or show_traceback or os.environ.get(TRACEBACK_VARIABLE):
            raise
        is_usage = isinstance(error, ArgumentError | ConfigError)
        _leave(sentence, BAD_USAGE if is_usage else FAILURE)


def explain(error: Exception) -> str | None:
    """The sentence for a user's mistake, None for a bug."""
    if isinstance(error, ArgumentError):
        return explain_parsing(error.message)
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        where = error.filename or "a file of the run"
        return f"{where}: {error.strerror}."
    if isinstance(error, WRONG_PLACES) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; give another path."
    if type(error).__name__ == "OutOfMemoryError":
        first = str(error).partition(". ")[0]
        return f"{first}: lower data.batch_size, or data.eval_batch_size if it was evaluating."
    if isinstance(error, ValueError) and _raised_in(error, "jsonargparse"):
        return _of_missing_package(str(error)) or explain_parsing(str(error))
    on_purpose = isinstance(error, ValueError) and _raised_in(error, *OWN_PACKAGES, *CONFIGURED)
    refused = type(error).__name__ == "MisconfigurationException"  # Lightning's word for the same
    wrong_path = isinstance(error, (FileNotFoundError, *WRONG_PLACES))
    if on_purpose or refused or wrong_path or _class_is_ours(error):
        return " ".join(str(error).split())
    return None


def explain_parsing(message: str) -> str:
    r"""Shorten what jsonargparse says of a config to where it is and what is wrong.

    >>> explain_parsing('Parser key "trainer.max_epochs":\n  - Expected an int\n  Given value: x')
    'trainer.max_epochs: Expected an int; got x'
    """
    for pattern, replacement in REWORDED:
        message = re.sub(pattern, replacement, message)
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    place, *rest = lines if not lines[0].startswith(NOISE) else ["", *lines]
    place = re.sub(r'^Parser key "([^"]+)":', r"\1:", place)
    said = [line for line in rest if not line.startswith(NOISE)]
    said = [re.sub(r'^Parser key "([^"]+)":', r"in its \1:", line) for line in said]
    sentence = "; ".join(said).replace(":;", ":").replace("Given value:", "got")
    sentence = re.sub(r";? got \[?Namespace\(.*", "", sentence)
    return f"{place} {sentence}{_near_names(sentence)}".strip()


REWORDED = (
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"Type \S*Callable\[.*\] expects a function or a callable class: ", ""),
    (r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1"),
    (r"Expected a dot import path string: (\S+)", r"no class \1 is known, give its import path"),
    (r"\.? Got value: Namespace\(.*\)", ""),
    (r"Problem with given class_path '([\w.]+)':", r"in \1:"),
)
NOISE = (
    "Does not validate against any",
    "Subtypes:",
    "Errors:",
    "Expected a NoneType",
    "Expected a path but",  # class paths may also be files; nobody means that
    "Given value type:",
    "Given value: NestedArg",
    "Given value: Namespace",
)


def _near_names(sentence: str) -> str:
    """For an option that a class does not have: the options that it has."""
    found = re.search(r".*\bin ([\w.]+): Option '(\w+)' is not accepted", sentence)
    if found is None:
        return ""
    module, _, name = found[1].rpartition(".")
    bases = getattr(import_module(module), name).__mro__
    signatures = [inspect.signature(base.__init__) for base in bases if "__init__" in vars(base)]
    names = [key for signature in signatures for key in signature.parameters]
    near = [name for name in get_close_matches(found[2], names, n=1) if name != found[2]]
    return f"; did you mean {near[0]!r}?" if near else ""


def _leave(sentence: str, code: int) -> None:
    print(f"{program_name()}: {sentence}", file=sys.stderr)
    raise SystemExit(code) from None


def _class_is_ours(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in OWN_PACKAGES


def _raised_in(error: Exception, *packages: str) -> bool:
    """Whether the line that raised is in one of these packages."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return any(f"{module}.".startswith(f"{package}.") for package in packages)
