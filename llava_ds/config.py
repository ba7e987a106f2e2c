"""Recipes: strict settings from YAML, with ``--set key.path=value`` overrides.

An unknown key is an error that names the nearest known one. The DeepSpeed JSON owns ZeRO, offload and
communication; the recipe owns batch sizes, learning rate, clipping and precision (engine/ds_config.py joins them).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llava_ds.errors import ConfigError

RECIPE_FOLDER = Path(str(resources.files("llava_ds") / "recipes"))
PREPARED = "{prepared}"
Beta = Annotated[float, Field(ge=0, lt=1)]
_Model = TypeVar("_Model", bound=BaseModel)


class Strict(BaseModel):
    """Settings: an unknown key, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(Strict):
    """Which parts the model is made of."""

    vision_tower: str
    """Name of an open_clip model, or a folder with ``tower_config.json``."""
    vision_pretrained: str | None = None
    """open_clip's tag or file of the tower's weights, which an open_clip name needs; None for a folder."""
    llm: str
    """Name or folder of a transformers causal LM."""
    llm_init: Literal["pretrained", "random"] = "pretrained"
    projector: Literal["linear", "mlp2x_gelu"]
    """``linear`` is the paper's W; ``mlp2x_gelu`` is LLaVA-1.5's."""
    select_layer: int = Field(-2, le=-1)
    """Whose output are the patch features: -2 is the block before the last."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    splice: Literal["auto", "fused", "library"] = "auto"
    """What projects patches into their rows: ``fused`` is the CUDA kernel, ``library`` is cuBLAS and index operations.
    ``auto`` takes the one that should be faster and works (see ``resolve_splice``)."""
    gradient_checkpointing: bool = False
    init_from: str | None = None
    """What the projector (and the LLM, where it is there) are loaded from: a run folder or checkpoint step, a merged or
    llava-hf folder, a folder of the original code, or an mm_projector.bin."""
    zero_features: bool = False
    """Blind runs: the patch features are zeros."""


class SourceConfig(Strict):
    """Where records come from."""

    path: str
    """File, folder, or URL of shards."""
    format: str = "auto"
    """``auto`` looks at the path; else llava_json, llava_jsonl, captions, scienceqa, hf_dataset or shards."""
    image_root: str | None = None
    """Where relative image paths start; None is the folder of the data."""
    split: str | None = None
    """Of ScienceQA (None is train) and of Hugging Face data sets."""
    prompt_format: str = "QCM-LEA"
    """Of ScienceQA: what is asked and what is answered."""
    weight: float = Field(1.0, gt=0)
    """How often a mixture visits each record in an epoch: 0.5 is every other epoch, 2 twice."""


_SOURCE_ALONE = {"format": "auto", "image_root": None, "split": None, "prompt_format": "QCM-LEA"}
"""What says how one path is read, with the values that say nothing."""


class DataConfig(Strict):
    """What is read, and how it becomes batches."""

    path: str | None = None
    """One source: with format, image_root, split and prompt_format as in ``SourceConfig``. Or give ``mixture``."""
    format: str = "auto"
    image_root: str | None = None
    split: str | None = None
    prompt_format: str = "QCM-LEA"
    mixture: list[SourceConfig] = Field(default_factory=list)
    """Several sources, by weight."""
    template: str
    placement: Literal["random", "as_data", "front"]
    max_length: int = Field(2048, ge=2)
    """Tokens of a sample at most, image patches counted."""
    truncation: Literal["error", "drop_sample", "drop_last_turns", "official", "none"] = "drop_last_turns"
    """What becomes of a longer sample (see docs/data.md); whatever is left out is counted."""
    image_aspect_ratio: Literal["square", "pad"] = "square"
    num_workers: int = Field(4, ge=0)
    feature_cache: str | None = None
    """Folder of a cache of the frozen tower's features; None computes them every time."""
    on_bad_sample: Literal["error", "skip"] = "error"
    max_bad_frac: float = Field(0.01, ge=0, le=1)
    """With ``skip``: the run ends when more than this share of the samples seen had a picture that did not decode."""
    length_groups: int = Field(1, ge=1)
    """Global batches that are sorted by length together before they are cut into steps; 1 is a plain shuffle."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """``auto``: packed where flash attention runs, padded elsewhere (see ``resolve_packing``)."""

    @model_validator(mode="after")
    def _one_way_to_name_sources(self) -> DataConfig:
        if (self.path is None) == (not self.mixture):
            raise ValueError("give either data.path or data.mixture (a list of sources)")
        misplaced = [
            f"data.{key}" for key, value in _SOURCE_ALONE.items() if self.mixture and getattr(self, key) != value
        ]
        if misplaced:
            raise ValueError(f"{', '.join(misplaced)} belongs to data.path; give it in each source of data.mixture")
        return self

    def sources(self) -> list[SourceConfig]:
        """The sources, one or many."""
        if self.path is None:
            return self.mixture
        return [
            SourceConfig(
                path=self.path, format=self.format, image_root=self.image_root, split=self.split,
                prompt_format=self.prompt_format, weight=1.0,
            )
        ]


class TrainConfig(Strict):
    """What trains, for how long, and how fast."""

    trainable: list[Literal["projector", "llm"]] = Field(min_length=1)
    epochs: float = Field(1, gt=0, le=100_000)
    max_steps: int | None = Field(None, ge=1)
    global_batch_size: int = Field(ge=1)
    """Samples of one optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = Field(ge=1)
    """Samples of one forward pass of one rank. Where that is more than a rank's share of global_batch_size, the share
    is taken instead: one recipe fits few ranks and many (see ``resolve_micro_batch``)."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Token positions of one forward pass of one rank at most. A step whose samples do not fit is split into more
    micro-batches; the global batch stays."""
    learning_rate: float = Field(gt=0)
    projector_learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    adam_eps: float = Field(1e-8, gt=0)
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loss_averaging: Literal["global_tokens", "per_micro_batch"] = "global_tokens"
    save_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; None saves at the end only (and before step 1, see ``trial_save``)."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints that stay; with two, a damaged one has another before it."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints of steps that are a multiple of this stay as well."""
    trial_save: bool = True
    """Saves before step 1 and tries the export, all but its weights: what would fail at the end fails then."""
    save_in_background: bool = True
    """Training goes on while files are written; costs host memory for a copy of a rank's part."""
    hang_timeout_s: float | None = Field(900.0, gt=0)
    """Seconds without progress on any rank after which the run ends, and says which rank the others wait for; at least
    twice the longest step or checkpoint. None does not watch."""


