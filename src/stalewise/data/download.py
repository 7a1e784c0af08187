"""Fetch one file into the cache folder, checked against its checksum."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from stalewise.errors import DataError

__all__ = ["fetch"]

_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 16


class _Bar:
    """What pooch asks of a progress bar (`total`, `update`, `reset`, `close`), drawn by rich on stderr."""

    def __init__(self, name: str) -> None:
        columns = (
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(name, total=None)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def total(self) -> float | None:
        """Bytes to come, or None where the server does not say."""
        return self._progress.tasks[0].total

    @total.setter
    def total(self, value: int) -> None:
        # Set when the answer begins to arrive: a file that is already there, or a server that is not, draws
        # no bar.
        self._progress.start()
        self._progress.update(self._task, total=value or None)

    def update(self, size: int) -> None:
        """Count `size` more bytes."""
        self._progress.update(self._task, advance=size)

    def reset(self) -> None:
        """Count from zero again; pooch does this before it fills the bar."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Stop drawing, if it was begun; a second call does nothing."""
        if self._progress.live.is_started:
            self._progress.stop()


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Keep pooch's notices off the terminal: the bar says the same."""
    # A filter, not a level: a logger that was not made by `getLogger`, as pooch's, caches which levels it passes.
    logger.addFilter(_is_warning)
    try:
        yield
    finally:
        logger.removeFilter(_is_warning)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def fetch(url: str, *, md5: str, folder: Path) -> Path:
    """The file at `url`, from `folder` if it is there and whole, or else downloaded into it. Blocks.

    Args:
        url: http or https address; its last part becomes the file's name.
        md5: checksum of the file, in hexadecimal digits.
        folder: made if missing.

    Raises:
        DataError: where the download fails or is not the file of that checksum; nothing is left in `folder`.
    """
    import pooch

    name = url.rsplit("/", 1)[-1]
    try:
        with _Bar(name) as bar, _quiet(pooch.get_logger()):
            downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=_CHUNK_BYTES, timeout=_TIMEOUT_S)
            return Path(pooch.retrieve(url, known_hash=f"md5:{md5}", fname=name, path=folder, downloader=downloader))
    # The errors of requests are OSErrors, and pooch reports a wrong checksum by a ValueError.
    except (OSError, ValueError) as error:
        response = getattr(error, "response", None)
        if response is not None:
            response.close()  # pooch leaves the connection of a refused request open
        raise DataError(
            f"{url} could not be downloaded to {folder}: {error}. Download it by other means and pass its "
            "folder with --data-dir (data_dir=), or use the data set 'digits', which needs no download."
        ) from error
