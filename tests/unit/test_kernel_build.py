"""A source becomes a kernel that is kept, found again and launched with the right arguments."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from llava_ds.errors import BackendUnavailableError
from llava_ds.ops import kernel_build
from llava_ds.ops.kernel_build import build, choose_target, compile_source, read_source

SOURCE = b'extern "C" __global__ void fill(int* out) { out[threadIdx.x] = VALUE; }'


@pytest.fixture
def nvrtc():
    try:
        return kernel_build._nvrtc()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def test_a_known_device_gets_machine_code_and_a_newer_one_ptx(nvrtc, monkeypatch):
    assert choose_target((8, 0)) == "sm_80"
    assert choose_target((9, 0)) == "sm_90"
    known = nvrtc.nvrtcGetSupportedArchs()[1]
    assert choose_target((99, 0)) == f"compute_{max(known)}"
    with pytest.raises(BackendUnavailableError, match="sm_50"):
        choose_target((5, 0))


def test_both_kinds_of_target_are_compiled_with_the_macros(nvrtc):
    cubin, log = compile_source(SOURCE, "sm_80", {"VALUE": 3})
    assert cubin.startswith(b"\x7fELF") and "Used" in log
    ptx, _ = compile_source(SOURCE, "compute_80", {"VALUE": 31415})
    assert b".target sm_80" in ptx and b"31415" in ptx
    assert ptx.endswith(b"\0"), "the driver looks for the end"


def test_an_error_in_the_source_is_named_by_line(nvrtc):
    says = r'(?s)sm_80: kernel.cu\(1\): error: identifier "VALUE".*NVRTC_ERROR'
    with pytest.raises(BackendUnavailableError, match=says):
        compile_source(SOURCE, "sm_80", {})
    with pytest.raises(BackendUnavailableError, match="sm_1"):
        compile_source(SOURCE, "sm_1", {"VALUE": 3})


def test_what_was_built_is_found_again(nvrtc, tmp_path, monkeypatch):
    folder = tmp_path / "not there yet"
    first = build(SOURCE, "sm_80", {"VALUE": 3}, folder)
    assert first.startswith(b"\x7fELF") and len(list(folder.iterdir())) == 1, "nothing unfinished is left behind"
    with monkeypatch.context() as patch:
        patch.setattr(kernel_build, "compile_source", None)
        assert build(SOURCE, "sm_80", {"VALUE": 3}, folder) == first
    build(SOURCE + b"\n", "sm_80", {"VALUE": 3}, folder)
    build(SOURCE, "sm_90", {"VALUE": 3}, folder)
    build(SOURCE, "sm_80", {"VALUE": 4}, folder)
    assert len(list(folder.iterdir())) == 4
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (nvrtc.nvrtcResult(0), 99, 0))
    build(SOURCE, "sm_80", {"VALUE": 3}, folder)
    assert len(list(folder.iterdir())) == 5, "another compiler makes another kernel"


def test_builders_at_once_leave_one_whole_file(nvrtc, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        images = set(pool.map(lambda _: build(SOURCE, "sm_80", {"VALUE": 3}, tmp_path), range(16)))
    assert len(images) == len(list(tmp_path.iterdir())) == 1
    assert build(SOURCE, "sm_80", {"VALUE": 3}, tmp_path) in images


DAMAGES = [lambda kept: kept[:-1], lambda kept: kept[:20], lambda kept: b"", lambda kept: kept[:-9] + b"?" + kept[-8:]]


@pytest.mark.parametrize("damage", DAMAGES, ids=["end cut", "most cut", "empty", "a byte"])
def test_a_damaged_file_is_made_again(nvrtc, tmp_path, damage):
    image = build(SOURCE, "sm_80", {"VALUE": 3}, tmp_path)
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    file.write_bytes(damage(kept))
    assert file.read_bytes() != kept
    assert build(SOURCE, "sm_80", {"VALUE": 3}, tmp_path) == image
    assert file.read_bytes() == kept


def test_a_folder_that_cannot_be_written_is_done_without(nvrtc, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert build(SOURCE, "sm_80", {"VALUE": 3}, tmp_path / "file").startswith(b"\x7fELF")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert build(SOURCE, "sm_80", {"VALUE": 3}, tmp_path / "disk").startswith(b"\x7fELF")
    assert not list((tmp_path / "disk").iterdir())


def test_kernels_are_kept_in_the_cache_folder(nvrtc, monkeypatch, tmp_path):
    monkeypatch.setenv("LLAVA_DS_CACHE", str(tmp_path))
    build(SOURCE, "sm_80", {"VALUE": 3})
    assert [file.suffix for file in (tmp_path / "kernels").iterdir()] == [".sm_80"]


def test_the_package_has_its_source_and_says_when_it_does_not():
    assert b"splice_forward" in read_source("project_splice.cu")
    with pytest.raises(BackendUnavailableError, match="lacks ops/kernels/none.cu"):
        read_source("none.cu")


@pytest.mark.parametrize(
    ("load", "says"), [("_nvrtc", "NVRTC cannot be loaded"), ("_driver", "the CUDA driver cannot be reached")]
)
def test_missing_bindings_are_a_reason(load, says, monkeypatch):
    loader = getattr(kernel_build, load).__wrapped__  # without what an earlier call found
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendUnavailableError, match=rf"{says}.*cuda.bindings"):
        loader()


# A driver that says what it is asked to launch, and refuses a grid of 9 blocks as a device does after a fault.
DRIVER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGet(int* device, int number) { *device = number + 5; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)0x10; return device == 6 ? 0 : 101; }
int cuCtxSetCurrent(void* context) { return context == (void*)0x10 ? 0 : 201; }
int cuModuleLoadData(void** module, const char* image) {
    *module = (void*)0x20;
    return strcmp(image, "image") ? 200 : 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = (void*)0x30;
    return module == (void*)0x20 && !strcmp(name, "entry") ? 0 : 500;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
    if (gx == 9) return 700;
    printf("%p grid %u %u %u block %u %u %u shared %u stream %p: %d %d %lld %p; %p\n", function, gx, gy, gz, bx, by, bz,
           shared, stream, **(int**)arguments[0], *(int*)arguments[1], *(long long*)arguments[2], *(void**)arguments[3],
           extra);
    fflush(stdout);
    return 0;
}
int cuGetProcAddress_v2(const char* name, void** address, int version, unsigned long long flags, int* status) {
    if (!strcmp(name, "cuGetProcAddress")) name = "cuGetProcAddress_v2";
    *address = dlsym(dlopen("libcuda.so.1", RTLD_LAZY), name);
    if (status) *status = !*address;
    return *address ? 0 : 500;
}
"""

