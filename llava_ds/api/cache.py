"""Replies on disk, by key of their request: what was paid once is not paid again, whatever happens.

``replies.jsonl`` holds a header, then a line for each reply with its request, endpoint and time; ``lock`` is held by
the one process that writes. Nothing is ever changed or taken out.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from llava_ds.api.messages import ChatReply, ChatRequest
from llava_ds.durable import sync_to_disk
from llava_ds.errors import ConfigError, DataError

REPLIES_FILE, LOCK_FILE = "replies.jsonl", "lock"
_HEADER = json.dumps({"format": "llava_ds chat replies", "version": 1}).encode() + b"\n"


class CachedReply(NamedTuple):
    """A reply, and the endpoint that gave it."""

    reply: ChatReply
    base_url: str


class ReplyCache:
    """A folder of paid replies; each is on disk when ``put`` returns. One writer at a time, with any number of threads.

    ``writable=False`` takes no lock and creates nothing, for dry runs. A line that cannot be read, such as the last one
    of a process that was killed, is reported and stays; its reply is asked again.

    Raises ConfigError when another process writes there, DataError when the file is not one of these.
    """

    def __init__(self, folder: Path, writable: bool = True, log: Callable[[str], None] = print) -> None:
        self.folder, self.writable = folder, writable
        self.num_damaged = 0
        self._file = folder / REPLIES_FILE
        self._places: dict[str, tuple[int, int]] = {}  # bytes: where a line starts, and its length
        self._mutex = threading.Lock()
        self._lock: IO[str] | None = None
        self._handle: IO[bytes] | None = None
        if writable:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _hold(folder / LOCK_FILE, log)
        try:
            self._open(log)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def get(self, key: str) -> CachedReply | None:
        """The reply under a key, marked as ``cached``."""
        place = self._places.get(key)
        if place is None or self._handle is None:
            return None
        return _read_line(os.pread(self._handle.fileno(), place[1], place[0]))[1]

    def put(self, request: ChatRequest, reply: ChatReply, base_url: str) -> None:
        """Keeps a reply; it is on disk on return. Raises OSError when it cannot be written."""
        answer = {name: value for name, value in asdict(reply).items() if name != "cached"}
        entry = {
            "key": request.key(), "id": request.id, "time": time.time(), "base_url": base_url, "reply": answer,
            "request": {"attempt": request.attempt, "body": request.body()},
        }
        line = json.dumps(entry).encode() + b"\n"
        with self._mutex:
            if self._handle is None:
                raise OSError(f"{self._file} is closed: the reply to {request.id} came too late and is not kept")
            self._places[request.key()] = (self._append(self._handle.fileno(), line), len(line))

    def close(self) -> None:
        """Lets another writer in."""
        with self._mutex:
            for file in (self._handle, self._lock):
                if file is not None:
                    file.close()
            self._handle = self._lock = None

    def _open(self, log: Callable[[str], None]) -> None:
        if not self.writable and not self._file.is_file():
            return
        self._handle = self._file.open("a+b" if self.writable else "rb", buffering=0)
        content_ends = self._read(log)
        if not self.writable:
            return
        handle = self._handle.fileno()
        if os.fstat(handle).st_size < len(_HEADER):  # new, or cut off when it was new
            os.ftruncate(handle, 0)
            self._append(handle, _HEADER)
            sync_to_disk(self.folder)
        elif not content_ends:
            self._append(handle, b"\n")  # so that the next reply starts a line of its own

    def _read(self, log: Callable[[str], None]) -> bool:
        """Finds the replies. Returns whether the last line has an end."""
        with self._file.open("rb") as lines:
            header = lines.readline()
            if header != _HEADER and not (_HEADER.startswith(header) and not lines.peek(1)):
                raise DataError(
                    f"{self._file} is no file of replies: it begins with {header[:60]!r}, not {_HEADER.strip()!r}.\n"
                    "  Choose another folder by --cache; nothing was written to this one."
                )
            line, start = header, len(header)
            for line in lines:
                self._add(line, start)
                start += len(line)
        if self.num_damaged:
            log(f"{self._file}: {self.num_damaged} lines cannot be read (a process was killed while it wrote, or the "
                "disk is damaged); these replies are asked again")
        return line.endswith(b"\n") or not line

    def _add(self, line: bytes, start: int) -> None:
        try:
            self._places[_read_line(line)[0]] = (start, len(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            self.num_damaged += bool(line.strip())

    @staticmethod
    def _append(handle: int, line: bytes) -> int:
        """Writes a line, all of it or nothing. Returns where it starts."""
        start = os.fstat(handle).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, start)
            raise
        return start


def _read_line(line: bytes) -> tuple[str, CachedReply]:
    """A key and what stands under it."""
    entry: dict[str, Any] = json.loads(line)
    return str(entry["key"]), CachedReply(replace(ChatReply(**entry["reply"]), cached=True), str(entry["base_url"]))


def _hold(file: Path, log: Callable[[str], None]) -> IO[str]:
    lock = file.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "an unknown process"
        lock.close()
        raise ConfigError(
            f"{file.parent} is being written by {holder}: both would pay for the same replies.\n"
            "  Choose another folder by --cache, or let that process end first."
        ) from error
    except OSError as error:
        log(f"{file} cannot be locked ({error}); let no second process write to {file.parent}")
        return lock
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock
