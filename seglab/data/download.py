"""Fetch and unpack archives so that an interruption costs time and never correctness.

A download grows in ``name.part``, continues there after a break, and gets its name only when its
checksum is right. An archive is unpacked beside its destination and moved there in one rename, so
a folder that exists is whole.
"""

import errno
import hashlib
import os
import shutil
import socket
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

from seglab.data.errors import DataError

Progress = Callable[[str, int, int | None], None]  # (what, bytes done, bytes in all)

_CHUNK = 1 << 20
_BREAKS = (urllib.error.URLError, HTTPException, OSError)


@dataclass(frozen=True)
class Archive:
    """One file of an official data set.

    Args:
        name: File name.
        url: Where it lies; None if it needs an account.
        md5: Checksum.
        folder: What it unpacks to, below the root; whole if it exists.
        n_bytes: Size, if known.
    """

    name: str
    url: str | None
    md5: str
    folder: str
    n_bytes: int | None = None


def silent(what: str, n_done: int, n_total: int | None) -> None:
    """Show no progress."""


def download(
    url: str,
    target: Path,
    md5: str,
    *,
    n_attempts: int = 8,
    pause: float = 2.0,
    timeout: float = 30.0,
    progress: Progress = silent,
) -> Path:
    """Download a file; continue where an earlier attempt or run stopped.

    Args:
        url: http(s) address.
        target: Where to put it.
        md5: Checksum the whole file must have.
        n_attempts: Attempts in a row that may bring nothing new.
        pause: Seconds after the first such attempt; doubled each time, up to a minute.
        timeout: Seconds without a byte after which a connection counts as broken.
        progress: Called with (file name, bytes done, bytes in all or None).

    Returns:
        `target`.

    Raises:
        DataError: If the server keeps failing or the checksum is wrong (twice, from scratch).
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for is_last in (False, True):
        _fetch_all(url, part, n_attempts, pause, timeout, progress)
        found = file_md5(part)
        if found == md5:
            part.replace(target)
            return target
        part.unlink()
        if is_last:
            raise DataError(
                f"{url} has md5 {found}, expected {md5}: the server holds another file; "
                "set data.mirrors to an address of the official one"
            )
    raise AssertionError


def file_md5(path: Path) -> str:
    """Return a file's MD5 as hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch_all(
    url: str, part: Path, n_attempts: int, pause: float, timeout: float, progress: Progress
) -> None:
    """Append to `part` until the server says that nothing is missing."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_rest(url, part, timeout, progress):
                return
            error: Exception = ConnectionError("the connection ended early")
        except urllib.error.HTTPError as refusal:
            if refusal.code in (400, 401, 403, 404, 410):
                raise DataError(f"{url} answers {refusal}; set data.mirrors to another") from None
            error = refusal
        except _BREAKS as broken:
            _stop_if_hopeless(broken, url, part)
            error = broken
        came = (part.stat().st_size if part.exists() else 0) > before
        failures = 0 if came else failures + 1
        if failures >= n_attempts:
            raise DataError(
                f"gave up on {url} after {failures} attempts without a byte: {error}; "
                f"run the same command again to continue, {before} bytes are kept in {part}"
            ) from error
        time.sleep(min(pause * 2**failures, 60.0) if failures else 0)


def _stop_if_hopeless(error: Exception, url: str, part: Path) -> None:
    """Some failures do not heal by trying again."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, socket.gaierror) and not part.exists():
        raise DataError(f"cannot find the host of {url} ({reason}); is there a network?") from None
    if getattr(reason, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        raise DataError(f"no space left for {part}; make room and run the command again") from None


def _fetch_rest(url: str, part: Path, timeout: float, progress: Progress) -> bool:
    """Do one request for what is missing; tell whether the file is complete."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  the user chose the address
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=timeout)  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # nothing beyond what we have
            return True
        raise
    with response:
        continues = response.status == 206 and _range_start(response) == start
        start = start if continues else 0  # a server without ranges sends the file from its start
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        with part.open("ab" if continues else "wb") as file:
            done = _copy(response, file, lambda n: progress(part.stem, start + n, total))
    return total is None or start + done >= total


def _range_start(response: HTTPResponse) -> int | None:
    value = response.headers.get("Content-Range", "")
    number = value.removeprefix("bytes ").partition("-")[0]
    return int(number) if number.isdigit() else None


def _copy(source: HTTPResponse, target: IO[bytes], report: Callable[[int], None]) -> int:
    done = 0
    while chunk := source.read1(_CHUNK):
        target.write(chunk)
        done += len(chunk)
        report(done)
    return done


def unpack(archive: Path, root: Path, folder: str) -> Path:
    """Unpack one folder of a zip or tar archive to ``root/folder``, whole or not at all.

    Args:
        archive: The file; its suffix tells the format.
        root: Existing folder to unpack below.
        folder: Path inside the archive, and below `root` afterwards.

    Returns:
        ``root/folder``.

    Raises:
        DataError: If the archive is damaged or has no such folder.
    """
    target = root / folder
    if target.exists():
        return target
    staging = root / f".unpacking-{archive.name}"
    shutil.rmtree(staging, ignore_errors=True)  # what an interrupted run left
    staging.mkdir(parents=True)
    try:
        _extract(archive, staging)
        if not (staging / folder).is_dir():
            seen = sorted(path.name for path in staging.iterdir())
            raise DataError(f"{archive} holds {seen} but no folder {folder}; is it another file?")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / folder, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _extract(archive: Path, target: Path) -> None:
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(target)  # noqa: S202  zipfile keeps members inside
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{archive} ({archive.stat().st_size} bytes) is damaged: {error}; "
            "delete it and run prepare again"
        ) from error