PROGRAM = """
import contextlib, ctypes, types
import torch
torch.cuda.init = lambda: None
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0x70)
from llava_ds.ops.kernel_build import Module
module = Module(b"image\\0", torch.device("cuda", 1))
value = torch.tensor([41], dtype=torch.int32)
arguments = [ctypes.c_void_p(value.data_ptr()), ctypes.c_int(-42), ctypes.c_longlong(2**40), ctypes.c_void_p(None)]
def attempt(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        print(type(error).__name__, error)
attempt(module.launch, "entry", (3, 2), 256, 49152, arguments)
attempt(module.launch, "entry", (9, 1), 256, 0, arguments)
attempt(module.launch, "other", (1, 1), 256, 0, arguments)
attempt(Module, b"another\\0", torch.device("cuda", 1))
attempt(Module, b"image\\0", torch.device("cuda", 2))
"""


def test_the_driver_gets_every_argument_and_its_refusals_are_named(tmp_path):
    """The real bindings, over a driver library that stands in for NVIDIA's."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler cc")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "driver.c"), "-ldl"], check=True)
    env = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "0x30 grid 3 2 1 block 256 1 1 shared 49152 stream 0x70: 41 -42 1099511627776 (nil); (nil)",
        "RuntimeError entry with grid (9, 1) and block 256 on cuda:1: cuLaunchKernel failed with "
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "BackendUnavailableError other: cuModuleGetFunction failed with CUDA_ERROR_NOT_FOUND",
        "BackendUnavailableError cuModuleLoadData failed with CUDA_ERROR_INVALID_IMAGE",
        "BackendUnavailableError cuDevicePrimaryCtxRetain failed with CUDA_ERROR_INVALID_DEVICE",
    ], done.stderr
