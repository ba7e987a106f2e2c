"""A source: records in a fixed order, each read when it is asked for."""

from __future__ import annotations

from typing import Protocol

from llava_ds.schema import Sample


class Source(Protocol):
    """What every format offers. It survives ``fork`` and pickling: no open file is shared between processes."""

    @property
    def name(self) -> str:
        """How messages call it: the file or folder."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the records may have changed, so that what was measured on them is measured again."""

    def __len__(self) -> int:
        """Number of records, bad ones included."""

    def __getitem__(self, index: int) -> Sample:
        """The record at ``index``, images with their full path. Raises DataError, naming it, when it is bad."""
