"""From the data settings of a recipe to the batches of a rank."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_ds.config import RunConfig
from llava_ds.data.collator import Collator
from llava_ds.data.dataset import (
    EncodedLengths,
    LlavaDataset,
    TextPipeline,
    check_images_exist,
    drop_unreadable_images,
    measure_samples,
)
from llava_ds.data.feature_cache import open_feature_cache
from llava_ds.data.images import ImageTransform
from llava_ds.data.llava_json import read_llava_json
from llava_ds.data.loader import BatchStream, build_loader
from llava_ds.data.sampler import BatchSizes, StepPlan, plan_run, steps_per_epoch
from llava_ds.distributed import Ranks, run_on_main_first
from llava_ds.schema import Sample


@dataclass(frozen=True)
class TrainingData:
    """Everything that the loop asks of the data."""

    loader: BatchStream
    lengths: EncodedLengths
    seed: int
    num_steps: int
    batch: BatchSizes
    skipped: Counter[str]

    def plans(self) -> Iterator[StepPlan]:
        """The plan of every step."""
        return plan_run(self.lengths.num_tokens, self.seed, self.num_steps, self.batch)

    def supervised_tokens(self, plan: StepPlan) -> int:
        """Supervised tokens of a step, over all ranks and micro-batches."""
        return sum(self.lengths.num_supervised[slot.index] for slot in plan.slots)


def build_training_data(
    config: RunConfig,
    packing: str,
    tokenizer: Any,
    transform: ImageTransform,
    feature_shape: tuple[int, int],
    tower_key: str,
    compute_features: Callable[[torch.Tensor], torch.Tensor],
    ranks: Ranks,
) -> TrainingData:
    """Reads, checks and measures the data, plans the run, and builds this rank's loader.

    Args:
        packing: ``packed`` or ``padded``, resolved.
        feature_shape: (P, C) of the tower.
        tower_key: names the tower's weights and the transform, for the feature cache.
        compute_features: [I, 3, H, W] -> [I, P, C], by the frozen tower.

    Raises:
        DataError: a bad or missing file, record or image, unless ``data.on_bad_sample`` is ``skip``.
    """
    samples, skipped = read_llava_json(Path(config.data.path), config.data.on_bad_sample)
    root = Path(config.data.image_root or Path(config.data.path).parent).absolute()  # a cache may outlive this cwd
    text = TextPipeline(
        tokenizer, config.data.template, config.data.placement, feature_shape[0], config.data.max_length, config.seed
    )
    if config.data.on_bad_sample == "skip":
        samples, unreadable = drop_unreadable_images(samples, root)
        skipped += unreadable
    else:
        check_images_exist(samples, root)
    samples, lengths, skipped = measure_samples(samples, text, config.data.on_bad_sample, skipped)

    train = config.train
    sizes = BatchSizes(train.global_batch_size, train.micro_batch_size, ranks.world_size)
    num_steps = max(1, round(train.epochs * steps_per_epoch(len(samples), train.global_batch_size)))
    num_steps = min(num_steps, train.max_steps or num_steps)

    has_images = any(sample.images for sample in samples)
    load_image: Callable[[Path], torch.Tensor] = transform
    dummy = torch.zeros(3, transform.image_size, transform.image_size)
    if config.data.feature_cache and has_images:
        load_image = _open_feature_cache(
            config, samples, root, transform, feature_shape, tower_key, compute_features, ranks
        )
    features = not has_images or bool(config.data.feature_cache)
    if features:
        dummy = torch.zeros(feature_shape)
    loader = build_loader(
        LlavaDataset(samples, text, root, load_image),
        Collator(packing, dummy, features),
        lengths.num_tokens,
        config.seed,
        num_steps,
        sizes,
        ranks.rank,
        config.data.num_workers,
    )
    return TrainingData(loader, lengths, config.seed, num_steps, sizes, skipped)


def _open_feature_cache(
    config: RunConfig,
    samples: Sequence[Sample],
    root: Path,
    transform: ImageTransform,
    feature_shape: tuple[int, int],
    tower_key: str,
    compute_features: Callable[[torch.Tensor], torch.Tensor],
    ranks: Ranks,
) -> Callable[[Path], torch.Tensor]:
    images = sorted({root / name for sample in samples for name in sample.images})
    key = hashlib.sha256(f"{tower_key}|{config.train.precision}|{transform}".encode()).hexdigest()[:16]
    folder = Path(str(config.data.feature_cache)) / key

    def compute(files: Sequence[Path]) -> torch.Tensor:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the other ranks wait
        try:
            return compute_features(torch.stack([transform(file) for file in files]))
        finally:
            torch.set_num_threads(num_threads)

    log = print if ranks.is_main else _silent
    return run_on_main_first(ranks, lambda: open_feature_cache(folder, images, feature_shape, compute, log=log))


def _silent(_: str) -> None:
    """Ranks other than 0 find the cache filled, and say nothing."""
