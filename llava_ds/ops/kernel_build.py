"""A CUDA source compiled while the program runs, kept on disk, loaded and launched.

The compiler is NVRTC, a library among torch's own dependencies, so users need no CUDA toolkit. ``cuda.bindings``
reaches NVRTC and the driver; it is imported inside functions, as machines without a GPU may lack it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from llava_ds.cache import cache_folder
from llava_ds.errors import BackendUnavailableError

Argument = ctypes.c_void_p | ctypes.c_int | ctypes.c_longlong

_DIGEST_BYTES = hashlib.sha256().digest_size


def read_source(name: str) -> bytes:
    """The source llava_ds/ops/kernels/``name``.

    Raises BackendUnavailableError where the installed package lacks it.
    """
    try:
        return resources.files("llava_ds").joinpath("ops", "kernels", name).read_bytes()
    except OSError as error:
        raise BackendUnavailableError(f"the installed llava_ds lacks ops/kernels/{name}: reinstall it") from error


def choose_target(capability: tuple[int, int]) -> str:
    """What to compile for: ``sm_XY`` of this compute capability where NVRTC knows it.

    A device newer than NVRTC gets ``compute_XY`` of the newest that NVRTC knows: PTX, which the driver finishes.

    Raises BackendUnavailableError without NVRTC, and for a device older than all that it knows.
    """
    wanted = 10 * capability[0] + capability[1]
    known = _checked(_nvrtc().nvrtcGetSupportedArchs(), "nvrtcGetSupportedArchs")
    older = [arch for arch in known if arch <= wanted]
    if not older:
        raise BackendUnavailableError(f"NVRTC compiles for sm_{min(known)} and later, and this device is sm_{wanted}")
    return f"sm_{wanted}" if wanted in older else f"compute_{max(older)}"


def compile_source(source: bytes, target: str, macros: Mapping[str, int]) -> tuple[bytes, str]:
    """Compiles for ``sm_XY`` to a cubin, for ``compute_XY`` to PTX that ends in a zero byte.

    Returns what was made and the compiler's log, where ptxas says the registers and spills of each entry point.

    Raises BackendUnavailableError with the log where the source does not compile, and without NVRTC.
    """
    nvrtc = _nvrtc()
    program = _checked(nvrtc.nvrtcCreateProgram(source, b"kernel.cu", 0, None, None), "nvrtcCreateProgram")
    try:
        options = _options(target, macros)
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        log = log.strip("\0 \n")
        _checked(status, f"NVRTC cannot compile for {target}: {log}\nnvrtcCompileProgram")
        if target.startswith("sm_"):
            return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
        return _read(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def build(source: bytes, target: str, macros: Mapping[str, int], folder: Path | None = None) -> bytes:
    """As ``compile_source``, or what an earlier run kept in ``folder`` (by default ``kernels`` in the cache folder).

    Safe for ranks that build at once: a file appears whole. A damaged file is made again, and a folder that cannot be
    written is done without.
    """
    version = _checked(_nvrtc().nvrtcVersion(), "nvrtcVersion")
    what = (hashlib.sha256(source).hexdigest(), _options(target, macros), tuple(version))
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    file = (folder or cache_folder() / "kernels") / f"{key[:32]}.{target}"
    image = _load(file)
    if image is None:
        image, _ = compile_source(source, target, macros)
        with contextlib.suppress(OSError):
            _save(file, image)
    return image


class Module:
    """A compiled image on one device, for the life of the process."""

    def __init__(self, image: bytes, device: torch.device) -> None:
        """Raises BackendUnavailableError where the driver refuses the image."""
        driver = _driver()
        torch.cuda.init()
        self.device = device
        self._entries: dict[str, Any] = {}
        self._context = _checked(driver.cuDevicePrimaryCtxRetain(self._ordinal()), "cuDevicePrimaryCtxRetain")
        with self._current():
            self._module = _checked(driver.cuModuleLoadData(image), "cuModuleLoadData")

    def launch(
        self, entry: str, grid: tuple[int, int], block: int, shared_bytes: int, arguments: Sequence[Argument]
    ) -> None:
        """Queues one launch on torch's current stream of the device, and does not wait for it.

        Raises RuntimeError where the driver refuses it; what fails while it runs shows in a later call.
        """
        driver = _driver()
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        stream = driver.CUstream(torch.cuda.current_stream(self.device).cuda_stream)
        with self._current():
            status = driver.cuLaunchKernel(
                self._entry(entry), *grid, 1, block, 1, 1, shared_bytes, stream, ctypes.addressof(addresses), 0
            )
        _checked(status, f"{entry} with grid {grid} and block {block} on {self.device}: cuLaunchKernel", RuntimeError)

    def _entry(self, name: str) -> Any:
        if name not in self._entries:
            found = _driver().cuModuleGetFunction(self._module, name.encode())
            self._entries[name] = _checked(found, f"{name}: cuModuleGetFunction")
        return self._entries[name]

    def _ordinal(self) -> Any:
        # CUDA_VISIBLE_DEVICES holds for the driver too, so torch's numbers are its numbers.
        return _checked(_driver().cuDeviceGet(self.device.index), f"cuDeviceGet({self.device.index})")

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        # Autograd's threads may have no context yet: torch skips cudaSetDevice for a thread already at device 0.
        with torch.cuda.device(self.device):
            _checked(_driver().cuCtxSetCurrent(self._context), "cuCtxSetCurrent")
            yield


def _options(target: str, macros: Mapping[str, int]) -> list[bytes]:
    defines = [f"-D{name}={value}" for name, value in sorted(macros.items())]
    options = [f"--gpu-architecture={target}", "--std=c++17", "--ptxas-options=-v", *defines]
    return [option.encode() for option in options]


@functools.cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the library itself is looked for by the first call
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendUnavailableError(
            f"NVRTC cannot be loaded ({_first_line(error)}); pip install cuda-bindings of torch's CUDA version"
        ) from error
    return nvrtc


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver

        driver.cuDriverGetVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendUnavailableError(f"the CUDA driver cannot be reached ({_first_line(error)})") from error
    return driver


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _checked(result: tuple[Any, ...], what: str, error: type[Exception] = BackendUnavailableError) -> Any:
    """The values that a binding returned after its status: None, the one, or the tuple of them."""
    status, *values = result
    if status.value:
        raise error(f"{what} failed with {status.name}")
    return values[0] if len(values) == 1 else tuple(values) or None


def _read(size_of: Any, fill: Any, program: Any) -> bytes:
    """What a pair of NVRTC calls hands out: its size, then its bytes into a buffer of that size."""
    buffer = bytes(_checked(size_of(program), size_of.__name__))
    _checked(fill(program, buffer), fill.__name__)
    return buffer


def _load(file: Path) -> bytes | None:
    """The image of a kept file, None where there is no file or it is not what was written."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, image = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return image if hashlib.sha256(image).digest() == digest else None


def _save(file: Path, image: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(hashlib.sha256(image).digest() + image)
        os.chmod(unfinished, 0o644)  # users may share the folder, and a temporary file is its user's only
        os.replace(unfinished, file)
    except OSError:
        os.unlink(unfinished)
        raise
