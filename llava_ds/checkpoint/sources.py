"""Where a run's frozen weights come from: named in run.json by path and xxh128, never copied.

A file is hashed once: its hash is kept in the cache folder until its size or its times change.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llava_ds.cache import cache_folder
from llava_ds.checkpoint.layout import hash_file
from llava_ds.checkpoint.tensor_files import find_weight_files
from llava_ds.config import ModelConfig
from llava_ds.errors import CheckpointError
from llava_ds.models.build import llm_folder
from llava_ds.models.vision_tower import tower_files

_NUM_READERS = 4
_SETTINGS = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
"""Files beside an LLM's weights that decide what it computes."""
_SETTLED_NS = 2_000_000_000
"""A file that was written less than this ago may change again without a change of its times."""


def describe_sources(config: ModelConfig, seed: int) -> dict[str, Any]:
    """What run.json keeps of the tower and the LLM that a run is built from: ``source`` and ``files`` (xxh128 by path).

    A random part has no files. Of an LLM there are ``settings``, too: config and tokenizer, by path.

    Raises ConfigError or CheckpointError when there is no such part.
    """
    return {"vision_tower": _describe_tower(config), "llm": _describe_llm(config, seed)}


def _describe_tower(config: ModelConfig) -> dict[str, Any]:
    name, pretrained = config.vision_tower, config.vision_pretrained
    files = describe_files(tower_files(name, pretrained))
    if pretrained is None or Path(name).is_dir():
        return {"source": name, "pretrained": None, "files": files}
    if Path(pretrained).is_file():
        pretrained = str(Path(pretrained).absolute())
    return {"source": f"{name}/{pretrained}", "pretrained": pretrained, "files": files}


def _describe_llm(config: ModelConfig, seed: int) -> dict[str, Any]:
    folder = llm_folder(config.llm)
    settings = describe_files(folder / name for name in _SETTINGS if (folder / name).is_file())
    described = {"source": config.llm, "folder": str(folder), "init": config.llm_init, "settings": settings}
    if config.llm_init == "random":
        return described | {"seed": seed, "files": {}}
    return described | {"files": describe_files([folder / "config.json", *find_weight_files(folder)])}


def describe_files(files: Iterable[Path]) -> dict[str, str]:
    """xxh128 by absolute path. Raises CheckpointError when one cannot be read."""
    # Only the folder is resolved: the hub's cache links to files without a suffix.
    return _hash_all([file.parent.resolve() / file.name for file in files])


def check_sources(recorded: Mapping[str, Any], parts: Iterable[str], fresh: bool = False) -> None:
    """Raises CheckpointError that lists every file of ``parts`` that is gone or not what run.json says.

    ``fresh`` reads them again, even where their times say that nothing changed.
    """
    check_files({file: xxh128 for part in parts for file, xxh128 in recorded[part]["files"].items()}, fresh)


def check_files(expected: Mapping[str, str], fresh: bool = False) -> None:
    """Raises CheckpointError that lists every file that is gone, or whose xxh128 is another."""
    found = _hash_all([Path(name) for name in expected if Path(name).is_file()], fresh)
    problems = [
        f"{name}: xxh128 {xxh128[:16]} expected, {found[name][:16]} found" if name in found else f"{name}: is gone"
        for name, xxh128 in expected.items() if found.get(name) != xxh128
    ]
    if problems:
        raise CheckpointError(
            "the weights that the run is built on are not there any more as they were:\n  " + "\n  ".join(problems)
            + "\n  Put the files back in their places. Did a later run take a run's folder? The earlier one then "
            "stands beside it, with a number."
        )


def _hash_all(files: Sequence[Path], fresh: bool = False) -> dict[str, str]:
    """xxh128 by path, several files at a time."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return dict(zip(map(str, files), pool.map(lambda file: hash_of(file, fresh), files), strict=True))


def hash_of(file: Path, fresh: bool = False) -> str:
    """The xxh128 of a file, from the cache where neither size nor times changed since it was read.

    Raises CheckpointError when the file cannot be read.
    """
    real = file.resolve()
    try:
        before = real.stat()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    # A file for each hash, named by all that it depends on: processes cannot get in one another's way.
    facts = json.dumps([str(real), before.st_size, before.st_mtime_ns, before.st_ctime_ns])
    entry = cache_folder() / "hashes" / hashlib.sha256(facts.encode()).hexdigest()
    if not fresh:
        try:
            return str(json.loads(entry.read_text())["xxh128"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not hashed yet
    xxh128 = hash_file(real)
    if time.time_ns() - before.st_mtime_ns > _SETTLED_NS:
        _keep(entry, {"file": str(real), "xxh128": xxh128})
    return xxh128


def _keep(entry: Path, value: Mapping[str, str]) -> None:
    partial = entry.with_name(f"{entry.name}.{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value))
        partial.rename(entry)
    except OSError:
        return  # without a cache the next one reads the file again
