"""Builds the CUDA library where nvcc and PyTorch are there; everything else is in pyproject.toml."""

import importlib.util
import os
import pathlib
import runpy
import shutil
import sys

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
sources = runpy.run_path(str(ROOT / "rsfast" / "_sources.py"))


def reasons() -> list[str]:
    """Why the library is left to its first use on a GPU."""
    if importlib.util.find_spec("torch") is None:
        return ["PyTorch is not in this build's environment (pip install --no-build-isolation . takes yours)"]
    import torch

    why_not = sources["why_not_built"](torch.version.cuda)
    if why_not:
        return why_not
    release = sources["release"](sources["nvcc"]())
    if release and release.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        # the library itself does not mind, as it brings its own runtime, and the build at its first use does not ask
        return [f"nvcc is of CUDA {release} and PyTorch of {torch.version.cuda}, which PyTorch's build ahead refuses"]
    return []


class BuildPy(build_py):
    """Takes ``csrc`` into the package: an installed rsfast can build its library too."""

    def run(self):
        super().run()
        if why_not:
            print(f"rsfast: the CUDA library is left to its first use on a GPU: {'; '.join(why_not)}", file=sys.stderr)
        if self.editable_mode:
            return
        target = pathlib.Path(self.build_lib, "rsfast", "csrc")
        shutil.rmtree(target, ignore_errors=True)
        for path in sources["files"](emulated=True):
            copy = target / path.relative_to(ROOT.resolve() / "csrc")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def cuda_library() -> dict:
    """Arguments of ``setup`` that build ``rsfast/_cuda.abi3.so``; no GPU is asked for."""
    from torch.utils.cpp_extension import BuildExtension

    nvcc, define = sources["nvcc"](), sources["define"](emulated=False)
    os.environ["TORCH_CUDA_ARCH_LIST"] = sources["architectures"](nvcc, os.environ.get("TORCH_CUDA_ARCH_LIST"))
    os.environ["PATH"] = os.pathsep.join(
        [os.path.dirname(sys.executable), os.environ["PATH"]]
    )  # an environment's ninja
    library = Extension(
        "rsfast._cuda",
        [path.relative_to(ROOT.resolve()).as_posix() for path in sources["units"](emulated=False)],
        include_dirs=["csrc"],
        extra_compile_args={"cxx": [*sources["COMMON"], define], "nvcc": [*sources["NVCC"], define]},
        library_dirs=[flag.removeprefix("-L") for flag in sources["library_flags"](nvcc)],
        libraries=sources["LIBRARIES"],
        language="c++",
        py_limited_api=True,
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildExtension, "build_py": BuildPy},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__" and int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"rsfast: setuptools 77 or newer reads pyproject.toml, here is {setuptools.__version__}: upgrade it")
why_not = reasons()
setup(**({"cmdclass": {"build_py": BuildPy}} if why_not else cuda_library()))
