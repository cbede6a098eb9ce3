"""`predict --input`: masks of any images; goes on where it stopped, past what is unreadable."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seglab.cli.command_parser import CommandParser, read_size
from seglab.cli.values import check_checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from seglab.predictor import Predictor

RECORD = "predict.json"
BACKENDS = ("torch", "onnxruntime", "openvino")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


def predict_files(args: list[str]) -> None:
    """Write masks of image files, folders, patterns or lists; skips what is done already."""
    options = _read_options(args)
    check_checkpoint(str(options.ckpt_path))
    from seglab.cli.inputs import find_inputs
    from seglab.cli.progress import progress_bar
    from seglab.data.submission import refuse_other_classes
    from seglab.loading import load

    inputs = find_inputs(options.input, options.submission is not None, _results(options.output))
    how = options.device, options.optimize, options.backend, options.precision
    model = load(options.ckpt_path, *how)
    if options.submission:
        refuse_other_classes(options.submission, model.class_names)
    writer = Writer(model, options)
    writer.refuse_images_among_results(inputs)
    _claim(options)
    todo = {name: path for name, path in inputs.items() if not writer.is_done(name, path)}
    started = time.perf_counter()
    with progress_bar("images") as progress:
        unreadable = writer.write_all(todo, progress)
    seconds = time.perf_counter() - started
    n_written = len(todo) - len(unreadable)
    rate = f", {n_written / seconds:.2f} images/s" if n_written else ""
    print(f"{options.output}: {n_written} written{rate}, {len(inputs) - len(todo)} done before")
    if model.optimizations is not None:
        print(f"optimized: {model.optimizations}")
    if unreadable:
        print(f"{len(unreadable)} could not be predicted:")
        for complaint in unreadable:
            print(f"  - {_printable(complaint)}")
        raise SystemExit(1)


class Writer:
    """Predicts images and writes what was asked for; a file that is there is complete.

    Args:
        model: What predicts.
        options: Of the command.
    """

    def __init__(self, model: Predictor, options: Namespace) -> None:
        self.model = model
        self.options = options

    def files(self, name: str) -> list[Path]:
        """What is written for an image; the last one when all is."""
        output: Path = self.options.output
        if self.options.submission:
            return [output / f"{name}.png"]
        if self.options.window:
            return [output / "masks" / f"{name}.tif"]
        mask = output / "masks" / f"{name}.png"
        return [output / "overlays" / f"{name}.png", mask] if self.options.overlays else [mask]

    def refuse_images_among_results(self, inputs: Mapping[str, Path]) -> None:
        """Raise ValueError if a result would take the place of an image that is asked for."""
        for name, path in inputs.items():
            if path.resolve() in [file.resolve() for file in self.files(name)]:
                raise ValueError(
                    f"{path} would be overwritten by its own mask: choose another --output than"
                    f" {self.options.output}"
                )

    def is_done(self, name: str, image: Path) -> bool:
        """Whether all files of an image are there, and no older than it."""
        try:
            newest = image.stat().st_mtime_ns
            return all(path.stat().st_mtime_ns >= newest for path in self.files(name))
        except OSError:  # one is not there, or its name is none
            return False

    def write_all(self, inputs: Mapping[str, Path], progress: Any) -> list[str]:
        """Predict in batches; returns a sentence for each image that could not be."""
        complaints: list[str] = []
        items = iter(inputs.items())
        n_done = 0
        size = 1 if self.options.window else self.options.batch_size
        while chunk := list(islice(items, size)):
            complaints += (
                self._write_large(*chunk[0]) if self.options.window else self._write(chunk)
            )
            n_done += len(chunk)
            progress("predict", n_done, len(inputs))
        return complaints

    def _write_large(self, name: str, path: Path) -> list[str]:
        try:
            _require_file(path)
            self.model.predict_large(path, self.files(name)[0], self.options.window)
        except _OF_THE_IMAGE as error:
            return [_complaint(path, error)]
        return []

    def _write(self, chunk: Sequence[tuple[str, Path]]) -> list[str]:
        complaints, found, images = [], [], []
        for name, path in chunk:
            try:
                _require_file(path)
                images.append(self.model.read(path))
            except _OF_THE_IMAGE as error:  # noqa: PERF203 - a file takes far longer
                complaints.append(_complaint(path, error))
            else:
                found.append((name, path))
        try:
            labelled: Sequence[NDArray[Any]] = self.model.label(images)
        except _OF_THE_IMAGE as error:
            if len(chunk) > 1:  # too much at once, or one of them is at fault
                return complaints + [said for pair in found for said in self._write([pair])]
            return [_complaint(chunk[0][1], error)]
        for (name, path), pixels, ids in zip(found, images, labelled, strict=True):
            complaints += self._save(name, path, pixels, ids)
        return complaints

    def _save(self, name: str, path: Path, pixels: NDArray[Any], ids: NDArray[Any]) -> list[str]:
        try:
            self._save_files(name, pixels, ids)
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
                raise  # such as a full disk
            return [_complaint(path, error)]
        return []

    def _save_files(self, name: str, pixels: NDArray[Any], ids: NDArray[Any]) -> None:
        from seglab.data.submission import save_submission
        from seglab.visualize import as_mask, as_rgb, overlay, save_mask, save_picture

        *before, last = self.files(name)
        mask, colors = as_mask(ids), self.model.color_table
        if before:
            with _atomic(before[0]) as path:
                save_picture(path, overlay(as_rgb(pixels), mask, colors))
        with _atomic(last) as path:
            if self.options.submission:
                save_submission(path, mask, self.options.submission)
            else:
                save_mask(path, ids, colors)


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _results(output: Path) -> list[Path]:
    """Folders that an earlier run has filled: `--input .` is not to predict them."""
    names = ("masks", "overlays")
    return [output / name for name in names] if (output / RECORD).is_file() else []


def _claim(options: Namespace) -> None:
    """Keep in the folder what its masks are of; refuse to mix them with others.

    Raises:
        ValueError: The folder holds masks of another checkpoint or made otherwise.
    """
    checkpoint = options.ckpt_path.resolve()
    found = {
        "checkpoint": str(checkpoint),
        "modified": checkpoint.stat().st_mtime_ns,
        "submission": options.submission,
        "window": options.window,
        "precision": options.precision,
    }
    found = json.loads(json.dumps(found))
    record: Path = options.output / RECORD
    before = _read_record(record)
    changed = [key for key in found if before and before.get(key) != found[key]]
    if changed:
        raise ValueError(
            f"{options.output} holds predictions with another {' and '.join(changed)}"
            f" ({before.get(changed[0])}): choose another --output, or delete it"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    with _atomic(record) as path:
        path.write_text(json.dumps(found, indent=2) + "\n")


def _read_record(record: Path) -> dict[str, Any]:
    """What an earlier run has kept of itself; empty if there was none."""
    if not record.is_file():
        return {}
    try:
        # Records that name no precision were written when there was one.
        return {"precision": PRECISIONS[0], **json.loads(record.read_text())}
    except (ValueError, TypeError):
        raise ValueError(
            f"{record} does not say what the masks beside it are of: choose another --output, or"
            f" delete {record.parent}"
        ) from None


_OF_THE_IMAGE = (ValueError, OSError, RuntimeError, MemoryError)
"""What an image may lead to: unreadable, or too small or too large for the network."""


def _require_file(path: Path) -> None:
    """Raise ValueError for folders, pipes and devices, which could be waited for without end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file but a {'folder' if path.is_dir() else 'device'}")


