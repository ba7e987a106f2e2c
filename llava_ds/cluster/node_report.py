"""What one node has and sees: code, packages, the recipe's paths, free disk, GPUs. Plain data, in seconds."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

import llava_ds
from llava_ds.cache import cache_folder
from llava_ds.cluster.node_paths import Need, PathReport, list_needs, look_at_path
from llava_ds.cluster.node_places import Place, list_places, look_at_place
from llava_ds.config import RunConfig, resolve_prepared
from llava_ds.constants import COMPLETE_MARKER

_PACKAGES = ("llava_ds", "torch", "deepspeed", "transformers", "open_clip_torch", "numpy")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")

Note = Callable[[str], None]


@dataclass(frozen=True)
class NodeReport:
    """One node. ``error`` says why nothing else is known of it."""

    node: str
    """The name that Slurm knows it by, else its host name."""
    error: str = ""
    host: str = field(default_factory=socket.gethostname)
    versions: dict[str, str] = field(default_factory=dict)
    """By package; ``missing`` where it is not installed. ``nccl`` and ``cuda_driver`` only where there is a GPU."""
    code_hash: str = ""
    recipe_hash: str = ""
    num_workers: int = 0
    """Of the data loader, which need ``/dev/shm``."""
    paths: dict[str, PathReport] = field(default_factory=dict)
    """By setting."""
    places: dict[str, Place] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    cuda_visible_devices: str | None = None
    num_cpus: int = 0
    """That this process may use."""
    notes: list[str] = field(default_factory=list)
    """What was not looked at, and why."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> NodeReport:
        """The inverse of ``as_dict``."""
        paths = {setting: PathReport(**path) for setting, path in raw["paths"].items()}
        places = {name: Place(**place) for name, place in raw["places"].items()}
        return cls(**{**raw, "paths": paths, "places": places})


def node_name() -> str:
    """How this node is called: by Slurm, which may differ from its host name, else by itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look_at_node(config: RunConfig, run_dir: Path, node: str, note: Note = lambda what: None) -> NodeReport:
    """What this node has and sees. ``note`` is told what is looked at next: a dead network disk answers never."""
    recipe_hash = xxhash.xxh3_128_hexdigest(config.model_dump_json().encode())
    config, remarks = resolve_if_prepared(config)
    needs, notes = list_needs(config)
    note("the GPUs")
    gpus, gpu_versions = _look_at_gpus()
    note("the package's own files")
    code_hash = hash_sources(Path(llava_ds.__file__).parent)
    return NodeReport(
        node=node,
        versions=_package_versions() | gpu_versions,
        code_hash=code_hash,
        recipe_hash=recipe_hash,
        num_workers=config.data.num_workers,
        paths={need.setting: _look(need, note) for need in needs},
        places={name: _look_at_place(name, path, note) for name, path in list_places(run_dir).items()},
        gpus=gpus,
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        num_cpus=len(os.sched_getaffinity(0)),
        notes=remarks + notes,
    )


def _look(need: Need, note: Note) -> PathReport:
    note(f"{need.setting}={need.path}")
    return look_at_path(need)


def _look_at_place(name: str, path: Path, note: Note) -> Place:
    note(f"{name} {path}")
    return look_at_place(path, may_be_made=name != "shm")


def resolve_if_prepared(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The config with ``{prepared}`` filled in where it is certain which folder that is; prepares nothing.

    Which of several folders a run takes depends on packages that are slow to ask, so then all are left out.
    """
    if config.prepare is None:
        return config, []
    found = sorted(cache_folder().glob(f"{config.prepare}-*/{COMPLETE_MARKER}"))
    if len(found) == 1:
        return resolve_prepared(config, found[0].parent), []
    return config, [f"{len(found)} prepared folders {config.prepare}-* in {cache_folder()}, so none was looked at"]


def hash_sources(package: Path) -> str:
    """xxh128 of the package's own code, its recipes and, where it runs from a checkout, ``ds_configs/``."""
    found = [file for suffix in ("py", "cu") for file in package.rglob(f"*.{suffix}")]
    found += [*(package / "recipes").rglob("*.yaml"), *(package.parent / "ds_configs").glob("*.json")]
    named = {str(file.relative_to(package.parent)): file for file in found}
    digests = {name: xxhash.xxh3_128_hexdigest(file.read_bytes()) for name, file in named.items()}
    return xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode())


def _package_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _look_at_gpus() -> tuple[list[str], dict[str, str]]:
    """Names of the GPUs that PyTorch sees, and versions of what drives them."""
    import torch  # the longest part of starting

    if not torch.cuda.is_available():
        return [], {}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = {"cuda_driver": _driver_version()}
    if torch.distributed.is_nccl_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return gpus, versions


def _driver_version() -> str:
    """Of the NVIDIA driver that the kernel runs, e.g. 550.54.15."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _DRIVER_FILE.read_text() if _DRIVER_FILE.is_file() else "")
    return found.group() if found else "unknown"
