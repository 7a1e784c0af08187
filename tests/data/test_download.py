"""Downloads, from a server of our own."""

import functools
import hashlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pooch
import pytest
import requests

from stalewise.data.cifar import load_cifar
from stalewise.data.download import fetch
from stalewise.errors import DataError

CONTENT = bytes(range(256)) * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and counts."""

    served = 0

    def do_GET(self) -> None:
        type(self).served += 1
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """The address of a server, and the folder it serves."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Handler, "served", 0)
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "data.tar.gz").write_bytes(CONTENT)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", folder
        http.shutdown()
        thread.join()


def test_a_file_is_fetched_once(server, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    address, _ = server
    path = fetch(f"{address}/data.tar.gz", md5=MD5, folder=cache / "new")
    first = capfd.readouterr()
    assert path == cache / "new" / "data.tar.gz"
    assert path.read_bytes() == CONTENT
    assert fetch(f"{address}/data.tar.gz", md5=MD5, folder=cache / "new") == path
    assert Handler.served == 1
    assert first.out == ""
    assert "data.tar.gz" in first.err
    assert capfd.readouterr() == ("", "")


def test_a_damaged_file_in_the_cache_is_fetched_again(server, cache: Path) -> None:
    address, _ = server
    (cache / "data.tar.gz").write_bytes(CONTENT[:-1])
    assert fetch(f"{address}/data.tar.gz", md5=MD5, folder=cache).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "data.tar.gz").write_bytes(b"other"), "hash"),
        (lambda folder: (folder / "data.tar.gz").unlink(), "404"),
    ],
)
def test_a_failed_download_says_what_to_do_and_leaves_nothing(server, cache: Path, change, message: str) -> None:
    address, folder = server
    change(folder)
    with pytest.raises(DataError, match=message) as caught:
        fetch(f"{address}/data.tar.gz", md5=MD5, folder=cache)
    assert f"{address}/data.tar.gz could not be downloaded" in str(caught.value)
    assert "--data-dir" in str(caught.value)
    assert "'digits'" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_refused_request_leaves_no_connection_open(server, cache: Path) -> None:
    address, _ = server
    with pytest.raises(DataError, match="404") as caught:
        fetch(f"{address}/missing.tar.gz", md5=MD5, folder=cache)
    assert isinstance(caught.value.__cause__, requests.HTTPError)
    assert caught.value.__cause__.response.raw.closed


def test_only_the_bar_is_printed(server, cache: Path) -> None:
    address, _ = server
    notices: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = notices.append  # type: ignore[method-assign]
    pooch.get_logger().addHandler(handler)
    try:
        fetch(f"{address}/data.tar.gz", md5=MD5, folder=cache)
        assert notices == []
        pooch.get_logger().info("others are not silenced")
        assert len(notices) == 1
    finally:
        pooch.get_logger().removeHandler(handler)


def test_no_server(server, cache: Path) -> None:
    with pytest.raises(DataError, match=r"could not be downloaded.*--data-dir"):
        fetch("http://127.0.0.1:9/data.tar.gz", md5=MD5, folder=cache)


def test_a_cache_that_cannot_be_written(server, tmp_path: Path) -> None:
    address, _ = server
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="could not be downloaded to"):
        fetch(f"{address}/data.tar.gz", md5=MD5, folder=tmp_path / "file")


def test_cifar_is_downloaded_into_the_cache(server, cache: Path, small_cifar, cifar_records, write_archive) -> None:
    address, folder = server
    contents = {f"{small_cifar.folder}/{name}": data for name, data in cifar_records(small_cifar).items()}
    archive = write_archive(folder / small_cifar.archive, contents)
    layout = replace(
        small_cifar,
        url=f"{address}/{small_cifar.archive}",
        md5=hashlib.md5(archive.read_bytes()).hexdigest(),
    )
    for _ in range(2):
        split = load_cifar(layout, data_dir=None, cache_dir=cache)
        assert split.train.labels.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert Handler.served == 1
    assert (cache / small_cifar.archive).is_file()
