"""Where checkpoints lie, and when one is whole.

``run/run.json`` states the run; ``run/checkpoints/step-00000012/`` holds each rank's shards (see fragments.py),
``step.json``, a copy of ``run.json``, ``manifest.json`` and, written last, ``COMPLETE``. Frozen weights are not stored:
they are named in ``run.json``.

``COMPLETE`` holds the hash of ``manifest.json``, which holds size and hash of every other file: what is not as it was
written is found, and named.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from llava_ds.constants import COMPLETE_MARKER
from llava_ds.durable import sync_to_disk
from llava_ds.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
_STEP_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file."""

    size: int
    xxh128: str


def checkpoints_dir(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def step_dir(run_dir: Path, step: int) -> Path:
    """The folder of an optimizer step's checkpoint."""
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def step_number(folder: Path) -> int:
    """The optimizer step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def list_step_folders(run_dir: Path) -> list[Path]:
    """The folders of a run's steps, complete or not, oldest first. What is called otherwise (a copy) is the user's."""
    folders = [folder for folder in checkpoints_dir(run_dir).glob("step-*") if _STEP_NAME.fullmatch(folder.name)]
    return sorted(folders, key=step_number)


def list_steps(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [folder for folder in list_step_folders(run_dir) if (folder / COMPLETE_MARKER).is_file()]


def resolve_step(path: Path) -> Path:
    """The checkpoint that a run folder (its last step) or a step folder names.

    Raises CheckpointError when there is none, or it is not complete.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run folder or a checkpoint step")
    if path.name.startswith("step-") or (path / "step.json").is_file():
        if not (path / COMPLETE_MARKER).is_file():
            raise CheckpointError(f"{path} is not complete (no {COMPLETE_MARKER}); use an earlier step of the run")
        return path
    steps = list_steps(path)
    if not steps:
        raise CheckpointError(
            f"{path} holds no complete checkpoint (checkpoints/step-*/{COMPLETE_MARKER}); "
            "let the run reach its next save, or give another run"
        )
    return steps[-1]


def read_run(step: Path) -> dict[str, Any]:
    """The run.json of a checkpoint. Raises CheckpointError when it is missing or broken."""
    with reading(step / "run.json") as file:
        return dict(json.loads(file.read_text()))


def commit(folder: Path, known: Mapping[str, FileRecord] | None = None) -> None:
    """Marks a folder complete, after its files are on disk; on return the mark is on disk, too.

    ``known`` are the records of files that were hashed, and brought to disk, when they were written.
    """
    records = dict(known or {})
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if name not in records:
            sync_to_disk(file)
            records[name] = FileRecord(file.stat().st_size, hash_file(file))
    manifest = folder / MANIFEST_FILE
    manifest.write_text(json.dumps({name: asdict(record) for name, record in sorted(records.items())}, indent=1) + "\n")
    marker = folder / COMPLETE_MARKER
    sync_to_disk(manifest)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync_to_disk(inner)
    sync_to_disk(folder)  # the names of all files, before the mark may appear
    partial = folder / f".{COMPLETE_MARKER}"
    partial.write_text(hash_file(manifest) + "\n")
    sync_to_disk(partial)
    partial.rename(marker)
    for path in (folder, folder.parent):
        sync_to_disk(path)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Size and xxh128 of every file of a complete folder, by name.

    Raises CheckpointError when the folder is not complete, or the manifest is not the one that was committed.
    """
    marker, manifest = folder / COMPLETE_MARKER, folder / MANIFEST_FILE
    if not marker.is_file():
        raise CheckpointError(f"{folder} is not complete (no {COMPLETE_MARKER})")
    with reading(marker):
        expected = marker.read_text().strip()
    found = hash_file(manifest)
    if found != expected:
        raise CheckpointError(f"{manifest}: {_differs('xxh128', expected[:16] or 'none', found[:16])}")
    with reading(manifest):
        return {name: FileRecord(**record) for name, record in json.loads(manifest.read_text()).items()}


def find_damage(
    folder: Path, names: Sequence[str] | None = None, hashes: bool = True, progress: Callable[[int], None] | None = None
) -> list[str]:
    """What is wrong with the files of a complete folder (all, or ``names``): one line for each, with both values.

    ``hashes=False`` compares sizes only. ``progress`` is told of bytes as they are read.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name in manifest if names is None else names:
        problem = _check_file(folder / name, manifest[name], hashes, progress)
        if problem:
            problems.append(f"{folder / name}: {problem}")
    return problems


def _check_file(
    file: Path, expected: FileRecord, hashes: bool, progress: Callable[[int], None] | None
) -> str | None:
    try:
        size = file.stat().st_size
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
    if size != expected.size:
        return _differs("bytes", expected.size, size)
    if not hashes:
        return None
    try:
        found = hash_file(file, progress)
    except CheckpointError as error:
        return str(error)
    return None if found == expected.xxh128 else _differs("xxh128", expected.xxh128[:16], found[:16])


def _differs(what: str, expected: object, found: object) -> str:
    return f"{what} {expected} expected, {found} found"


def hash_file(file: Path, progress: Callable[[int], None] | None = None) -> str:
    """The xxh128 of a file: XXH3 of 128 bits, which ``xxh128sum`` prints too. It finds every accident, at the speed of
    the memory (a cryptographic hash takes longer than the disk); it is no defence against forgery.

    Raises CheckpointError when the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(1 << 22))
    with reading(file), file.open("rb", buffering=0) as handle:
        while size := handle.readinto(buffer):
            digest.update(buffer[:size])
            if progress:
                progress(size)
    return digest.hexdigest()


def remove_folder(folder: Path) -> None:
    """Removes a checkpoint, its mark first: what is left of a removal that was cut off is never taken for whole."""
    (folder / COMPLETE_MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


@contextmanager
def reading(file: Path) -> Iterator[Path]:
    """Whatever goes wrong while ``file`` is read becomes a CheckpointError that names it."""
    try:
        yield file
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}\n  The checkpoint is damaged: copy or merge it again, or use another step."
        ) from error