def _complaint(path: Path, error: Exception) -> str:
    """One line, whatever the name holds."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or "alloc" in reason or "out of memory" in reason:
        reason = f"it needs more memory than there is ({reason}): label it with --window 1024,1024"
    name = " ".join(str(path).split())
    for known, short in ((f"image {name} ", ""), (f"image {name}", "it"), (name, "it")):
        reason = reason.replace(known, short)
    return f"{name}: {reason}"


def _printable(text: str) -> str:
    """Names that are no text of the terminal, spelled out."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _read_options(args: list[str]) -> Namespace:
    parser = CommandParser("predict", predict_files.__doc__)
    parser.add_argument(
        "--ckpt_path", type=Path, required=True, help="a checkpoint of fit, or a file of export"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="image files, folders, patterns, lists (.txt), or - for a list on standard input",
    )
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder to fill")
    parser.add_argument("--batch_size", type=_positive, default=8, help="images read at a time")
    parser.add_argument("--device", help="such as cpu or cuda:1; a GPU if there is one")
    parser.add_argument(
        "--optimize",
        action="store_true",
        help="make torch's network faster, with equal results",
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, help="what runs the network; files: their own"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="others are faster where the processor has them; ids may differ",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--overlays", action="store_true", help="also lay masks over their images")
    kind.add_argument("--submission", choices=("ade20k", "cityscapes"), help="masks for a server")
    kind.add_argument(
        "--window", type=read_size, help="HEIGHT,WIDTH: by windows, into tiled TIFF; for large ones"
    )
    return parser.parse_args(args)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number
