"""Tar shards as files: which ones a spec names, and ranges of their bytes, from a disk or through fsspec."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, TypeVar

from llava_ds.errors import BackendUnavailableError, ConfigError, DataError

COMPLETE_FILE = "shards.json"
"""Written last into a folder of shards by tools/make_shards; lists them with their sizes."""

UNFINISHED_FILE = "shards.json.unfinished"
"""Stands in the folder until then."""

T = TypeVar("T")
# What back ends call the version of a file.
_VERSION_KEYS = ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created", "md5Hash")


@dataclass(frozen=True)
class ShardFile:
    """One tar. It pickles, and holds nothing open: every process opens files and connections of its own."""

    url: str
    """An absolute path, or a URL with its protocol."""
    size_bytes: int
    version: str
    """Differs where the file was replaced: its time, or the tag that a server gives."""
    is_local: bool

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rpartition("/")[2]

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to ``end``. Raises DataError when they cannot be had in full."""
        if self.is_local:
            content = self._pread(start, end)
        else:
            content = _remotely(self.url, lambda fs, path: fs.cat_file(path, start, end))
        if len(content) != end - start:
            raise DataError(
                f"{self.url}: asked for bytes {start} to {end}, got {len(content)} bytes; the shard is cut off, or its "
                "server does not serve ranges",
                reason="a shard is shorter than it was",
            )
        return content

    def open(self) -> BinaryIO:
        """The whole file, to be read in order with jumps. Raises DataError when it cannot be opened."""
        if self.is_local:
            return open(self.url, "rb")
        return _remotely(self.url, lambda fs, path: fs.open(path, "rb"))

    def _pread(self, start: int, end: int) -> bytes:
        try:
            opened = _descriptor(self.url, self.size_bytes, self.version)
            return os.pread(opened.number, end - start, start)
        except OSError as error:
            raise DataError(f"{self.url}: cannot be read ({error.strerror}); is it still there?") from error


def find_shards(spec: str) -> list[ShardFile]:
    """The tars of a folder, of one .tar, or of a brace pattern, each also as an fsspec URL.

    Raises DataError for a missing shard, a folder without shards and an unfinished one, and ConfigError for a pattern
    that is none.
    """
    urls = expand_braces(spec.removeprefix("file://"))
    if len(urls) == 1 and not urls[0].endswith(".tar"):
        return _find_in_folder(urls[0].rstrip("/"))
    wrong = [url for url in urls if not url.endswith(".tar")]
    if wrong:
        raise DataError(f"{wrong[0]}: shards are .tar files, not compressed; unpack or rename it")
    for folder in dict.fromkeys(url.rpartition("/")[0] or "." for url in urls):
        _refuse_unfinished(folder)
    return [_stat(url) for url in urls]


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern such as ``train-{000000..000009}.tar`` or ``{a,b}.tar`` stands for, in its order."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    if any(mark in piece for piece in pieces[::2] for mark in "{}"):
        raise ConfigError(f"{pattern!r}: unbalanced or nested braces; write e.g. train-{{000000..000009}}.tar")
    options = [_options(piece, pattern) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*options)]


