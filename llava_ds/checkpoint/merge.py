"""From a run to one folder that transformers loads as LlavaForConditionalGeneration, and that llava_ds loads too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_ds.checkpoint.formats.transformers_export import (
    plan_transformers,
    projector_export,
    write_settings,
    write_transformers,
)
from llava_ds.checkpoint.keymap import llava_hf_names
from llava_ds.checkpoint.layout import FileRecord, commit, find_damage, read_manifest, resolve_step
from llava_ds.checkpoint.lazy import in_memory
from llava_ds.checkpoint.new_folder import Phases, check_room, new_folder, no_phases, refuse_existing
from llava_ds.checkpoint.recognise import recognise_layout
from llava_ds.checkpoint.remarks import Log, say
from llava_ds.checkpoint.runs import damage_message, open_run, weight_shards
from llava_ds.checkpoint.shard_size import MAX_SHARD_BYTES
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.checkpoint.writer import Progress
from llava_ds.errors import CheckpointError
from llava_ds.models.build import without_memory

_NUM_READERS = 4


def merge(
    source: Path, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES, log: Log = say, phases: Phases = no_phases
) -> str:
    """Writes the merged folder of a run or step, in the run's precision; returns how the projector was written.

    Weights stream from the step's shards and from the frozen parts' files; no more than pieces of them are in memory.
    Every file is compared with its recorded hash, and what was written is read back, before the folder appears, whole
    or not at all.

    Raises CheckpointError when ``out`` exists or cannot be made or held, the source is damaged or not complete, or a
    tensor has no source.
    """
    refuse_existing(out)
    step = _find_step(source)
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_step, step, phases)  # on a second core, while the first one writes
        try:
            model = open_run(step, fresh=True, log=log)
            with new_folder(out) as work:
                records = write_and_check(model, work, max_shard_bytes, _stopping(phases, checked))
                checked.result()
                commit(work, records)
        except CheckpointError:
            checked.result()  # what is wrong with a shard is said by its name and hash
            raise
    return projector_export(model)


def _find_step(source: Path) -> Path:
    layout = recognise_layout(source)
    if layout != "llava_ds":
        raise CheckpointError(f"{source} is no run: its layout is {layout}; tools/convert goes on from there")
    return resolve_step(source)


def _stopping(phases: Phases, checked: Future[None]) -> Phases:
    """The same, but raises as soon as something is found to be wrong."""

    def begin(name: str, num_bytes: int) -> Progress:
        progress = phases(name, num_bytes)

        def advance(num_done: int) -> None:
            if checked.done():
                checked.result()
            progress(num_done)

        return advance

    return begin


def write_and_check(
    model: StoredModel, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES, phases: Phases = no_phases
) -> dict[str, FileRecord]:
    """Writes a model in transformers' layout into an existing folder and reads it back; see ``write_transformers``.

    Raises CheckpointError when there is no room, or the disk does not hold what was written.
    """
    num_bytes = sum(tensor.num_bytes for _, tensor in plan_transformers(model))
    check_room(folder, num_bytes)
    with _one_thread():
        records = write_transformers(model, folder, max_shard_bytes, phases("writing", num_bytes))
    return records


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch's threads wait for one another busily after every small copy, on the cores that hash."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_step(step: Path, phases: Phases = no_phases) -> None:
    """Raises CheckpointError that lists every damaged weight shard of a step, with both sizes or hashes."""
    manifest, names = read_manifest(step), weight_shards(step)
    progress = phases("checking", sum(manifest[name].size for name in names))
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        found = list(pool.map(lambda name: find_damage(step, [name], progress=progress), names))
    problems = [problem for lines in found for problem in lines]
    if problems:
        raise CheckpointError(damage_message(step, problems))


def trial_export(model: StoredModel, scratch: Path) -> int:
    """Does all of an export but the weights, into the empty folder ``scratch``; returns the bytes they will take.

    Raises CheckpointError when transformers would not load the result: its own model, built without memory, must have
    the names and shapes that would be written.
    """
    write_settings(model, scratch)
    plan = plan_transformers(model)
    config = LlavaConfig.from_pretrained(scratch)
    with without_memory():
        theirs = LlavaForConditionalGeneration(config)
    theirs.tie_weights()
    named = {name: in_memory(value) for name, value in theirs.named_parameters()}
    expected = {name: value.shape for name, value in llava_hf_names(named).items()}
    _compare(expected, {name: tensor.shape for name, tensor in plan})
    return sum(tensor.num_bytes for _, tensor in plan)


def _compare(expected: Mapping[str, tuple[int, ...]], planned: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{name}: {planned.get(name, 'missing')} would be written, {expected.get(name, 'nothing')} is expected"
                for name in {**expected, **planned} if expected.get(name) != planned.get(name)]
    if problems:
        raise CheckpointError("transformers would not load what an export writes:\n  " + "\n  ".join(problems))
