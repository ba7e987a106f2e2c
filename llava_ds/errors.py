"""The four error types. A message says what (both values), where, and what to do."""


class ConfigError(ValueError):
    """A recipe, an override or a DeepSpeed JSON is wrong, or two of them disagree."""


class DataError(ValueError):
    """A record, an image or a data file is wrong."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unfinished, damaged or does not fit the model."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot be used here."""
