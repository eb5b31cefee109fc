"""What is compiled ahead is what a launch on a GPU looks for in Triton's cache, to the letter."""

import inspect
import json
import os
import pathlib
import subprocess
import sys

import rsfast

# a program of its own, for the kernels are not interpreted in it; prints the kernels and those whose key differs
SCRIPT = """
import inspect, itertools, json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from rsfast import _dispatch
from tests import aot, cases, kmeans_cases

target = GPUTarget("cuda", 90, 32)
driver.set_active(type("Driver", (), dict(
    get_current_target=lambda self: target, get_current_device=lambda self: 0, get_current_stream=lambda self, d: 0
))())
backend = triton.compiler.make_backend(target)
wanted, differ, names = [], set(), set()
triton.compiler.compile = lambda src, target, options: wanted.append((src, options))
_dispatch.INTERPRET, _dispatch.capability = True, lambda device: 90
launch_on_a_gpu = JITFunction.run

def run(self, *args, grid, warmup, **kwargs):
    self.device_caches.clear()
    launch_on_a_gpu(self, *args, grid=grid, warmup=True, **kwargs)
    (src, options), launch = wanted.pop(), aot.launch_of(self, args, kwargs)
    ours = aot.source(launch)
    same = ours.hash() == src.hash()
    same &= backend.parse_options(dict(launch[2])).hash() == backend.parse_options(dict(options)).hash()
    names.add(self.fn.__name__)
    differ.update([self.fn.__name__] * (not same))

JITFunction.run = run
rows = {case.name: case for case in (*cases.CASES, *kmeans_cases.CASES)}
for name, dtype in itertools.product(CASES, (torch.bfloat16, torch.float32)):
    aot._call(rows[name], rows[name].small[0], dtype)
print(json.dumps([sorted(names), sorted(differ)]))
"""
CASES = ("gated_adapter_shared_lengths", "harma_loss_ids", "triplet_loss_hardest", "batched_lora_linear_dropout_qv")


def test_a_launch_finds_what_was_compiled_ahead():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = inspect.cleandoc(SCRIPT).replace("CASES, (torch", f"{CASES}, (torch")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment,
        cwd=pathlib.Path(rsfast.__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    names, differ = json.loads(done.stdout)
    assert len(names) > 15 and not differ, differ
