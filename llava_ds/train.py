"""Trains a LLaVA: ``deepspeed llava_ds/train.py --deepspeed ds_configs/zero3.json [--recipe NAME|FILE]``.

Starts under ``deepspeed``, ``torchrun``, plain ``srun`` and as a single process.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import click

from llava_ds.config import RunConfig, load_recipe, resolve_micro_batch, resolve_prepared
from llava_ds.distributed import (
    Ranks,
    apply_launcher_environment,
    flush_and_exit,
    run_on_main_alone,
    run_on_main_first,
    select_device,
)
from llava_ds.engine.preemption import EXIT_STOPPED, StopNotice, StopRequested
from llava_ds.engine.start_report import StartReport
from llava_ds.errors import BackendUnavailableError, CheckpointError, ConfigError, DataError
from llava_ds.preparations import prepare_named
from llava_ds.starts import End


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--deepspeed", "ds_json", required=True, type=Path, help="DeepSpeed JSON, see ds_configs/.")
@click.option("--recipe", default="quickstart_stage1", show_default=True, help="Shipped recipe, or a YAML file.")
@click.option("--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Overrides a value of the recipe.")
@click.option("--run-dir", type=Path, help="Where the run is written [default: runs/<recipe name>].")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="last",
    metavar="[STEP]",
    help="Goes on from the last good checkpoint in --run-dir, or from STEP; starts the run where there is none.",
)
@click.option("--local_rank", type=int, hidden=True, help="Set by the deepspeed launcher.")
def main(
    ds_json: Path,
    recipe: str,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    resume: str | None,
    local_rank: int | None,
) -> None:
    """Trains one recipe: builds data, model and engine, runs the loop, writes the checkpoint."""
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    code, ranks, notice, report = 1, None, StopNotice(), StartReport()
    notice.install()
    try:
        ranks = apply_launcher_environment(os.environ)
        config = load_recipe(recipe, overrides)
        run(config, ds_json, run_dir or Path("runs") / config.name, resume, ranks, notice, report)
        code = 0
    except StopRequested as stop:
        code = EXIT_STOPPED
        if ranks and ranks.is_main:
            print(f"\n{stop}")
    except (ConfigError, DataError, CheckpointError, BackendUnavailableError) as error:
        # Settings are the same on every rank: one of each machine says what is wrong with them.
        same_everywhere = isinstance(error, ConfigError) or getattr(error, "on_every_rank", False)
        if ranks is None or ranks.local_rank == 0 or not same_everywhere:
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
            report.failed(ranks or Ranks(0, 0, 1), error)
    except Exception as error:
        # The process ends below without Python's own report.
        traceback.print_exc()
        report.failed(ranks or Ranks(0, 0, 1), error)
    flush_and_exit(code)


def run(
    config: RunConfig,
    ds_json: Path,
    run_dir: Path,
    resume: str | None,
    ranks: Ranks,
    notice: StopNotice | None = None,
    report: StartReport | None = None,
) -> None:
    """The whole run of one rank. ``notice`` hears of signals, ``report`` keeps how this start ends."""
    # These take seconds to import: a wrong option is reported before.
    from llava_ds.data.build import build_training_data
    from llava_ds.data.images import ImageTransform
    from llava_ds.engine import deepspeed_backend as backend
    from llava_ds.engine.ds_config import fill_bucket_sizes, read_ds_config, resolve_ds_config
    from llava_ds.engine.inputs import check_inputs
    from llava_ds.engine.loop import LoopSettings, train
    from llava_ds.engine.optim import build_optimizer, build_scheduler
    from llava_ds.engine.resume import restore_training, resume_point
    from llava_ds.engine.run_record import check_run_dir, finish_run, start_run
    from llava_ds.engine.setup import (
        build_evaluator,
        build_guard,
        build_saver,
        build_trackers,
        load_weights,
        resolve_backends,
    )
    from llava_ds.engine.training_state import Progress
    from llava_ds.metrics.trackers import check_trackers
    from llava_ds.models.build import DTYPES, build_model, llm_hidden_size, load_tokenizer
    from llava_ds.models.freezing import apply_freezing

    started = time.time()
    notice, report = notice or StopNotice(), report or StartReport({})
    config = config.model_copy(update={"train": resolve_micro_batch(config.train, ranks.world_size)})
    ds_config = resolve_ds_config(read_ds_config(ds_json), config.train, ranks.world_size, str(ds_json))
    check_run_dir(run_dir, ranks)
    check_trackers(config.track)
    device = select_device(ranks)
    backend.init_distributed(device)
    if config.prepare:
        config = resolve_prepared(config, run_on_main_first(ranks, partial(_prepare, config.prepare, ranks)))
    check_inputs(config)
    backends = resolve_backends(config, device, ranks)
    point = resume_point(run_dir, resume, config, backends["packing"].name, ranks)
    progress = point.progress if point else Progress()
    fill_bucket_sizes(ds_config, llm_hidden_size(config.model.llm))

    partitioned = backend.hold_partitioned_construction(ds_config)  # alive until the run ends
    tokenizer = load_tokenizer(config.model.llm)
    dtype, fused = DTYPES[config.train.precision], backends["splice"].name == "fused"
    model = build_model(config.model, backends["attention"].name, dtype, config.seed, fused)
    initial_weights = load_weights(model, config.model.init_from, run_dir, point, ranks)
    apply_freezing(model, config.train.trainable)
    model.vision_tower.to(device)

    data = build_training_data(
        config,
        backends["packing"].name,
        tokenizer,
        ImageTransform.for_tower(model.vision_tower.spec, config.data.image_aspect_ratio),
        (model.vision_tower.spec.num_patches, model.vision_tower.spec.width),
        model.vision_tower.key(),
        lambda pixels: model.vision_tower(pixels.to(device)),
        ranks,
        progress.data_state,
        progress.step,
    )
    optimizer = build_optimizer(model, config.train)
    scheduler = build_scheduler(optimizer, config.train, data.plan.num_steps)
    engine = backend.initialize_engine(model, optimizer, scheduler, ds_config)
    if point:
        restore_training(engine, point, data.plan.digest)

    start = partial(start_run, run_dir, config, ds_config, model, backends, initial_weights, data, ranks, point,
                    keep=resume is not None)
    lock = run_on_main_alone(ranks, start)
    report.open(run_dir, ranks)
    settings = LoopSettings(
        ranks, data.plan.batch.grad_accum_steps, config.train.loss_averaging, config.train.save_steps,
        device, config.seed, config.data.max_bad_frac,
    )
    saver = build_saver(engine, run_dir, config.train, ranks, data.plan.digest, progress, lock)
    trackers = build_trackers(run_dir, data.plan.num_steps, config, ranks, progress.step)
    plans = data.plan.steps(progress.data_state, progress.step)
    evaluate = build_evaluator(config, data, settings)
    guard = build_guard(config, device, ranks, notice, report, lambda index: data.plan.source[index].id)
    try:
        train(engine, data.loader, plans, data.plan.supervised_tokens, settings, trackers, saver, progress, guard,
              evaluate)
    except StopRequested as stop:
        report.ended(ranks, End("stopped", str(stop), stop.step))
        raise
    finally:
        report.step = progress.step
        guard.stop()
        for tracker in trackers:
            tracker.close()
    finish_run(run_dir, config, progress, time.time() - started, ranks)
    report.ended(ranks, End("finished", step=progress.step))
    del partitioned, lock


def _prepare(name: str, ranks: Ranks) -> Path:
    return prepare_named(name, log=print if ranks.is_main else _silent)


def _silent(*_: Any) -> None:
    """Ranks other than 0 find everything prepared, and say nothing."""


if __name__ == "__main__":
    main()
