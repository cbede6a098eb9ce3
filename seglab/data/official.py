"""What the three benchmark data sets share: official archives, fixed layouts, `prepare`."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from seglab.data.base import SegmentationDataModule
from seglab.data.download import Archive, Progress, download, file_md5, silent, unpack
from seglab.data.errors import DataError, MissingDataError
from seglab.data.sources.files import FileSource, Item
from seglab.data.sources.labels import Labels
from seglab.data.sources.listing import holds
from seglab.palette import Color

_log = logging.getLogger(__name__)


class OfficialDataModule(SegmentationDataModule):
    """A benchmark data set, read from its official archives as they unpack.

    Args:
        root: Folder that holds, or will hold, the archives and what they unpack to.
        class_names: As in `SegmentationDataModule`.
        palette: As in `SegmentationDataModule`.
        crop_size: Height and width of training crops.
        scale: (long, short) box of the random resize at ratio 1.
        eval_scale: (long, short) box for evaluation.
        eval_batch_size: 1, as in the published evaluations.
        download: Run `prepare` before anything else.
        mirrors: Archive name to address, where the official one is slow or gone.
        options: As in `SegmentationDataModule`.
    """

    archives: ClassVar[tuple[Archive, ...]]
    n_official: ClassVar[dict[str, int]]  # images per split

    def __init__(
        self,
        root: str,
        class_names: Sequence[str],
        palette: Sequence[Color],
        *,
        eval_batch_size: int | None = 1,
        download: bool = False,
        mirrors: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(class_names, palette, eval_batch_size=eval_batch_size, **options)
        self.root = Path(root)
        self.download = download
        self.mirrors = dict(mirrors or {})

    def prepare_data(self) -> None:
        """Lightning's hook, called on one process: prepare, if that was asked for."""
        if self.download:
            self.prepare()

    def prepare(self, progress: Progress = silent) -> None:
        """Download what is missing, check it and unpack it; does nothing the second time.

        Args:
            progress: Called with (what, bytes done, bytes in all or None).

        Raises:
            DataError: If a server or an archive is at fault, or files need an account.
        """
        for archive in self.archives:
            if not self._is_there(archive):
                unpack(self._obtain(archive, progress), self.root, archive.folder)

    def _is_there(self, archive: Archive) -> bool:
        itself = self.root.absolute().as_posix().endswith(f"/{archive.folder}")
        return (self.root / archive.folder).exists() or (itself and self.root.exists())

    def _obtain(self, archive: Archive, progress: Progress) -> Path:
        path = self.root / archive.name
        url = self.mirrors.get(archive.name, archive.url)
        if path.exists():
            return _check_archive(path, archive)
        if url is None:
            raise MissingDataError(self._instructions())
        return download(url, path, archive.md5, progress=progress)

    def _instructions(self) -> str:
        raise NotImplementedError(f"{type(self).__name__} has an archive without an address")

    def _find_root(self, folder: str, needed: str) -> Path:
        """Return ``root/folder``, or root if it is that folder itself."""
        candidates = [self.root / folder, self.root]
        for candidate in candidates:
            if (candidate / needed).exists():
                return candidate
        looked = " and ".join(str(candidate / needed) for candidate in candidates)
        raise MissingDataError(
            f"{type(self).__name__} looked for {looked}; {holds(self.root)}; set data.root to the "
            "folder of the unpacked archive, or get it with `prepare` or data.download true"
        )

    def _files(self, split: str, items: list[Item], labels: Labels) -> FileSource:
        if len(items) != self.n_official[split]:
            _log.warning(
                "%s: %d %s images where the official set has %d",
                type(self).__name__,
                len(items),
                split,
                self.n_official[split],
            )
        return FileSource(items, labels)


def complete(list_items: Callable[[], list[Item]], folder: Path) -> list[Item]:
    """List items; if some files are missing, say that the archive is half unpacked.

    Raises:
        DataError: With the folder to delete.
    """
    try:
        return list_items()
    except DataError as error:
        raise DataError(
            f"{error}. The archive seems half unpacked: delete {folder} and unpack it again "
            "(`prepare` does)"
        ) from error


def _check_archive(path: Path, archive: Archive) -> Path:
    found = file_md5(path)
    if found != archive.md5:
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) has md5 {found}, expected {archive.md5}: "
            "a broken or different file; delete it and run prepare again"
        )
    return path
