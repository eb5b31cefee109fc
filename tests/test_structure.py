"""The architecture, as a test."""

import ast
import pathlib
import subprocess
import sys

import pytest

import rsfast

ROOT = pathlib.Path(rsfast.__file__).parent
FAMILIES = {p.parent.name for p in ROOT.glob("*/reference.py")}
MAY_IMPORT = {  # inside a family: reference < kernels < functional < module; families never import each other
    "reference": ("torch",),
    "kernels": (
        "torch",
        "triton",
        "rsfast._dispatch",
        "rsfast._tiles",
        "rsfast._extension",
        "rsfast.{family}.reference",
        "rsfast.{family}.kernels",
    ),
    "functional": (
        "torch",
        "rsfast._dispatch",
        "rsfast.{family}.reference",
        "rsfast.{family}.kernels",
        "rsfast.{family}.functional",
    ),
    "module": ("torch", "rsfast._dispatch", "rsfast.{family}.functional"),
    "constraint": (
        "torch",
        "numpy",
        "rsfast._dispatch",
        "rsfast._extension",
        "rsfast.{family}.reference",
        "rsfast.{family}.kernels",
        "rsfast.{family}.functional.checks",
        "rsfast.{family}.functional.plain",
        "rsfast.{family}.constraint",
    ),
    "estimators": (
        "torch",
        "numpy",
        "sklearn.utils",  # when it asks for its tags
        "rsfast._dispatch",
        "rsfast.{family}.functional",
        "rsfast.{family}.constraint",
        "rsfast.{family}.estimators",
    ),
    "group": ("torch", "rsfast._dispatch", "rsfast.{family}.functional", "rsfast.{family}.module"),
}
# above the families: who may import whom, lowest first; each may use the public names and all rooms below it
ROOMS = ("models", "harma", "deblora", "tune", "info", "cli")
# beyond public names: the timer of a choice has to know what can be chosen, and by which rank
INSIDE = {"tune": ("rsfast.lora.kernels.plan", "rsfast.lora.functional.checks.MAX_RANK", "rsfast.testing")}


def role(path):
    """Name of the file, or of the package, right below the family's folder."""
    return pathlib.Path(path.relative_to(ROOT).parts[1]).stem


FAMILY_FILES = sorted(p for family in FAMILIES for p in (ROOT / family).rglob("*.py") if role(p) in MAY_IMPORT)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of the module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FAMILY_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    family = path.relative_to(ROOT).parts[0]
    allowed = tuple(a.format(family=family) for a in MAY_IMPORT[role(path)])
    for name in imports(path):
        assert name.split(".")[0] in sys.stdlib_module_names or name.startswith(allowed), (
            f"{path.name} may not import {name}"
        )
        assert role(path) == "module" or not name.startswith("torch.distributed"), f"{path.name} may not import {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_stand_on_public_names(room):
    below = ROOMS[: ROOMS.index(room)]
    for path in [*(ROOT / room).rglob("*.py"), *ROOT.glob(f"{room}.py")]:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "rsfast" or len(parts) < 2:
                continue
            public = (len(parts) == 2 and parts[1] in rsfast.__all__) or (
                len(parts) == 3 and parts[1] in FAMILIES and parts[2] in getattr(rsfast, parts[1]).__all__
            )
            inside = name.startswith(INSIDE.get(room, "-"))
            assert public or inside or parts[1] in (*below, room, "_dispatch", "_extension", "_files", "__version__"), (
                f"{path.relative_to(ROOT)} may not import {name}"
            )


def test_families_know_nothing_above_them():
    for family in FAMILIES:
        for path in (ROOT / family).rglob("*.py"):
            for name in imports(path):
                parts = name.split(".")
                assert parts[0] != "rsfast" or parts[1] in (family, "_dispatch", "_tiles", "_extension"), (
                    f"{path.name} may not import {name}"
                )


def in_a_fresh_process(code):
    subprocess.run([sys.executable, "-c", f"import torch\n{code}"], check=True)


def test_works_without_triton():
    in_a_fresh_process(
        "import sys; sys.modules['triton'] = None\n"
        "import rsfast; rsfast.GatedAdapter(8, 32)(torch.ones(1, 2, 8)).sum().backward()"
    )


def test_import_is_light():
    in_a_fresh_process(
        "import sys, rsfast\n"
        "heavy = {'triton', 'open_clip', 'torchvision', 'timm', 'sklearn', 'scipy', 'matplotlib', 'pyarrow',"
        " 'diffusers', 'torch.distributed.nn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()"
    )


def test_no_function_hides_its_module():
    for name in rsfast.__all__:
        assert f"rsfast.{name}" not in sys.modules, f"rsfast.{name} is both a function and a module"


def test_files_stay_short():
    for path in [p for top in ("rsfast", "tests", "benchmarks") for p in (ROOT.parent / top).rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, f"{path} is too long; split it"


def test_debloras_parts_stand_on_those_below():
    order = ("arrays", "data", "features", "debiasing", "learning", "probes", "comparison")
    for path in (ROOT / "deblora").rglob("*.py"):
        part = path.relative_to(ROOT / "deblora").parts[0].removesuffix(".py")
        for name in imports(path) if part != "__init__" else ():
            other = name.split(".")[2:3] if name.startswith("rsfast.deblora.") else []
            assert all(o in order and order.index(o) <= order.index(part) for o in other), f"{part} may not use {name}"
