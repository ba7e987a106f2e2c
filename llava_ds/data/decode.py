"""From the encoded bytes of a picture to RGB."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_START_OF_SCAN = 0xDA
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
# Less than the 89 million at which PIL's guard against decompression bombs speaks up: it judges what is larger.
_MAX_PIXELS = 2**26


def decode_rgb(data: bytes) -> torch.Tensor:
    """[H, W, 3] uint8 as ``decode_pil`` gives it, an ordinary JPEG faster than there; EXIF rotations are not applied.

    Raises what ``decode_pil`` raises.
    """
    if _is_ordinary_jpeg(_read_jpeg_header(data)):
        try:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0)
        except RuntimeError:
            pass  # PIL has the last word, and a message
    return torch.from_numpy(np.array(decode_pil(data)))


def decode_pil(data: bytes) -> Image.Image:
    """The first frame as RGB. Raises whatever PIL's plugins ran into, and OSError for a JPEG or PNG without its end."""
    # PIL accepts a file whose lost part reads as zeros, as interrupted copies leave it.
    if not _has_its_end(data):
        raise OSError("image file is truncated: it has no end marker")
    with open_pil(io.BytesIO(data)) as image:
        return image.convert("RGB")


def open_pil(source: Path | io.BytesIO) -> Image.Image:
    """The header only, as PIL reads it. Raises whatever PIL's plugins ran into."""
    try:
        return Image.open(source)
    except UnidentifiedImageError as error:  # whose message is the address of a buffer
        raise UnidentifiedImageError("it begins as no picture format that PIL knows") from error


def _has_its_end(data: bytes) -> bool:
    """False for a JPEG or PNG that was cut, whatever follows; other formats do not tell."""
    if data.startswith(_JPEG):
        header = _read_jpeg_header(data)  # the segments before the scan may hold a thumbnail with an end of its own
        return data.find(_JPEG_END, header.scan if header else 0) >= 0
    return not data.startswith(_PNG) or _PNG_END in data


class _JpegHeader(NamedTuple):
    precision: int
    height: int
    width: int
    channels: int
    scan: int
    """Where the segments end and the first scan begins."""


def _is_ordinary_jpeg(header: _JpegHeader | None) -> bool:
    """CMYK and other rare kinds are left to PIL, whose conversion to RGB is the official one."""
    return (
        header is not None
        and header.precision == 8
        and header.channels in (1, 3)
        and header.height * header.width <= _MAX_PIXELS
    )


def _read_jpeg_header(data: bytes) -> _JpegHeader | None:
    """None when ``data`` is no JPEG or not made as usual."""
    if not data.startswith(_JPEG):
        return None
    at, frame = 2, (0, 0, 0, 0)
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker == _START_OF_SCAN:
            return _JpegHeader(*frame, scan=at)
        if marker in _HUFFMAN_FRAMES:
            frame = data[at + 4], _uint16(data, at + 5), _uint16(data, at + 7), data[at + 9]
        at += 2 + _uint16(data, at + 2)
    return None


def _uint16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")
