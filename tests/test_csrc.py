"""The sources in ``csrc`` on a machine without a GPU: what nvcc makes of them, and that the result loads."""

import concurrent.futures
import itertools
import os
import re
import shutil
import subprocess

import pytest
import torch

from rsfast import _extension, _sources

ARCHITECTURES = ("80", "90", "100")
LINKED = "90"  # the host's half is compiled for this one alone
MOST_SPILLED = 16  # bytes of a thread, stored or loaded
SHARED_MEMORY = 48 * 1024  # of a declared array; what is asked for at launch, the sources check as they compile
UNITS = _sources.units(emulated=False)
needs_nvcc = pytest.mark.skipif(_sources.nvcc() is None, reason="there is no nvcc")


def compile_ahead(unit, architecture):
    """The object (a cubin if not ``LINKED``) and what ptxas says, kept for these very sources, flags and compiler."""
    nvcc, define = _sources.nvcc(), _sources.define(emulated=False)
    gencode = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = [*_sources.NVCC, gencode, f"-I{_sources.CSRC}", "-Xptxas", "-v", "-Xcompiler", "-fPIC"]
    flags.append("-c" if architecture == LINKED else "-cubin")
    name = f"{unit.relative_to(_sources.CSRC).as_posix().replace('/', '-')}-{architecture}"
    with _extension._alone(_extension._key(f"checked-{name}", define, flags, nvcc)) as folder:
        built, said = folder / "unit.o", folder / "ptxas"
        if not said.is_file():
            done = subprocess.run([nvcc, *flags, define, str(unit), "-o", str(built)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            said.write_text(done.stderr)
        return built, said.read_text()


@pytest.fixture(scope="module")
def compiled():
    """``compile_ahead``, all at once from the first use on, on every core."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {pair: pool.submit(compile_ahead, *pair) for pair in itertools.product(UNITS, ARCHITECTURES)}
        yield lambda *pair: objects[pair].result()
        pool.shutdown(cancel_futures=True)


def resources(said):
    """``[(function, registers, bytes spilled, bytes of shared memory)]`` from what ``ptxas -v`` prints."""
    found = []
    for part in said.split("Compiling entry function '")[1:]:
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part)]
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        found.append((part.partition("'")[0], registers, max(spilled), int(shared.group(1)) if shared else 0))
    return found


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_kernels_keep_to_registers(compiled, unit, architecture):
    _, said = compiled(unit, architecture)
    kernels = resources(said)
    assert kernels or "__global__" not in unit.read_text()
    for name, registers, spilled, shared in kernels:
        assert spilled <= MOST_SPILLED, f"{name} spills {spilled} bytes at {registers} registers"
        assert shared <= SHARED_MEMORY, f"{name} declares {shared} bytes of shared memory"


def test_what_ptxas_prints_is_understood():
    said = """ptxas info    : Compiling entry function '_Zone' for 'sm_90a'
ptxas info    : Function properties for _Zone
    8 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 400 bytes smem
ptxas info    : Compiling entry function '_Ztwo' for 'sm_90a'
ptxas info    : Function properties for _Ztwo
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, 376 bytes cmem[0]
"""
    assert resources(said) == [("_Zone", 255, 24, 400), ("_Ztwo", 40, 0, 0)]


@pytest.fixture(scope="module")
def library(compiled, tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "_cuda.abi3.so"
    nvcc = _sources.nvcc()
    objects = [str(compiled(unit, LINKED)[0]) for unit in UNITS]
    command = ["g++", "-shared", *objects, *_sources.library_flags(nvcc), *_sources.link_flags(), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_library_loads_and_says_that_there_is_no_gpu(library):
    found = _extension.load(library, emulated=False)
    with pytest.raises(RuntimeError, match="rsf_probe failed with code (35: no NVIDIA driver|100: no GPU)"):
        _extension.bind(found, "rsf_probe")()


@needs_nvcc
@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
def test_the_library_needs_neither_torch_nor_a_cuda_runtime(library):
    said = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED\s+(\S+)", said))
    assert {name for name in needed if re.search("torch|c10|cuda|python", name)} == set()


def test_objects_do_not_overwrite_each_other():
    """PyTorch's build at first use names an object by its source's stem."""
    stems = [unit.stem for unit in UNITS]
    assert UNITS and sorted(set(stems)) == sorted(stems)


@pytest.mark.parametrize("path", _sources.files(emulated=True), ids=lambda path: path.name)
def test_sources_stand_alone(path):
    """nvcc and g++ alone compile them: no header of PyTorch, Python or CUTLASS; and files stay short."""
    text = path.read_text()
    included = re.findall(r'#include\s*[<"]([^>"]+)[>"]', text)
    assert not [name for name in included if re.match(r"(torch|ATen|c10|pybind11|cutlass|cute|Python\.h)", name)]
    assert len(text.splitlines()) <= 400, f"{path} is too long; split it"
