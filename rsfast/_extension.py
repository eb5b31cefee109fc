"""Finds, checks and, at its first use, builds the library of ``csrc``; says why where it cannot be had.

The library speaks a C ABI: pointers and sizes in, 0 or a code of error out. With ``TRITON_INTERPRET=1`` the same
sources are compiled for this machine's CPU, on top of an emulation of CUDA, as Triton's kernels are interpreted.
"""

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import pathlib
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch

from rsfast import _sources
from rsfast._dispatch import INTERPRET

ABI = 1  # of the functions that Python calls; csrc/common/library.cu has the same number
OLDEST = (8, 0)  # compute capability
NOT_FOR_THIS_GPU = 209  # CUDA's cudaErrorNoKernelImageForDevice
PREBUILT = pathlib.Path(__file__).parent / "_cuda.abi3.so"
log = logging.getLogger("rsfast")


def missing(device: torch.device | None = None) -> list[str]:
    """Reasons against the library on ``device`` (None: the current GPU), found without building anything.

    What will be built at first use is not missing. Where that failed, the failure is the reason from then on.
    """
    if not INTERPRET and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < OLDEST:
            return [f"the GPU has compute capability {major}.{minor}, and the CUDA library needs 8.0 or newer"]
    if _load.cache_info().currsize:
        found = _load()
        return [found] if isinstance(found, str) else []
    if INTERPRET:
        return _why_not_emulated()
    reasons = [] if torch.cuda.is_available() else ["no GPU is visible"]
    return reasons if _prebuilt()[0] else reasons + _why_not_built()


def ready(device: torch.device | None = None) -> bool:
    """Whether the library can be called on ``device``, for a choice that has another way to go.

    The first use builds it; a failure is logged, not raised, and is what :func:`missing` says from then on.
    """
    return not missing(device) and not isinstance(_load(), str)


def library() -> ctypes.CDLL:
    """The library. The first call may build it, which takes a minute or so and one line of log.

    Raises:
        NotImplementedError: It cannot be had; every reason is listed.
    """
    reasons = missing()
    found = None if reasons else _load()
    if isinstance(found, str):
        reasons = [found]
    if reasons:
        raise NotImplementedError("the CUDA library cannot be used:\n  - " + "\n  - ".join(reasons))
    return found


def function(name: str, *types) -> Callable[..., int]:
    """A function of the library that takes these ctypes types, and raises where it returns an error.

    Raises:
        NotImplementedError: The library cannot be had.
        RuntimeError: By the function: its name, the code, and what the code means.
    """
    return bind(library(), name, *types)


def bind(found: ctypes.CDLL, name: str, *types) -> Callable[..., int]:
    """The same for a library that is already open."""

    def check(code: int, *_) -> int:
        if code:
            raise RuntimeError(f"{name} failed with code {code}: {found.rsf_error(code).decode()}")
        return code

    called = found[name]  # an object of its own, where an attribute would be shared
    called.argtypes, called.restype, called.errcheck = types, ctypes.c_int, check
    return called


def status() -> str:
    """For people: where the library comes from on this machine, or why it does not."""
    if reasons := missing():
        return "not available: " + "; ".join(reasons)
    if INTERPRET:
        return "emulated on the CPU, because TRITON_INTERPRET=1"
    found, why_not = _prebuilt()
    return "built at installation" if found else f"built at its first use, because {why_not}"


def load(path: pathlib.Path, *, emulated: bool) -> ctypes.CDLL:
    """Open a library file.

    Raises:
        OSError: It is cut off or no library, or was built for another rsfast; the message names the file.
    """
    _check_whole(path)
    found = ctypes.CDLL(str(path))
    try:
        found.rsf_sources.restype = found.rsf_error.restype = ctypes.c_char_p
        abi, sources = found.rsf_abi(), found.rsf_sources().decode()
    except AttributeError:
        raise OSError(f"{path} is no library of rsfast") from None
    if abi != ABI:
        raise OSError(f"{path} has ABI {abi}, and this rsfast needs {ABI}")
    if _sources.CSRC and sources != _sources.digest(emulated=emulated):
        raise OSError(f"{path} was built from other sources than those in {_sources.CSRC}")
    return found


