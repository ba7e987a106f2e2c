"""The numbers of a step reach the file, TensorBoard and Weights & Biases (offline)."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_ds.errors import BackendUnavailableError
from llava_ds.metrics import trackers

RECORDS = [{"step": 1, "loss": 2.5, "grad_norm": None}, {"step": 2, "loss": 1.25, "grad_norm": 0.5}]


def _log(tracker) -> None:
    for record in RECORDS:
        tracker.log(record)
    tracker.close()


def test_jsonl(tmp_path):
    _log(trackers.JsonlTracker(tmp_path / "metrics.jsonl"))
    read = trackers.read_metrics(tmp_path / "metrics.jsonl")
    assert [{key: line[key] for key in RECORDS[0]} for line in read] == RECORDS


def test_tensorboard(tmp_path):
    _log(trackers.TensorBoardTracker(tmp_path, "tiny"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("grad_norm")] == [(2, 0.5)]


def test_a_resumed_run_takes_the_place_of_what_was_logged_after_its_checkpoint(tmp_path):
    _log(trackers.TensorBoardTracker(tmp_path, "tiny"))
    again = trackers.TensorBoardTracker(tmp_path, "tiny", num_done=1)
    again.log({"step": 2, "loss": 0.75})
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 0.75)]


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _log(trackers.WandbTracker(tmp_path, "tiny"))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    written = file.read_bytes()
    assert all(text in written for text in (b"tiny", b"loss", b"2.5", b"1.25"))
    run_id = (tmp_path / "wandb_id").read_text()
    _log(trackers.WandbTracker(tmp_path, "tiny", num_done=1))
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert (len(files), {file.stem for file in files}) == (2, {f"run-{run_id}"})


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    trackers.check_trackers(["tensorboard", "wandb"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(BackendUnavailableError, match="wandb is not installed"):
        trackers.check_trackers(["tensorboard", "wandb"])