class EvalConfig(Strict):
    """Held-out samples, and how often training is measured on them."""

    steps: int = Field(ge=1)
    """Steps between evaluations; there is always one before step 1 and one at the end."""
    path: str | None = None
    """Data of their own: with format, image_root, split and prompt_format as in ``SourceConfig``. Or give
    ``holdout_frac`` or ``holdout_samples``."""
    format: str = "auto"
    image_root: str | None = None
    split: str | None = None
    prompt_format: str = "QCM-LEA"
    holdout_frac: float | None = Field(None, gt=0, lt=1)
    """This share of the training data is not trained on. What is held out depends on (seed, id) of a sample alone."""
    holdout_samples: int | None = Field(None, ge=1)
    """So many samples of the training data are not trained on; more only where an id stands several times."""
    max_samples: int | None = Field(None, ge=1)
    """So many of these samples are evaluated at most; which ones depends on (seed, id) alone. None takes all."""

    @model_validator(mode="after")
    def _one_way_to_name_samples(self) -> EvalConfig:
        ways = ("path", "holdout_frac", "holdout_samples")
        given = [f"eval.{name}" for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(f'eval.{name}' for name in ways)}; got {given}")
        misplaced = [f"eval.{key}" for key in _SOURCE_ALONE if getattr(self, key) != _SOURCE_ALONE[key]]
        if self.path is None and misplaced:
            raise ValueError(f"{', '.join(misplaced)} belongs to eval.path; data that is held out is read as data says")
        return self

    def source(self) -> SourceConfig | None:
        """The data of their own; None where they are held out of the training data."""
        if self.path is None:
            return None
        return SourceConfig(
            path=self.path, format=self.format, image_root=self.image_root, split=self.split,
            prompt_format=self.prompt_format, weight=1.0,
        )


