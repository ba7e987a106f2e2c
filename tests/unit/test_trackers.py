"""The numbers of a step reach the file, TensorBoard and Weights & Biases (offline)."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_ds.errors import BackendUnavailableError
from llava_ds.metrics import plots, trackers

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


EVALUATED = {
    "eval_loss": 2.0, "eval_token_accuracy": 0.25, "eval_teacher_forced_exact": None, "eval_num_samples": 7,
    "eval_s": 1.5,
}
STEP = {"loss": 2.5, "lr": 1e-3, "samples_per_s": 9.0, "tokens_per_s": 90.0, "data_wait_frac": 0.1}


def test_an_evaluation_is_shown_kept_and_drawn(tmp_path, capsys):
    records = [{"step": 0, **EVALUATED}, {"step": 1, **STEP}, {"step": 2, **STEP, **EVALUATED}, {"step": 3, **STEP}]
    bar = trackers.ProgressBar(3, "tiny")
    for record in records:
        bar.log(record)
    bar.close()
    printed = capsys.readouterr().out
    line = "evaluation after step {}: loss 2.0000 token_accuracy 0.2500 teacher_forced_exact none (7 samples in 1.5 s)"
    assert [line.format(step) in printed for step in range(4)] == [True, False, True, False]
    assert "3/3" in printed
    jsonl = trackers.JsonlTracker(tmp_path / "metrics.jsonl")
    for record in records:
        jsonl.log(record)
    jsonl.close()
    trackers.JsonlTracker(tmp_path / "metrics.jsonl", num_done=2).close()
    kept = trackers.read_metrics(tmp_path / "metrics.jsonl")
    assert [(one["step"], one.get("eval_loss")) for one in kept] == [(0, 2.0), (1, None), (2, 2.0)]
    assert "has no lines" not in capsys.readouterr().out
    trackers.JsonlTracker(tmp_path / "metrics.jsonl").close()  # from its beginning: step 0 is evaluated again
    assert trackers.read_metrics(tmp_path / "metrics.jsonl") == []
    for name, drawn in (("with", kept), ("without", [{"step": 1, **STEP}, {"step": 2, **STEP}])):
        plots.plot_loss({"tiny": drawn}, tmp_path / f"{name}.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


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
