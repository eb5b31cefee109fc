"""The sources in ``csrc`` and how they are compiled, for ``setup.py``, the first use and the tests alike.

Nothing but the standard library: ``setup.py`` runs this file where PyTorch may be missing.
"""

import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess

PACKAGE = pathlib.Path(__file__).resolve().parent
CSRC = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), None)  # installed, or a checkout
EMULATION = "emulation"  # its folder: what runs the same sources without a GPU
# of a library that is built ahead: no instructions of one generation alone, so that 10.0 serves 10.3 as 8.0 does 8.9,
# and the PTX of 9.0, which knows clusters, all that is newer
ARCHITECTURES = ("8.0", "9.0+PTX", "10.0")

COMMON = ["-std=c++20", "-O3"]
# PyTorch's build switches these conversions off, and the sources are compiled by nvcc alone too
NVCC = [
    *COMMON, "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
]  # fmt: skip
LIBRARIES = ["cudart_static", "dl", "rt", "pthread"]  # static: one library for whatever CUDA runtime PyTorch brings


def files(*, emulated: bool) -> list[pathlib.Path]:
    """Every source and header, in an order that is the same everywhere."""
    kinds = {".cu", ".cuh", ".cpp", ".h", ".hpp"}
    found = [p for p in CSRC.rglob("*") if p.suffix in kinds] if CSRC else []
    return sorted(p for p in found if emulated or EMULATION not in p.relative_to(CSRC).parts)


def units(*, emulated: bool) -> list[pathlib.Path]:
    """What is handed to the compiler."""
    return [p for p in files(emulated=emulated) if p.suffix in {".cu", ".cpp"}]


@functools.cache
def digest(*, emulated: bool) -> str:
    """Names the sources and the flags; the library carries it, so that one of other sources is noticed."""
    seen = hashlib.sha256(repr((NVCC, host_flags("") if emulated else LIBRARIES)).encode())
    for path in files(emulated=emulated):
        text = path.read_bytes()
        seen.update(f"{path.relative_to(CSRC).as_posix()} {len(text)} ".encode() + text)
    return "s" + seen.hexdigest()[:16]


def define(*, emulated: bool) -> str:
    """The flag that bakes the digest in."""
    return f"-DRSF_SOURCES={digest(emulated=emulated)}"


def host_flags(csrc: pathlib.Path | str) -> list[str]:
    """For a C++ compiler that takes the CUDA sources, with the emulation in front of each."""
    header = f"{csrc}/{EMULATION}/cuda_on_host.h"
    return ["-std=c++20", "-O2", "-fPIC", "-pthread", f"-I{csrc}", "-include", header, "-x", "c++"]


def nvcc() -> str | None:
    """Path of the CUDA compiler, found in the order in which PyTorch looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and (path := shutil.which("nvcc")):
        return path
    return shutil.which("nvcc", path=os.path.join(home or "/usr/local/cuda", "bin"))


def release(nvcc: str) -> str:
    """``"13.0"``: the version of CUDA that this nvcc is of; empty where it does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else ""


def library_flags(nvcc: str) -> list[str]:
    """Where the CUDA runtime to link lies; asked of nvcc, as its folder differs between installers."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return re.findall(r'-L[^"\s]+', next((line for line in said.splitlines() if "LIBRARIES=" in line), ""))


def known_architectures(nvcc: str) -> set[str]:
    """``{"80", "90", ...}``: what this nvcc compiles for, the letter after a number left out."""
    said = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    return set(re.findall(r"\bsm_(\d+)", said))


def architectures(nvcc: str, asked: str | None) -> str:
    """``TORCH_CUDA_ARCH_LIST`` for a library built ahead: what is asked, or all that serve; none below 8.0."""
    if not asked:
        known = known_architectures(nvcc)
        return ";".join(a for a in ARCHITECTURES if re.sub(r"\D", "", a) in known)
    listed = re.split(r"[;,\s]+", asked.strip())
    return ";".join(a for a in listed if not re.match(r"[1-7]\.", a))


def gencode(nvcc: str, gpus: list[tuple[int, int]]) -> list[str]:
    """Flags for exactly these compute capabilities."""
    known = known_architectures(nvcc)
    flags = set()
    for major, minor in gpus:
        number = f"{major}{minor}" + ("a" if major >= 9 else "")  # "a": instructions of this one generation too
        if number.rstrip("a") in known:
            flags.add(f"-gencode=arch=compute_{number},code=sm_{number}")
        else:  # newer than this nvcc: the driver compiles
            newest = "compute_90" if major >= 9 and "90" in known else "compute_80"  # below 90 nothing knows clusters
            flags.add(f"-gencode=arch={newest},code={newest}")
    return sorted(flags)


def link_flags() -> list[str]:
    return [f"-l{name}" for name in LIBRARIES]


def why_not_built(cuda: str | None) -> list[str]:
    """Reasons against compiling for CUDA here; ``cuda`` is ``torch.version.cuda``."""
    reasons = []
    if os.environ.get("RSFAST_BUILD_CUDA") == "0":
        reasons.append("RSFAST_BUILD_CUDA=0 says not to build it")
    if cuda is None:
        reasons.append("PyTorch is here without CUDA")
    if nvcc() is None:
        reasons.append("nvcc is not found (neither in CUDA_HOME nor on PATH nor in /usr/local/cuda)")
    if not units(emulated=False):
        reasons.append("the sources are not installed (csrc is missing)")
    return reasons
