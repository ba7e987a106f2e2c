"""tools/preflight with a fault: ``look`` (a disk never answers) or ``links`` (a node never joins the others)."""

import os
import runpy
import sys
import time
from pathlib import Path

from llava_ds.cluster import preflight


def _look_for_ever(config, run_dir, node, note):
    note("data.path=/mnt/dead")
    time.sleep(1000)


def _wait_for_ever(ranks, store, limit_s, note):
    note("starting the device")
    time.sleep(1000)


if os.environ["FAULT"] == "look":
    preflight.look_at_node = _look_for_ever
if os.environ["FAULT"] == "links":
    preflight.measure_links = _wait_for_ever
sys.argv[0] = str(Path(__file__).parents[2] / "tools" / "preflight")
runpy.run_path(sys.argv[0], run_name="__main__")
