"""From the data settings of a recipe to the batches of a rank."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from llava_ds.config import DataConfig, RunConfig, SourceConfig
from llava_ds.data.collator import Collator
from llava_ds.data.dataset import LlavaDataset
from llava_ds.data.feature_cache import FeatureCache, open_feature_cache
from llava_ds.data.held_out import EvalPlan, hold_out, plan_eval
from llava_ds.data.images import ImageTransform
from llava_ds.data.length_table import LengthTable, join_lengths
from llava_ds.data.lengths import measure_source
from llava_ds.data.loader import BatchStream, build_loader
from llava_ds.data.order import Part, epoch_size
from llava_ds.data.packing import BatchSizes, Packing
from llava_ds.data.sampler import START, DataState, StepPlan, plan_run, steps_per_epoch
from llava_ds.data.sources.formats import open_source
from llava_ds.data.sources.mixture import JoinedSources
from llava_ds.data.sources.source import Source
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
    held_out: np.ndarray
    """[n] numbers of the good records that are evaluated, not trained on (``eval.holdout_*``)."""

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
class EvalData:
    """The held-out samples. Whenever ``loader`` is iterated, it gives this rank's micro-batches of the whole pass."""

    loader: BatchStream
    plan: EvalPlan


@dataclass(frozen=True)
class TrainingData:
    """Everything that the loop asks of the data."""

    loader: BatchStream
    plan: DataPlan
    skipped: Counter[str]
    eval: EvalData | None = None


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
    """Opens, checks and measures the data, plans the run, and builds this rank's loaders.

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

    def build_stream(
        source: JoinedSources, lengths: LengthTable, indices: np.ndarray, plans: Callable[[], Iterator[StepPlan]]
    ) -> BatchStream:
        has_images = bool(lengths.rows["num_images"][indices].any())
        load_image: Callable[[Image], torch.Tensor] = transform.levels
        blank = torch.zeros((3, transform.image_size, transform.image_size), dtype=torch.uint8)
        if settings.feature_cache and has_images:
            load_image = _open_feature_cache(
                config, source, indices, transform, feature_shape, tower_key, compute_features, ranks
            )
        features = not has_images or bool(settings.feature_cache)
        if features:
            blank = torch.zeros(feature_shape)
        dataset = LlavaDataset(source, text, load_image, blank, settings.on_bad_sample == "skip")
        return build_loader(dataset, Collator(packing, blank, features), plans, ranks.rank, settings.num_workers)

    loader = build_stream(
        plan.source, plan.lengths, _all_indices(plan.parts), lambda: plan.steps(start, num_done)
    )
    data = TrainingData(loader, plan, plan.lengths.skipped())
    held_out = plan_held_out(config, plan, text, ranks)
    if held_out is None:
        return data
    steps = held_out.steps
    eval_loader = build_stream(held_out.source, held_out.lengths, held_out.indices, lambda: iter(steps))
    return replace(data, eval=EvalData(eval_loader, held_out))


def plan_data(config: RunConfig, packing: str, text: TextPipeline, ranks: Ranks) -> DataPlan:
    """Opens and measures every source and plans the run; what ``eval`` holds out of it is left out."""
    settings, train = config.data, config.train
    entries = settings.sources()
    source, tables, digest = _open_and_measure(entries, settings, text, ranks)
    lengths = join_lengths(tables)
    good = [start + table.good() for start, table in zip(source.starts[:-1], tables, strict=True)]
    held_out = _hold_out(lengths, np.concatenate(good), config)
    if len(held_out):
        digest.update(held_out.data)
    short_digest = digest.hexdigest()[:16]
    check_agreement(ranks, "the records and what is good of them", short_digest)
    parts = tuple(
        Part(np.setdiff1d(indices, held_out, assume_unique=True), entry.weight)
        for indices, entry in zip(good, entries, strict=True)
    )
    if sum(len(part.indices) * part.weight for part in parts) < 1 <= sum(len(part.indices) for part in parts):
        raise ConfigError(
            f"the weights of data.mixture, {[part.weight for part in parts]}, take less than one sample an epoch of "
            f"{[len(part.indices) for part in parts]}; raise them"
        )
    if not any(len(part.indices) for part in parts):
        skipped = lengths.skipped()
        raise DataError(f"no sample is left to train on; {sum(skipped.values())} were skipped: {dict(skipped)}")
    _check_budget(config, lengths, _all_indices(parts))
    batch = BatchSizes(
        train.global_batch_size, train.micro_batch_size, ranks.world_size, cast(Packing, packing),
        train.micro_batch_tokens,
    )
    num_steps = _num_steps(parts, train.epochs, train.global_batch_size)
    return DataPlan(
        source, lengths, parts, config.seed, batch, settings.length_groups,
        min(num_steps, train.max_steps or num_steps), short_digest, held_out,
    )


def plan_held_out(config: RunConfig, plan: DataPlan, text: TextPipeline, ranks: Ranks) -> EvalPlan | None:
    """The plan of an evaluation, of samples that the run's plan holds out or of data of their own; None without one.

    Raises DataError when they are bad or none is good, ConfigError when one is too long for a micro-batch.
    """
    if config.eval is None:
        return None
    source, lengths, indices = plan.source, plan.lengths, plan.held_out
    entry = config.eval.source()
    if entry is not None:
        source, tables, digest = _open_and_measure([entry], config.data, text, ranks)
        check_agreement(ranks, "the records of eval.path and what is good of them", digest.hexdigest()[:16])
        lengths, indices = tables[0], tables[0].good()
        if not len(indices):
            raise DataError(f"eval.path={entry.path} has no good sample; skipped: {dict(lengths.skipped())}")
    _check_budget(config, lengths, indices)
    return plan_eval(source, lengths, indices, config.seed, plan.batch, config.eval.max_samples)


def _open_and_measure(
    entries: Sequence[SourceConfig], settings: DataConfig, text: TextPipeline, ranks: Ranks
) -> tuple[JoinedSources, list[LengthTable], Any]:
    """Sources, their lengths and a digest of these; rank 0 first, the others find what it kept."""

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
    return source, tables, digest


def _hold_out(lengths: LengthTable, good: np.ndarray, config: RunConfig) -> np.ndarray:
    """[n] the numbers of good records that are not trained on."""
    return good[hold_out(lengths.rows["key"][good], config.seed, config.eval)]


def _check_budget(config: RunConfig, lengths: LengthTable, indices: np.ndarray) -> None:
    longest, budget = int(lengths.rows["num_tokens"][indices].max()), config.train.micro_batch_tokens
    if budget is not None and longest > budget:
        raise ConfigError(
            f"train.micro_batch_tokens={budget}, but a sample has {longest} tokens.\n  Raise it, or lower "
            f"data.max_length={config.data.max_length}, so that samples are cut."
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
    source: Source,
    indices: np.ndarray,
    transform: ImageTransform,
    feature_shape: tuple[int, int],
    tower_key: str,
    compute_features: Callable[[torch.Tensor], torch.Tensor],
    ranks: Ranks,
) -> Callable[[Image], torch.Tensor]:
    images: set[Image] = {image for i in indices.tolist() for image in source[i].images}
    if any(isinstance(image, StoredImage) for image in images):
        raise ConfigError(
            "data.feature_cache needs pictures that are files, and some of the data are stored in shards or tables; "
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
