"""Files by the SHA-256 of what they hold, in a local folder or any place that fsspec knows.

Whoever refers to a blob in the database puts it, writes the reference, and puts it again: the second time finds it there, but
where its last other reference was being deleted just then. See `State` for who removes what.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from uuid import uuid4

import fsspec

from saddlepoint.errors import StoreError, UsageError
from saddlepoint.service.records import Manifest

PIECE = 1 << 20  # bytes
OWNER = "service"  # the file that says whose files these are
SHA = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """A blob store.

    Args:
        url: A folder, or a URL of fsspec such as `memory://files` or `s3://bucket/folder`; what its driver needs besides is read
            from that driver's own configuration.

    Raises:
        UsageError: The URL is of no kind that is installed, or cannot be written.
    """

    def __init__(self, url: str | Path):
        try:
            if "://" not in str(url):
                Path(url).mkdir(mode=0o700, parents=True, exist_ok=True)  # what users sent is for the operator's eyes only
            made = fsspec.core.url_to_fs(str(url))
            self._fs, self._root = cast("tuple[Any, str]", made)
            self._fs.makedirs(f"{self._root}/partial", exist_ok=True)
        except (OSError, ValueError, ImportError) as wrong:
            raise UsageError(f"--files {url}: {wrong}; give a folder, or a URL whose fsspec driver is installed") from None

    def belong(self, state: str) -> None:
        """Be the files of one database for good: what a database does not know is removed, so two of them cannot share a place.

        Args:
            state: Its `State.id`.

        Raises:
            UsageError: They are those of another one.
        """
        mark = f"{self._root}/{OWNER}"
        if not self._fs.exists(mark):
            self._fs.pipe_file(mark, state.encode())
        if (found := self._fs.cat_file(mark).decode()) != state:
            said = f"--files {self._root} holds the files of another service, whose database is {found} and not {state}"
            raise UsageError(f"{said}; give another place, or remove {mark} if that database is gone")

    def put(self, source: bytes | Path | Iterable[bytes]) -> tuple[str, int]:
        """Keep bytes, a file, or chunks as they come: the SHA-256 and the number of bytes. What is there already is left as it is.

        An exception of the chunks leaves nothing behind.
        """
        partial = f"{self._root}/partial/{uuid4().hex}"
        digest, size = hashlib.sha256(), 0
        try:
            with self._fs.open(partial, "wb") as out:
                for chunk in _chunks(source):
                    digest.update(chunk)
                    size += len(chunk)
                    out.write(chunk)
                out.flush()
                with suppress(OSError, AttributeError):  # an object store has no such thing
                    os.fsync(out.fileno())
            sha = digest.hexdigest()
            if not self.has(sha):
                self._fs.makedirs(self._place(sha).rpartition("/")[0], exist_ok=True)
                self._fs.mv(partial, self._place(sha))
        finally:
            with suppress(FileNotFoundError):
                self._fs.rm_file(partial)
        return sha, size

    def has(self, sha: str) -> bool:
        """Whether it is there."""
        return bool(self._fs.exists(self._place(sha)))

    def size(self, sha: str) -> int:
        """Its bytes.

        Raises:
            StoreError: It is not there.
        """
        try:
            return int(self._fs.size(self._place(sha)))
        except FileNotFoundError:
            raise _gone(sha) from None

    def open(self, sha: str) -> IO[bytes]:
        """A blob for reading.

        Raises:
            StoreError: It is not there.
        """
        try:
            return cast("IO[bytes]", self._fs.open(self._place(sha), "rb"))
        except FileNotFoundError:
            raise _gone(sha) from None

    def chunks(self, sha: str) -> Iterator[bytes]:
        """A blob in pieces, the last of them only where all are what was put.

        Raises:
            StoreError: It is not there, or what is there is not what was put.
        """
        digest, last = hashlib.sha256(), b""
        with self.open(sha) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                if last:
                    yield last
                last = piece
        if digest.hexdigest() != sha:
            raise StoreError(f"the file {sha} of the service is damaged; put a whole copy in its place")
        yield last

    def remove(self, sha: str) -> None:
        """Remove a blob; one that is not there is gone already."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._place(sha))

    def sweep(self, forget: Callable[[str], None], age: float = 24 * 3600) -> None:
        """Remove what processes left that were killed: what they were just putting, and what nothing came to refer to.

        Args:
            forget: Removes a blob unless something refers to it: `Shelf.forget`.
            age: Seconds after which something is looked at.
        """
        for path in self._fs.find(self._root):
            with suppress(FileNotFoundError):
                if (datetime.now(UTC) - self._fs.modified(path)).total_seconds() < age:
                    continue
                if path.rpartition("/")[0].endswith("/partial"):
                    self._fs.rm_file(path)
                elif SHA.fullmatch(name := path.rpartition("/")[2]):
                    forget(name)

    def put_folder(self, folder: Path) -> Manifest:
        """Keep every file of a folder: their relative paths with the SHA-256 of each."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        return {path.relative_to(folder).as_posix(): self.put(path)[0] for path in files}

    def fetch(self, manifest: Manifest, folder: Path) -> None:
        """Write the files of a manifest as a folder, wholly or not at all. A folder that is there already is left as it is.

        Raises:
            StoreError: A file is not there or damaged, or a name leads out of the folder.
        """
        if folder.is_dir():
            return
        partial = folder.with_name(f".{folder.name}-{uuid4().hex}")
        try:
            for name, sha in manifest.items():
                path = PurePosixPath(name)
                if path.is_absolute() or not path.parts or ".." in path.parts:
                    raise StoreError(f"a manifest names the file '{name}'; names are relative and lead nowhere else")
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                with (partial / path).open("wb") as out:
                    out.writelines(self.chunks(sha))
            with suppress(OSError):  # another process was faster: the same files
                partial.rename(folder)
            if not folder.is_dir():
                raise StoreError(f"{folder} cannot be written")
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _place(self, sha: str) -> str:
        if not SHA.fullmatch(sha):
            raise StoreError(f"'{sha}' is no SHA-256 in hexadecimal digits")
        return f"{self._root}/{sha[:2]}/{sha}"


def _gone(sha: str) -> StoreError:
    return StoreError(f"the files of the service have no {sha}; was something deleted by hand? put it back")


def _chunks(source: bytes | Path | Iterable[bytes]) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
    elif isinstance(source, Path):
        with source.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece
    else:
        yield from source
