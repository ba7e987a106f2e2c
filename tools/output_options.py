"""Checks of the files that commands write: before work that is long or costs money, not when its result is lost."""

from collections.abc import Mapping
from pathlib import Path

import click

from llava_ds.errors import ConfigError


def in_a_folder(_context: click.Context, _option: click.Parameter, file: Path | None) -> Path | None:
    """A callback for options: the folder of the file is there."""
    if file and not file.parent.is_dir():
        raise click.BadParameter(f"{file}: there is no folder {file.parent}; create it, or give another file")
    return file


def check_apart(written: Mapping[str, Path | None], read: Mapping[str, Path | None]) -> None:
    """Raises ConfigError when a file by option that is written is another one's, too, which it would replace."""
    others = {file.resolve(): option for option, file in read.items() if file}
    for option, file in written.items():
        other = others.setdefault(file.resolve(), option) if file else option
        if other != option:
            raise ConfigError(f"{other} and {option} are one file, {file}; give {option} another")
