"""The compiled library: found, checked, built at first use, and what is said where it cannot be had."""

import concurrent.futures
import ctypes
import importlib.util
import os
import pathlib
import runpy
import shutil
import stat
import subprocess
import sys

import pytest
import setuptools
import torch

from rsfast import _extension, _sources

ROOT = pathlib.Path(__file__).parent.parent
TOY = """
#ifdef __CUDACC__
#include <cuda_runtime.h>
__global__ void add_one(float* x) { x[threadIdx.x] += 1; }
extern "C" int rsf_add_one(float* x, long long n, void* stream) {
  if (n < 0) return -1;
  add_one<<<1, n, 0, static_cast<cudaStream_t>(stream)>>>(x);
  return cudaGetLastError();
}
#else
extern "C" int rsf_add_one(float* x, long long n, void*) {
  if (n < 0) return static_cast<int>(n);
  for (long long i = 0; i < n; i++) x[i] += ONE;
  return 0;
}
#endif
"""
HAS_GPU = torch.cuda.is_available()
ADD_ONE = ("rsf_add_one", ctypes.c_void_p, ctypes.c_longlong, ctypes.c_void_p)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
needs_nvcc = pytest.mark.skipif(
    not (_sources.nvcc() and shutil.which("ninja", path=_extension._path())), reason="there is no nvcc, or no ninja"
)