def _check_whole(path: pathlib.Path) -> None:
    """Refuse a file that lacks its end: mapping that would be answered with SIGBUS, not with an error."""
    with open(path, "rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if header[:5] == b"\x7fELF\x02":
        (start,) = struct.unpack_from("<Q", header, 40)  # of the section headers, which lie at the end
        each, count = struct.unpack_from("<HH", header, 58)
    if header[:5] == b"\x7fELF\x02" and (len(header) < 64 or size < start + each * count):
        raise OSError(f"{path} is cut off: {size} bytes, and its header speaks of {start + each * count}")


def of_host() -> ctypes.CDLL | None:
    """The library that came with the installation, for functions that need no GPU; nothing is built for them."""
    return _prebuilt()[0]


@functools.cache
def _prebuilt() -> tuple[ctypes.CDLL | None, str]:
    """The library that came with the installation, or why it does not serve."""
    if not PREBUILT.is_file():
        return None, "none was built at installation"
    try:
        return load(PREBUILT, emulated=False), ""
    except OSError as error:
        return None, str(error)


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why it cannot be had; tried once a process."""
    try:
        if INTERPRET:
            return _emulation()
        found, why_not = _prebuilt()
        if found is None or found.rsf_probe() == NOT_FOR_THIS_GPU:
            why_not = why_not or f"{PREBUILT} was not built for this GPU"
            if reasons := _why_not_built():
                return "; ".join([why_not, *reasons])
            found = _build(why_not)
        bind(found, "rsf_probe")()
        return found
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        lines = str(error).strip().splitlines()
        failure = "\n    ".join(["loading or building it failed:", *lines[-20:]])
        log.warning("the CUDA library is not used: %s", failure)
        return failure


def _why_not_built() -> list[str]:
    reasons = _sources.why_not_built(torch.version.cuda)
    if not reasons and not shutil.which("ninja", path=_path()):
        reasons.append("ninja, which builds it, is not installed (pip install ninja)")
    if reasons and PREBUILT.is_file():
        reasons.insert(0, _prebuilt()[1])
    return [reason for reason in reasons if reason]


def _build(why: str) -> ctypes.CDLL:
    """Compile for the GPUs at hand, unless that was done before."""
    from torch.utils import cpp_extension  # not before it is needed: it wants setuptools

    nvcc = _sources.nvcc()
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    flags = [*_sources.NVCC, *_sources.gencode(nvcc, [gpu for gpu in gpus if gpu >= OLDEST])]
    define = _sources.define(emulated=False)
    with _alone(_key("cuda", define, flags, nvcc)) as folder:
        for built in folder.glob("rsfast*.so"):
            try:
                return load(built, emulated=False)
            except OSError as error:
                log.warning("building the CUDA library again: %s", error)
                built.unlink()
        (folder / "lock").unlink(missing_ok=True)  # PyTorch's, of a build that was killed: it would wait for ever
        log.warning("building the CUDA library, which is done once: %s; it is kept in %s", why, folder)
        with _environments_programs():
            built = cpp_extension.load(
                "rsfast_cuda",
                [str(path) for path in _sources.units(emulated=False)],
                extra_cflags=[*_sources.COMMON, define],
                extra_cuda_cflags=[*flags, define],
                extra_ldflags=["-Wl,--as-needed", *_sources.library_flags(nvcc), *_sources.link_flags()],
                extra_include_paths=[str(_sources.CSRC)],
                build_directory=str(folder),
                with_cuda=True,
                is_python_module=False,
            )
        return load(pathlib.Path(built), emulated=False)


def _compiler() -> list[str] | None:
    """The C++ compiler and options that users name it with."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command if shutil.which(command[0]) else None


def _why_not_emulated() -> list[str]:
    reasons = []
    if not _compiler():
        reasons.append("TRITON_INTERPRET=1, and there is no C++ compiler to emulate CUDA with (g++, or what CXX names)")
    if not _sources.units(emulated=True):
        reasons.append("TRITON_INTERPRET=1, and the sources are not installed (csrc is missing)")
    return reasons


def _emulation(*options: str) -> ctypes.CDLL:
    """The sources as a library for the CPU, compiled, with options, unless that was done before."""
    compiler, flags = _compiler(), [*_sources.host_flags(_sources.CSRC), *options]
    define = _sources.define(emulated=True)
    with _alone(_key("emulation", define, list(options), *compiler)) as folder:
        built = folder / "rsfast_emulation.so"
        with contextlib.suppress(OSError):  # none yet, or one that is broken
            return load(built, emulated=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            units = _sources.units(emulated=True)
            objects = [os.path.join(scratch, f"{i}.o") for i in range(len(units))]
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                commands = [
                    [*compiler, *flags, define, "-c", str(u), "-o", o] for u, o in zip(units, objects, strict=True)
                ]
                list(pool.map(_run, commands))
            _run([*compiler, "-shared", "-pthread", *objects, "-o", os.path.join(scratch, "new.so")])
            os.replace(os.path.join(scratch, "new.so"), built)  # whole, or not there
        return load(built, emulated=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


def _key(kind: str, define: str, flags: list[str], *compiler: str) -> str:
    """Name of a cache folder: the sources, the flags and the compiler."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return f"{kind}-{hashlib.sha256(repr((define, flags, compiler, version)).encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def _alone(name: str) -> Iterator[pathlib.Path]:
    """The cache folder of this name, which no other process or thread builds in; a killed one leaves no lock."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(cache) / "rsfast" / "csrc" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def _path() -> str:
    """PATH with this environment's programs, which is not on it where Python is called by its whole name."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


@contextlib.contextmanager
def _environments_programs() -> Iterator[None]:
    before = os.environ.get("PATH")
    os.environ["PATH"] = _path()
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before
