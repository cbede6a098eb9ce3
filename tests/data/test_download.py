"""Downloads against a server that breaks connections and sends wrong bytes."""

import errno
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from seglab.data import ADE20KDataModule, CityscapesDataModule, DataError
from seglab.data.download import Archive, download, unpack

CONTENT = bytes(range(256)) * 2000


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; what goes wrong is set by the attributes."""

    files: dict[str, bytes]
    cut_after: int | None = None  # bytes after which a connection dies
    ranges = True
    wrong_first = False  # the first whole answer has other bytes
    refuse: int | None = None
    forgets_start = False  # answers a range with another one
    requests: list[str | None]

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        if self.server.refuse:
            self.send_error(self.server.refuse)
            return
        content = self.server.files[self.path[1:]]
        if self.server.wrong_first and len(self.server.requests) == 1:
            content = bytes(len(content))
        start = int(wanted[6:-1]) if wanted and self.server.ranges else 0
        if start and self.server.forgets_start:
            start = 1
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.cut_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.files, running.requests = {"data.bin": CONTENT}, []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def fetch(server: Server, folder: Path, name: str = "data.bin") -> Path:
    expected = md5(server.files[name])
    return download(server.url(name), folder / name, expected, n_attempts=2, pause=0.01, timeout=5)


def test_broken_connections_are_continued(server: Server, tmp_path: Path) -> None:
    server.cut_after = 150_000
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=150000-", "bytes=300000-", "bytes=450000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_a_later_run_continues(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-"]


def test_a_complete_part_is_only_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_servers_without_ranges_start_over(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "data.bin.part").write_bytes(b"x" * 1000)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_answers_of_another_range_do_no_harm(server: Server, tmp_path: Path) -> None:
    server.forgets_start = True
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-", None]


def test_full_disk_stops_at_once_and_says_so(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("seglab.data.download._copy", full)
    with pytest.raises(DataError, match=r"no space left for .*data\.bin\.part; make room"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1


def test_wrong_bytes_are_fetched_again(server: Server, tmp_path: Path) -> None:
    server.wrong_first = True
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_wrong_bytes_twice_are_an_error(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"has md5 {md5(CONTENT)}, expected {'0' * 32}.*mirrors"):
        download(server.url("data.bin"), tmp_path / "data.bin", "0" * 32)
    assert not list(tmp_path.iterdir())


def test_a_dead_server_keeps_what_came(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:777])
    server.refuse = 503
    with pytest.raises(DataError, match=r"gave up .* after 2 attempts.*503.*777 bytes are kept"):
        fetch(server, tmp_path)
    assert (tmp_path / "data.bin.part").stat().st_size == 777


def test_a_missing_file_is_not_retried(server: Server, tmp_path: Path) -> None:
    server.refuse = 404
    with pytest.raises(DataError, match=r"answers HTTP Error 404.*set data.mirrors"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1


def test_an_unknown_host_is_not_retried(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot find the host of http://nowhere.invalid"):
        download("http://nowhere.invalid/data.bin", tmp_path / "data.bin", "0" * 32)


def test_progress_counts_all_bytes(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    download(
        server.url("data.bin"),
        tmp_path / "data.bin",
        md5(CONTENT),
        progress=lambda *state: seen.append(state),
    )
    assert seen[-1] == ("data.bin", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted(folder.rglob("*.*g")):
            file.write(path, path.relative_to(folder.parent))
    return buffer.getvalue()


@pytest.fixture
def small_ade20k(
    server: Server, ade20k_root: Path, monkeypatch: pytest.MonkeyPatch
) -> ADE20KDataModule:
    content = zipped(ade20k_root / "ADEChallengeData2016")
    server.files["ade.zip"] = content
    archive = Archive("ade.zip", None, md5(content), "ADEChallengeData2016")
    monkeypatch.setattr(ADE20KDataModule, "archives", (archive,))
    mirrors = {"ade.zip": server.url("ade.zip")}
    return ADE20KDataModule(str(ade20k_root / "fresh"), download=True, mirrors=mirrors)


def test_download_option_prepares_everything(
    server: Server, small_ade20k: ADE20KDataModule
) -> None:
    server.cut_after = 5000
    small_ade20k.prepare_data()
    small_ade20k.setup("fit")
    assert len(small_ade20k.train_dataset) == 5
    assert sorted(path.name for path in small_ade20k.root.iterdir()) == [
        "ADEChallengeData2016",
        "ade.zip",
    ]
    n_requests = len(server.requests)
    small_ade20k.prepare()
    assert len(server.requests) == n_requests


def test_interrupted_unpacking_leaves_no_folder(
    small_ade20k: ADE20KDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_midway(file: zipfile.ZipFile, target: Path) -> None:
        file.extract(file.namelist()[0], target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", stop_midway)
        with pytest.raises(KeyboardInterrupt):
            small_ade20k.prepare()
    assert not (small_ade20k.root / "ADEChallengeData2016").exists()
    small_ade20k.prepare()
    small_ade20k.setup("fit")


def test_leftovers_of_a_killed_run_are_replaced(small_ade20k: ADE20KDataModule) -> None:
    staging = small_ade20k.root / ".unpacking-ade.zip/ADEChallengeData2016/images"
    staging.mkdir(parents=True)
    (staging / "half.jpg").write_bytes(b"half")
    small_ade20k.prepare()
    assert not list(small_ade20k.root.rglob("half.jpg"))


def test_broken_archive_on_disk_is_named(small_ade20k: ADE20KDataModule) -> None:
    small_ade20k.root.mkdir()
    (small_ade20k.root / "ade.zip").write_bytes(b"PK broken")
    with pytest.raises(DataError, match=r"ade.zip \(9 bytes\) has md5 .*delete it and run prepare"):
        small_ade20k.prepare()


def test_cityscapes_says_what_to_put_where(tmp_path: Path) -> None:
    message = (
        rf"account: get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip .*into {tmp_path}"
    )
    with pytest.raises(DataError, match=message):
        CityscapesDataModule(str(tmp_path)).prepare()


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    for name in ("a.zip", "a.tar", "a.tgz"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(DataError, match=rf"{name} \(10 bytes\) is damaged"):
            unpack(tmp_path / name, tmp_path, "top")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tgz", "a.zip"]


def test_another_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").write_text("text")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        tar.add(tmp_path / "inside", "inside")
    with pytest.raises(DataError, match=r"holds \['inside'\] but no folder top"):
        unpack(tmp_path / "a.tgz", tmp_path, "top")
