"""Every kernel compiles for three GPU generations, without spills where it ships tuned, within the shared memory.

Those that take most of it compile for a GPU of workstations too, which has less.
"""

import ast
import json
import os
import pathlib
import subprocess
import sys

import rsfast
from tests.aot import SHARED_MEMORY

TARGETS = 80, 90, 100
ROOT = pathlib.Path(rsfast.__file__).parent


def compile_ahead(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def is_kernel(node):
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)


def kernels_in_the_source():
    """Names of all entry kernels; other jitted functions are parts of them."""
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        yield from (node.name for node in tree.body if is_kernel(node) and node.name.endswith("_kernel"))


def compiled():
    # bf16 everywhere; the other dtypes only where the spills are judged
    rows = compile_ahead(*TARGETS) + compile_ahead(90, "--dtypes", "float16", "float32")
    rows += compile_ahead(120, "--cases", "hardest")
    for name in {row["kernel"] for row in rows} - {row["kernel"] for row in rows if row["target"] == 80}:
        rows += compile_ahead(80, 100, "--dtypes", "float32", "--kernel", name)  # bf16 does not need it
    return rows


def test_kernels_compile_for_gpus_that_are_not_there():
    """All of them everywhere, without spills on sm_90; one test, so that one process of several compiles."""
    rows = compiled()
    names = set(kernels_in_the_source())
    for target in TARGETS:
        assert {row["kernel"] for row in rows if row["target"] == target} == names
    spills = [row for row in rows if row["target"] == 90 and row["stack"]]
    assert not spills, "\n".join(f"{r['kernel']} {r['types']}: {r['stack']} bytes, {r['constants']}" for r in spills)
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY[row["target"]] * 1024, row