def forget():
    for cached in (_extension._load, _extension._prebuilt, _sources.digest):
        cached.cache_clear()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Small sources of their own, a cache of their own, no library built ahead."""
    csrc = tmp_path / "csrc"
    (csrc / "emulation").mkdir(parents=True)
    for name in ("library.cu", "errors.h"):
        shutil.copy(ROOT / "csrc" / "common" / name, csrc)
    (csrc / "toy.cu").write_text(TOY)
    (csrc / "emulation" / "cuda_on_host.h").write_text("#pragma once\n#define ONE 1\n")
    (csrc / "emulation" / "fibres.cpp").write_text("extern const int only_for_the_host = ONE;\n")
    monkeypatch.setattr(_sources, "CSRC", csrc)
    monkeypatch.setattr(_extension, "INTERPRET", True)
    monkeypatch.setattr(_extension, "PREBUILT", tmp_path / "_cuda.abi3.so")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RSFAST_BUILD_CUDA", raising=False)
    forget()
    yield csrc
    forget()


@pytest.fixture
def gpu(toy, monkeypatch):
    """A machine that says it has an H200, though no driver is there; or the GPU that there is."""
    monkeypatch.setattr(_extension, "INTERPRET", False)
    if HAS_GPU:
        return toy
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return toy


def built_ahead(csrc, path, *more):
    """The toy as a library that came with the installation; g++ is enough, as it launches nothing."""
    define = _sources.define(emulated=False)
    command = ["g++", *_sources.host_flags(csrc), define, *more, "-shared", *map(str, csrc.glob("*.cu"))]
    subprocess.run([*command, "-o", str(path)], check=True)


def cached(tmp_path):
    return list((tmp_path / "cache").rglob("rsfast*.so"))


def counting_compiler(tmp_path, monkeypatch):
    """A compiler that notes each call; returns the notes."""
    notes, script = tmp_path / "notes", tmp_path / "counting"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-o*) echo x >> {notes};; esac\nexec g++ "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return notes


@needs_compiler
def test_the_emulation_is_built_once_and_called(toy, tmp_path, monkeypatch):
    notes = counting_compiler(tmp_path, monkeypatch)
    assert _extension.missing() == [] and not cached(tmp_path), "missing() has built something"
    x = torch.zeros(3)
    assert _extension.ready()
    _extension.function(*ADD_ONE)(x.data_ptr(), 3, None)
    assert x.tolist() == [1, 1, 1]
    first = notes.read_text()
    forget()
    _extension.library()
    assert notes.read_text() == first and len(cached(tmp_path)) == 1
    (toy / "emulation" / "cuda_on_host.h").write_text("#pragma once\n#define ONE 5\n")
    forget()
    _extension.function(*ADD_ONE)(x.data_ptr(), 3, None)
    assert x.tolist() == [6, 6, 6] and len(cached(tmp_path)) == 2


@needs_compiler
def test_builds_at_the_same_time_wait_for_one(toy, tmp_path, monkeypatch):
    notes = counting_compiler(tmp_path, monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: _extension._emulation(), range(4)))
    assert len({found._handle for found in libraries}) == 1
    assert notes.read_text().split() == ["x"] * (len(_sources.units(emulated=True)) + 1)


@needs_compiler
@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"no library", lambda b: b""]
)
def test_a_corrupt_cache_is_built_again(toy, tmp_path, monkeypatch, spoil):
    monkeypatch.delenv("CXX", raising=False)
    built_ahead(toy, tmp_path / "whole")
    with _extension._alone(_extension._key("emulation", _sources.define(emulated=True), [], "g++")) as folder:
        path = folder / "rsfast_emulation.so"
        path.write_bytes(spoil((tmp_path / "whole").read_bytes()))
    with pytest.raises(OSError, match=path.name):
        _extension.load(path, emulated=True)
    assert _extension.library().rsf_abi() == _extension.ABI
    assert cached(tmp_path) == [path], "the test has spoilt another file than the one in use"


@needs_compiler
def test_a_library_of_something_else_is_refused(toy, tmp_path):
    (tmp_path / "other.cpp").write_text("int f() { return 1; }")
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "other.cpp", "-o", tmp_path / "other.so"], check=True)
    with pytest.raises(OSError, match="other.so is no library of rsfast"):
        _extension.load(tmp_path / "other.so", emulated=True)


@needs_compiler
def test_errors_have_names(toy):
    call = _extension.function(*ADD_ONE)
    with pytest.raises(RuntimeError, match="rsf_add_one failed with code -1: an argument is out of range"):
        call(None, -1, None)
    with pytest.raises(RuntimeError, match="code -77: an error without a name"):
        call(None, -77, None)


@needs_compiler
def test_sources_that_do_not_compile_are_a_reason_and_tried_once(toy, tmp_path, monkeypatch):
    notes = counting_compiler(tmp_path, monkeypatch)
    (toy / "toy.cu").write_text("this is no C++;\n")
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="(?s)building it failed.*toy.cu:1:1: error"):
            _extension.library()
        assert not _extension.ready()
    assert len(notes.read_text().split()) == len(_sources.units(emulated=True))
    assert "toy.cu:1:1: error" in _extension.missing()[0] and not cached(tmp_path)


def test_no_compiler_is_a_reason(toy, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert "no C++ compiler" in _extension.missing()[0] and "not available" in _extension.status()
    with pytest.raises(NotImplementedError, match=r"CUDA library cannot be used:\n  - TRITON_INTERPRET=1, and there"):
        _extension.library()


def test_sources_that_are_missing_are_a_reason(gpu, monkeypatch):
    monkeypatch.setattr(_sources, "CSRC", None)
    assert any("csrc is missing" in reason for reason in _extension.missing())
    monkeypatch.setattr(_extension, "INTERPRET", True)
    assert any("csrc is missing" in reason for reason in _extension.missing())


def test_every_reason_is_said_without_a_build(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("RSFAST_BUILD_CUDA", "0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    reasons = _extension.missing()
    assert len(reasons) == 3
    for expected in ("RSFAST_BUILD_CUDA=0", "nvcc is not found", "PyTorch is here without CUDA"):
        assert any(expected in reason for reason in reasons), expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _extension.missing() == ["no GPU is visible", *reasons]
    with pytest.raises(NotImplementedError, match="(?s)no GPU is visible.*RSFAST_BUILD_CUDA=0"):
        _extension.library()
    assert not cached(tmp_path)


def test_ninja_is_looked_for_beside_python_too(gpu, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("nvcc", "ninja"):
        (programs / name).write_text("")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))
    assert ["ninja" in reason for reason in _extension.missing()] == [True]
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    assert _extension.missing() == []


@pytest.mark.parametrize("capability, fits", [((7, 5), False), ((8, 0), True), ((10, 3), True)])
def test_old_gpus_are_named(gpu, monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reasons = [reason for reason in _extension.missing() if "capability" in reason]
    assert reasons == ([] if fits else ["the GPU has compute capability 7.5, and the CUDA library needs 8.0 or newer"])


@needs_compiler
def test_a_library_built_ahead_serves_without_a_compiler(gpu, monkeypatch):
    built_ahead(gpu, _extension.PREBUILT)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("RSFAST_BUILD_CUDA", "0")
    assert _extension.missing() == [] and _extension.status() == "built at installation"
    _extension.function("rsf_probe")()


@needs_compiler
@pytest.mark.parametrize("change", ["sources", "abi", "cut off", "garbage", "this GPU"])
def test_a_library_that_does_not_fit_is_built_again_or_explained(gpu, monkeypatch, change):
    library, before = gpu / "library.cu", (gpu / "library.cu").read_text()
    if change == "abi":
        library.write_text(before.replace("RSF_ABI 1", "RSF_ABI 2"))
    if change == "this GPU":
        library.write_text(before.replace("return 0;\n#endif", "return 209;\n#endif"))
    _sources.digest.cache_clear()
    built_ahead(gpu, _extension.PREBUILT)
    contents = _extension.PREBUILT.read_bytes()
    if change == "sources":
        (gpu / "toy.cu").write_text(TOY + "// newer\n")
        _sources.digest.cache_clear()
    if change in ("cut off", "garbage"):
        _extension.PREBUILT.write_bytes(contents[:-1] if change == "cut off" else b"x" * 100)
    asked = []
    monkeypatch.setattr(_extension, "_why_not_built", lambda: [])
    monkeypatch.setattr(_extension, "_build", lambda why: asked.append(why) or ctypes.CDLL(None))
    assert _extension.missing() == []
    with pytest.raises(AttributeError, match="rsf_probe"):  # of the stand-in that was "built"
        _extension.library()
    expected = {"sources": "other sources", "abi": "has ABI 2", "garbage": "header", "this GPU": "not built for this"}
    assert len(asked) == 1 and expected.get(change, change) in asked[0] and str(_extension.PREBUILT) in asked[0]
    _extension._load.cache_clear()
    monkeypatch.setattr(_extension, "_why_not_built", lambda: ["nvcc is not found"])
    with pytest.raises(NotImplementedError, match="nvcc is not found"):
        _extension.library()


@needs_nvcc
def test_the_first_use_builds_for_the_gpu_at_hand(gpu, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")  # what others are built for
    programs = tmp_path / "environment"
    programs.mkdir()
    (programs / "ninja").symlink_to(shutil.which("ninja", path=_extension._path()))
    (tmp_path / "ninja").write_text("#!/bin/sh\nexit 1\n")  # what PATH has is not the environment's
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    key = _extension._key  # a build that was killed leaves PyTorch's lock behind
    monkeypatch.setattr(_extension, "_key", lambda *args: locked(tmp_path, key(*args)))
    reason = "no NVIDIA driver, or one older than the CUDA runtime of the library"
    said = ["building the CUDA library, which is done once"]
    if HAS_GPU:
        _extension.library()
    else:
        said.append("the CUDA library is not used")
        with pytest.raises(NotImplementedError, match=f"rsf_probe failed with code 35: {reason}"):
            _extension.library()
    (path,) = cached(tmp_path)
    plan = (path.parent / "build.ninja").read_text()
    assert all(flag in plan for flag in _sources.gencode(_sources.nvcc(), [torch.cuda.get_device_capability()]))
    assert "code=sm_75" not in plan and "emulation" not in plan
    assert [record.getMessage().split(":")[0] for record in caplog.records] == said
    call = _extension.bind(_extension._build("asked again"), *ADD_ONE)
    if HAS_GPU:
        x = torch.zeros(3, device="cuda")
        call(x.data_ptr(), 3, torch.cuda.current_stream().cuda_stream)
        assert x.tolist() == [1, 1, 1]
    else:
        with pytest.raises(RuntimeError, match=f"rsf_add_one failed with code 35: {reason}"):
            call(None, 1, None)
    assert len(caplog.records) == len(said), "what is in the cache was built again"


def locked(tmp_path, name):
    folder = tmp_path / "cache" / "rsfast" / "csrc" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").touch()
    return name


def test_flags_for_gpus(monkeypatch):
    monkeypatch.setattr(_sources, "known_architectures", lambda nvcc: {"80", "86", "90", "100"})
    flags = _sources.gencode("nvcc", [(9, 0), (8, 6), (9, 0), (12, 1), (8, 9)])  # two are newer than this nvcc
    assert [flag.rpartition("=")[2] for flag in flags] == ["compute_80", "sm_86", "compute_90", "sm_90a"]
    assert _sources.architectures("nvcc", None) == "8.0;9.0+PTX;10.0"
    assert _sources.architectures("nvcc", "7.5 8.0 9.0;10.0+PTX Hopper") == "8.0;9.0;10.0+PTX;Hopper"
    monkeypatch.setattr(_sources, "known_architectures", lambda nvcc: {"80", "90"})
    assert _sources.architectures("nvcc", None) == "8.0;9.0+PTX"


@pytest.fixture
def asked_of_setup(monkeypatch):
    """Runs ``setup.py`` and returns what it asks of setuptools."""
    said = []
    monkeypatch.setattr(setuptools, "setup", lambda **asked: said.append(asked))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", _extension._path())
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")

    def run():
        made = runpy.run_path(str(ROOT / "setup.py"))
        return said.pop(), made

    return run


@needs_nvcc
def test_setup_builds_where_it_can(asked_of_setup):
    asked, _ = asked_of_setup()
    (library,) = asked["ext_modules"]
    assert (library.name, library.py_limited_api) == ("rsfast._cuda", True)
    assert "csrc/common/library.cu" in library.sources and not any("emulation" in s for s in library.sources)
    assert _sources.define(emulated=False) in library.extra_compile_args["nvcc"]


@pytest.mark.parametrize(
    "why", ["RSFAST_BUILD_CUDA=0", "nvcc is not found", "PyTorch is not in", "nvcc is of CUDA 12.8"]
)
def test_setup_leaves_it_to_the_first_use_with_one_line(asked_of_setup, monkeypatch, tmp_path, capsys, why):
    if "=" in why:
        monkeypatch.setenv(*why.split("="))
    elif "nvcc" in why:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        if "12.8" in why:  # another major version than PyTorch's
            programs = tmp_path / "bin"
            programs.mkdir()
            (programs / "nvcc").write_text("#!/bin/sh\necho Cuda compilation tools, release 12.8, V12.8.93\n")
            (programs / "nvcc").chmod(0o755)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    asked, _ = asked_of_setup()
    assert set(asked) == {"cmdclass"}
    build = asked["cmdclass"]["build_py"](setuptools.Distribution({"packages": []}))
    build.build_lib, build.editable_mode = str(tmp_path / "lib"), False
    build.finalize_options()
    build.run()
    line = "rsfast: the CUDA library is left to its first use on a GPU: "
    assert capsys.readouterr().err.startswith(line + why)
    packed = {p.relative_to(tmp_path / "lib" / "rsfast") for p in (tmp_path / "lib").rglob("*") if p.is_file()}
    assert packed == {p.relative_to(ROOT) for p in _sources.files(emulated=True)}