def read_small_file(url: str) -> bytes | None:
    """The content of a file beside the shards, or None when there is none. Raises DataError when it cannot be read."""
    if not is_remote(url):
        try:
            with open(url, "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"{url}: cannot be read ({error.strerror}); look at its permissions") from error
    return _remotely(url, _content_if_any)


def is_remote(url: str) -> bool:
    """Whether fsspec has to read it."""
    return "://" in url


def _content_if_any(fs: Any, path: str) -> bytes | None:
    try:
        return fs.cat_file(path)
    except (FileNotFoundError, PermissionError):  # S3 forbids what is not there to those who may not list
        return None


def _find_in_folder(folder: str) -> list[ShardFile]:
    complete = read_small_file(f"{folder}/{COMPLETE_FILE}")
    if complete is not None:
        return _find_listed(folder, complete)
    _refuse_unfinished(folder)
    if is_remote(folder):
        names = _remotely(folder, lambda fs, path: [found.rpartition("/")[2] for found in fs.glob(f"{path}/*.tar")])
    elif os.path.isdir(folder):
        names = [name for name in os.listdir(folder) if name.endswith(".tar")]
    else:
        raise DataError(f"{folder}: no such folder; give a folder of .tar shards, a .tar, or a pattern of them")
    if not names:
        raise DataError(f"{folder}: no .tar here; give a folder of shards, or a pattern such as x-{{000..009}}.tar")
    return [_stat(f"{folder}/{name}") for name in sorted(names)]


def _find_listed(folder: str, complete: bytes) -> list[ShardFile]:
    try:
        listed = {str(shard["name"]): int(shard["bytes"]) for shard in json.loads(complete)["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/{COMPLETE_FILE}: damaged ({error!r}); write the shards again") from error
    files = [_stat(f"{folder}/{name}") for name in listed]
    for file in files:
        if file.size_bytes != listed[file.name]:
            raise DataError(
                f"{file.url}: {file.size_bytes} bytes, but {COMPLETE_FILE} says {listed[file.name]}; "
                "copy or write the shard again"
            )
    unlisted = [] if is_remote(folder) else sorted(
        name for name in os.listdir(folder) if name.endswith(".tar") and name not in listed
    )
    if unlisted:
        raise DataError(
            f"{folder}: {len(unlisted)} .tar that {COMPLETE_FILE} does not list, the first {unlisted[0]}; move them "
            f"elsewhere, or delete {COMPLETE_FILE} to read all"
        )
    if not files:
        raise DataError(f"{folder}/{COMPLETE_FILE}: lists no shard; write the shards again")
    return files


def _refuse_unfinished(folder: str) -> None:
    if read_small_file(f"{folder}/{UNFINISHED_FILE}") is not None:
        raise DataError(
            f"{folder}: unfinished, as tools/make_shards was stopped here ({UNFINISHED_FILE} stands in it); "
            "delete the folder and run tools/make_shards again"
        )


def _stat(url: str) -> ShardFile:
    if not is_remote(url):
        path = os.path.abspath(url)
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: no such shard ({error.strerror}); copy it there") from error
        return ShardFile(path, found.st_size, str(found.st_mtime_ns), is_local=True)
    info = _remotely(url, lambda fs, path: fs.info(path))
    if not isinstance(info.get("size"), int):
        raise DataError(f"{url}: the server does not say how large the shard is; copy the shards to a disk")
    version = "|".join(f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key))
    return ShardFile(url, info["size"], version, is_local=False)


def _options(inside: str, pattern: str) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None:
        if "," not in inside:
            raise ConfigError(f"{pattern!r}: {{{inside}}} is neither a range such as {{000..009}} nor a list {{a,b}}")
        return inside.split(",")
    first, last = span.groups()
    if int(first) > int(last):
        raise ConfigError(f"{pattern!r}: the range {{{inside}}} runs backwards; write {{{last}..{first}}}")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _remotely(url: str, work: Callable[[Any, str], T], tries: int = 3) -> T:
    """Runs ``work(file system, path)``; what may be a hiccup of the network is tried again."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)  # fsspec keeps one for each process
        return work(fs, path)
    except ImportError as error:
        raise BackendUnavailableError(
            f"{url}: {error}; install that package (pip install -e \".[data]\" holds the one for http)"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file; check the URL", reason="no such file") from error
    except Exception as error:  # every back end has errors of its own
        if tries == 1 or isinstance(error, ValueError):
            raise DataError(
                f"{url}: cannot be read: {type(error).__name__}: {error}; check the URL and the network",
                reason="a URL cannot be read",
            ) from error
    time.sleep(4.0 / tries)
    return _remotely(url, work, tries - 1)


class _Descriptor:
    """An open file that closes when nobody uses it any more: dropping it from the cache disturbs no other thread."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=128)
def _descriptor(path: str, size_bytes: int, version: str) -> _Descriptor:
    opened = _Descriptor(path)
    found = os.fstat(opened.number)
    if (found.st_size, str(found.st_mtime_ns)) != (size_bytes, version):
        raise DataError(f"{path}: the shard has changed since it was opened; start again")
    return opened