class RunConfig(Strict):
    """One run, as a recipe file states it."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")
    """Also names the default run folder, so it cannot be ``.`` or ``..``."""
    seed: int = Field(0, ge=0)
    prepare: Literal["quickstart", "quickstart_scienceqa"] | None = None
    """Data and models that are built first; ``{prepared}`` in a string stands for their folder."""
    next_command: str | None = None
    """Printed at the end of the run; ``{run_dir}`` stands for its folder, quoted for the shell."""
    track: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where the numbers go besides the terminal and metrics.jsonl (the extra llava_ds[track])."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig | None = None
    """Evaluation during training; None does none."""

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size={self.train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size={self.train.micro_batch_size}; change one of them"
            )
        if len(set(self.train.trainable)) != len(self.train.trainable):
            raise ValueError(f"train.trainable={self.train.trainable} names a part twice; name each once")
        return self

    def named_sources(self) -> list[tuple[str, SourceConfig]]:
        """All data that are read, each with its group: those of training, then those of evaluation alone."""
        held_out = self.eval and self.eval.source()
        return [*(("data", source) for source in self.data.sources()), *([("eval", held_out)] if held_out else [])]


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(str(p.relative_to(RECIPE_FOLDER).with_suffix("")) for p in RECIPE_FOLDER.rglob("*.yaml"))


def find_recipe(name_or_file: str) -> Path:
    """The file of a shipped recipe or of a path. Raises ConfigError with the nearest names."""
    shipped = RECIPE_FOLDER / f"{name_or_file}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(name_or_file)
    if path.is_file():
        return path
    known = list_recipes()
    near = difflib.get_close_matches(name_or_file, known, n=3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(
        f"unknown recipe {name_or_file!r}: neither a shipped recipe nor a file.\n"
        f"  {hint}Shipped recipes: {', '.join(known)}"
    )


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe and applies ``key.path=value`` overrides (values are YAML).

    Raises ConfigError that lists every wrong key and value at once.
    """
    path = find_recipe(name_or_file)
    raw = read_yaml_mapping(path)
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, where=str(path))


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError with the file and the place."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}\n  Fix the file at the place shown.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: {error}\n  Give a YAML file.") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: holds a {type(raw).__name__}, not a mapping.\n  See docs/training.md for a recipe."
        )
    return raw


def parse_config(raw: dict[str, Any], where: str) -> RunConfig:
    """A checked config from plain data; ``where`` is named in errors."""
    return parse_strict(RunConfig, raw, where, "recipe")


def parse_strict(model: type[_Model], raw: Any, where: str, name: str) -> _Model:
    """Checked settings from plain data; errors name ``where``, and settings as a whole by ``name``.

    Raises ConfigError that lists every wrong key and value at once.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_describe(problem, model, name) for problem in error.errors()]
        raise ConfigError(f"{where}: {len(lines)} problem(s):\n" + "\n".join(f"  {line}" for line in lines)) from error


def resolve_prepared(config: RunConfig, prepared: Path) -> RunConfig:
    """The config with ``{prepared}`` replaced by the folder of the prepared data."""

    def substitute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: substitute(item) for key, item in value.items()}
        if isinstance(value, list):
            return [substitute(item) for item in value]
        return value.replace(PREPARED, str(prepared)) if isinstance(value, str) else value

    return RunConfig.model_validate(substitute(config.model_dump()))


def resolve_micro_batch(train: TrainConfig, world_size: int) -> TrainConfig:
    """The settings with the micro-batch that a rank takes: the recipe's, or its share of a step where that is less.

    Raises ConfigError when the ranks do not divide the global batch.
    """
    total, micro = train.global_batch_size, train.micro_batch_size
    if total % (micro * world_size) == 0:
        return train
    share, rest = divmod(total, world_size)
    if rest == 0 and share < micro:
        return train.model_copy(update={"micro_batch_size": share})
    sizes = [n for n in range(1, share + 1) if rest == 0 and share % n == 0]
    counts = [n for n in range(1, total + 1) if total % n == 0 and (total // n % micro == 0 or total // n < micro)]
    advice = [f"set train.micro_batch_size to one of {sizes}"] if sizes else []
    advice.append(f"start one of {counts} rank(s)")
    raise ConfigError(
        f"train.global_batch_size={total} is not a multiple of train.micro_batch_size={micro} times "
        f"{world_size} rank(s).\n  To fix it, {', or '.join(advice)}."
    )


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} is not of the form key.path=value; e.g. --set train.max_steps=10")
    *parents, last = key.split(".")
    node = raw
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            known = ", ".join(_known_keys(parents[:depth]))
            raise ConfigError(f"--set {key}: {parent!r} holds a value, not a group; known keys: {known}")
    try:
        # YAML 1.1 reads 1e-3 (no dot) as text; pydantic makes it the number where a number belongs.
        node[last] = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is not a YAML value: {error}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML itself keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _describe(problem: Any, model: type[BaseModel], name: str) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or name
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], model)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    got = "" if problem["type"] in ("missing", "value_error") else f", got {problem['input']!r}"
    return f"{key}: {problem['msg']}{got}"


def _known_keys(location: Sequence[str], model: type[BaseModel] = RunConfig) -> list[str]:
    groups: dict[str, type[BaseModel]] = {
        "model": ModelConfig, "data": DataConfig, "train": TrainConfig, "eval": EvalConfig,
    }
    return list((groups.get(location[0], model) if location else model).model_fields)
