"""The four error types. A message says what (both values), where, and what to do."""

from __future__ import annotations


class ConfigError(ValueError):
    """A recipe, an override or a DeepSpeed JSON is wrong, or two of them disagree."""


class DataError(ValueError):
    """A record, an image or a data file is wrong.

    ``reason`` says it without the record's name and values, so that skipped records are counted by it. ``sample_id``
    is the record's id where it is known. ``on_every_rank``: all ranks raise it together, so one may say it for all.
    """

    def __init__(
        self, message: str, reason: str = "", sample_id: str | None = None, on_every_rank: bool = False
    ) -> None:
        super().__init__(message)
        self.reason = reason or message.splitlines()[0]
        self.sample_id = sample_id
        self.on_every_rank = on_every_rank

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str | None, bool]]:
        return DataError, (str(self), self.reason, self.sample_id, self.on_every_rank)


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unfinished, damaged or does not fit the model.

    ``on_every_rank``: all ranks raise it together, so one may say it for all.
    """

    def __init__(self, message: str, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot be used here."""
