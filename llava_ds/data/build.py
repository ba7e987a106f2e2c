"""From the data settings of a recipe to the batches of a rank."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from llava_ds.config import RunConfig
from llava_ds.data.collator import Collator
from llava_ds.data.dataset import LlavaDataset
from llava_ds.data.feature_cache import FeatureCache, open_feature_cache
from llava_ds.data.images import ImageTransform
from llava_ds.data.length_table import LengthTable, join_lengths
from llava_ds.data.lengths import measure_source
from llava_ds.data.loader import BatchStream, build_loader
from llava_ds.data.order import Part, epoch_size
from llava_ds.data.packing import BatchSizes, Packing
from llava_ds.data.sampler import START, DataState, StepPlan, plan_run, steps_per_epoch
from llava_ds.data.sources.formats import open_source
from llava_ds.data.sources.mixture import JoinedSources
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.distributed import Ranks, check_agreement, run_on_main_first
from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import Image, StoredImage


@dataclass(frozen=True)
class DataPlan:
    """The whole order of a run, known before any image is decoded; the same on every rank.

    ``parts`` are the good records of each source, by their numbers in ``source``.
    """

    source: JoinedSources
    lengths: LengthTable
    parts: tuple[Part, ...]
    seed: int
    batch: BatchSizes
    length_groups: int
    num_steps: int
    digest: str
    """Of the records and what is good of them; two plans with one digest hold the same samples."""

    def steps(self, start: DataState = START, num_done: int = 0) -> Iterator[StepPlan]:
        """The plan of every step from ``start`` on, ``num_done`` of which are done."""
        return plan_run(
            self.parts, self.lengths, self.seed, self.batch, self.num_steps - num_done, start, self.length_groups
        )

    def supervised_tokens(self, plan: StepPlan) -> int:
        """Supervised tokens of a step, over all ranks and micro-batches."""
        indices = np.array([slot.index for slot in plan.slots])
        return int(self.lengths.supervised(indices, np.array([slot.epoch for slot in plan.slots])).sum())

    @property
    def num_samples(self) -> int:
        """Good records, each counted once."""
        return sum(len(part.indices) for part in self.parts)


@dataclass(frozen=True)
class TrainingData:
    """Everything that the loop asks of the data."""

    loader: BatchStream
    plan: DataPlan
    skipped: Counter[str]


def build_training_data(
    config: RunConfig,
    packing: str,
    tokenizer: Any,
    transform: ImageTransform,
    feature_shape: tuple[int, int],
    tower_key: str,
    compute_features: Callable[[torch.Tensor], torch.Tensor],
    ranks: Ranks,
    start: DataState = START,
    num_done: int = 0,
) -> TrainingData:
    """Opens, checks and measures the data, plans the run, and builds this rank's loader.

    Args:
        packing: ``packed`` or ``padded``, resolved.
        feature_shape: (P, C) of the tower.
        tower_key: names the tower's weights and the transform, for the feature cache.
        compute_features: [I, 3, H, W] -> [I, P, C], by the frozen tower.
        start: where the data go on, after ``num_done`` steps.

    Raises:
        DataError: a bad or missing file, record or image, unless ``data.on_bad_sample`` is ``skip``.
    """
    settings = config.data
    text = TextPipeline(
        tokenizer, settings.template, settings.placement, feature_shape[0], settings.max_length, config.seed,
        settings.truncation,
    )
    plan = plan_data(config, packing, text, ranks)
    has_images = bool(plan.lengths.rows["num_images"][_all_indices(plan.parts)].any())
    skip_bad = settings.on_bad_sample == "skip"
    load_image: Callable[[Image], torch.Tensor] = transform.levels
    blank = torch.zeros((3, transform.image_size, transform.image_size), dtype=torch.uint8)
    if settings.feature_cache and has_images:
        load_image = _open_feature_cache(config, plan, transform, feature_shape, tower_key, compute_features, ranks)
    features = not has_images or bool(settings.feature_cache)
    if features:
        blank = torch.zeros(feature_shape)
    loader = build_loader(
        LlavaDataset(plan.source, text, load_image, blank, skip_bad),
        Collator(packing, blank, features),
        lambda: plan.steps(start, num_done),
        ranks.rank,
        settings.num_workers,
    )
    return TrainingData(loader, plan, plan.lengths.skipped())


def plan_data(config: RunConfig, packing: str, text: TextPipeline, ranks: Ranks) -> DataPlan:
    """Opens and measures every source (rank 0 first, the others find what it kept) and plans the run."""
    settings, train = config.data, config.train
    entries = settings.sources()

    def open_and_measure() -> tuple[JoinedSources, list[LengthTable]]:
        sources = [
            open_source(entry.path, entry.format, entry.image_root, entry.split, entry.prompt_format)
            for entry in entries
        ]
        log = print if ranks.is_main else _silent
        return JoinedSources(sources), [
            measure_source(source, text, settings.on_bad_sample, log=log) for source in sources
        ]

    source, tables = run_on_main_first(ranks, open_and_measure)
    digest = hashlib.sha256()  # not of fingerprints: copies of a file on two machines may differ in their times
    for table in tables:
        digest.update(repr(table.reasons).encode())
        digest.update(table.rows.data)
    short_digest = digest.hexdigest()[:16]
    check_agreement(ranks, "the records and what is good of them", short_digest)
    parts = tuple(
        Part(start + table.good(), entry.weight)
        for start, table, entry in zip(source.starts[:-1], tables, entries, strict=True)
    )
    lengths = join_lengths(tables)
    if sum(len(part.indices) * part.weight for part in parts) < 1 <= sum(len(part.indices) for part in parts):
        raise ConfigError(
            f"the weights of data.mixture, {[part.weight for part in parts]}, take less than one sample an epoch of "
            f"{[len(part.indices) for part in parts]}; raise them"
        )
    if not any(len(part.indices) for part in parts):
        skipped = lengths.skipped()
        raise DataError(f"no sample is left to train on; {sum(skipped.values())} were skipped: {dict(skipped)}")
    longest = int(lengths.rows["num_tokens"][_all_indices(parts)].max())
    budget = train.micro_batch_tokens
    if budget is not None and longest > budget:
        raise ConfigError(
            f"train.micro_batch_tokens={budget}, but a sample has {longest} tokens.\n  Raise it, or lower "
            f"data.max_length={settings.max_length}, so that samples are cut."
        )
    batch = BatchSizes(
        train.global_batch_size, train.micro_batch_size, ranks.world_size, cast(Packing, packing), budget
    )
    num_steps = _num_steps(parts, train.epochs, train.global_batch_size)
    return DataPlan(
        source, lengths, parts, config.seed, batch, settings.length_groups,
        min(num_steps, train.max_steps or num_steps), short_digest,
    )


def _num_steps(parts: Sequence[Part], epochs: float, global_batch_size: int) -> int:
    """Steps of whole epochs, and of a share of the next one."""
    whole = int(epochs)
    steps = sum(steps_per_epoch(epoch_size(parts, epoch), global_batch_size) for epoch in range(whole))
    return max(1, steps + round((epochs - whole) * steps_per_epoch(epoch_size(parts, whole), global_batch_size)))


def _all_indices(parts: Sequence[Part]) -> np.ndarray:
    return np.concatenate([part.indices for part in parts])


def _open_feature_cache(
    config: RunConfig,
    plan: DataPlan,
    transform: ImageTransform,
    feature_shape: tuple[int, int],
    tower_key: str,
    compute_features: Callable[[torch.Tensor], torch.Tensor],
    ranks: Ranks,
) -> Callable[[Image], torch.Tensor]:
    images: set[Image] = {image for i in _all_indices(plan.parts).tolist() for image in plan.source[i].images}
    if any(isinstance(image, StoredImage) for image in images):
        raise ConfigError(
            "data.feature_cache needs pictures that are files, and some of data.path are stored in shards or tables; "
            "leave it out"
        )
    files = sorted(Path(str(image)) for image in images)
    key = hashlib.sha256(f"{tower_key}|{config.train.precision}|{transform}".encode()).hexdigest()[:16]
    folder = Path(str(config.data.feature_cache)) / key

    def compute(files: Sequence[Path]) -> torch.Tensor:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the other ranks wait
        try:
            return compute_features(torch.stack([transform.levels(file) for file in files]))
        finally:
            torch.set_num_threads(num_threads)

    log = print if ranks.is_main else _silent
    skip_bad = config.data.on_bad_sample == "skip"

    def fill() -> FeatureCache:
        return open_feature_cache(folder, files, feature_shape, compute, skip_bad, log=log)

    cache = run_on_main_first(ranks, fill)
    return lambda image: cache(Path(str(image)))


def _silent(_: str) -> None:
    """Ranks other than 0 find everything made, and say nothing."""
