"""What the designs rest on, measured before any kernel of ours: rates of products, memory, launches, attention.

    python -m benchmarks.facts --out FOLDER

Each is written as soon as it is known; one that fails is reported, and the others go on.
"""

import argparse
import functools
import itertools
import pathlib
import sys
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

import rsfast
from benchmarks import measure, results
from rsfast._dispatch import INTERPRET

# (m, k, n) of bf16 products: a large one; square layers of LoRA; the adapter's down, in_proj and up in ViT-B/16
LARGE = ((8192, 8192, 8192),)
LAYERS = ((65792, 1024, 1024), (50432, 768, 768), (50432, 512, 512), (65536, 320, 320))
ADAPTER = ((50432, 768, 128), (50432, 128, 384), (50432, 128, 768))
# what 16 columns more cost: in the inner dimension (A x appended to x), in the outer one (A appended to W)
WIDENED = ((65792, 1040, 1024), (65792, 1024, 1040), (50432, 784, 768), (50432, 768, 784))
SCORES = ((65536, 512), (32768, 512), (65536, 1024))  # of the losses
HEADS = ((256, 8, 197, 16), (256, 8, 257, 16), (256, 8, 77, 16))  # samples, heads, tokens, width of a head
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TILES = (  # of the Triton product: rows, columns, inner, warps, stages
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 256, 64, 4, 4),
    (128, 128, 32, 4, 5),
)  # fmt: skip
BARRIERS, READ, DEVICE = 64, 2**30, "cuda"  # times; numbers


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """c = a b^T, a (m, k), b (n, k), all contiguous, fp32 sums; row tiles in groups of 8, so that b stays cached.

    With TMA a and b are tensor descriptors of blocks (BM, BK) and (BN, BK).
    """
    rows_of_tiles, columns_of_tiles = tl.cdiv(m, BM), tl.cdiv(n, BN)
    group = tl.program_id(0) // (8 * columns_of_tiles)
    height = tl.minimum(rows_of_tiles - group * 8, 8)
    inside = tl.program_id(0) % (8 * columns_of_tiles)
    rows = (group * 8 + inside % height) * BM + tl.arange(0, BM)
    columns = inside // height * BN + tl.arange(0, BN)
    at = (rows % m).to(tl.int64)[:, None] * k + tl.arange(0, BK)
    bt = (columns % n).to(tl.int64)[:, None] * k + tl.arange(0, BK)
    row, column = (group * 8 + inside % height) * BM, inside // height * BN
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, k, BK, num_stages=STAGES):
        if TMA:
            a, b = a_ptr.load([row, start]), b_ptr.load([column, start])
        else:
            within = tl.arange(0, BK)[None, :] < k - start
            a = tl.load(a_ptr + at + start, mask=within, other=0.0)
            b = tl.load(b_ptr + bt + start, mask=within, other=0.0)
        total = tl.dot(a, tl.trans(b), total)
    c = c_ptr + rows.to(tl.int64)[:, None] * n + columns
    tl.store(c, total.to(c_ptr.dtype.element_ty), mask=(rows[:, None] < m) & (columns < n))


@triton.jit
def read_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Reads everything, writes a number a program."""
    total = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK, num_stages=4):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def barriers_kernel(counters_ptr, TIMES: tl.constexpr):
    """All programs of the grid wait for each other, as the losses' and k-means' one launch does."""
    for i in tl.static_range(TIMES):
        tl.debug_barrier()
        tl.atomic_add(counters_ptr + i, 1, sem="release", scope="gpu")
        arrived = tl.atomic_add(counters_ptr + i, 0, sem="acquire", scope="gpu")
        while arrived < tl.num_programs(0):
            arrived = tl.atomic_add(counters_ptr + i, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()


def triton_product(a: Tensor, b: Tensor, tiles: tuple[int, ...], tma: bool) -> Tensor:
    """a b^T by a plain Triton kernel."""
    (m, k), n, (bm, bn, bk, warps, stages) = a.shape, len(b), tiles
    c = torch.empty(m, n, dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(m, bm) * triton.cdiv(n, bn),)
    if tma:
        a, b = TensorDescriptor.from_tensor(a, [bm, bk]), TensorDescriptor.from_tensor(b, [bn, bk])
    product_kernel[grid](a, b, c, m, n, k, BM=bm, BN=bn, BK=bk, STAGES=stages, TMA=tma, num_warps=warps)
    return c


def steady(run: Callable, times: int = 10) -> float:
    """Median seconds of a call among several, so that only the first waits for its launch."""

    def several():
        for _ in range(times):
            run()

    return measure.event_seconds(several, rounds=10) / times


def bf16(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.bfloat16, device=DEVICE)


def products(shapes, with_triton: bool = False) -> dict[str, float]:
    """cuBLAS's rate, and the best of TILES by pointers or TMA: ``triton_tax`` is how many times as long that takes."""
    found = {}
    for m, k, n in shapes:
        a, b, flops, name = bf16(m, k), bf16(n, k), 2 * m * k * n, f"{m}x{k}x{n}"
        seconds = steady(lambda a=a, b=b: torch.mm(a, b.mT))
        found[f"matmul_{name}_flops_per_second"] = flops / seconds
        if not with_triton:
            continue
        exact, took = torch.mm(a, b.mT).float(), {}
        for how in itertools.product(TILES, (False, True)):
            run = functools.partial(triton_product, a, b, *how)
            try:
                error = (run().float() - exact).norm() / exact.norm()
            except triton.runtime.errors.OutOfResources:
                continue
            assert error < 1e-2, f"the Triton product of {name} by {how} is wrong by {error}"
            took[how] = steady(run)
        best = min(took, key=took.get)
        found |= {f"triton_matmul_{name}_flops_per_second": flops / took[best]}
        found |= {f"triton_matmul_{name}_tiles": "x".join(map(str, best[0])) + "-tma" * best[1]}
        found |= {f"triton_tax_{name}": took[best] / seconds}
    return found


def memory() -> dict[str, float]:
    """Reading alone; what LoRA's shrink reads of x; a reduction that writes as little, by PyTorch."""
    x = torch.randint(-9, 9, (READ,), dtype=torch.int32, device=DEVICE)
    programs = 8 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs, dtype=torch.int32, device=DEVICE)

    def read():
        read_kernel[(programs,)](x, out, x.numel(), BLOCK=4096, num_warps=8)

    read()
    assert out.sum().item() == x.sum().item(), "not everything was read"
    found = {"read_bytes_per_second": x.nbytes / measure.event_seconds(read)}
    found["torch_amax_bytes_per_second"] = x.nbytes / measure.event_seconds(functools.partial(torch.amax, x))
    for m, k, _ in LAYERS[:2]:
        x, low = bf16(m, k), torch.randn(16, k, device=DEVICE)
        seconds = steady(lambda x=x, low=low: rsfast.lora_shrink(x, low))
        found[f"lora_shrink_{m}x{k}x16_bytes_per_second"] = x.nbytes / seconds
        seconds = steady(functools.partial(torch.mm, x, low.bfloat16().mT))
        found[f"torch_shrink_{m}x{k}x16_bytes_per_second"] = x.nbytes / seconds
        norm = functools.partial(F.layer_norm, x, (k,))
        found[f"torch_layer_norm_{m}x{k}_bytes_per_second"] = 2 * x.nbytes / steady(norm)
    return found


def launches() -> dict[str, float]:
    """A launch within a graph, and a barrier of a whole grid within a launch."""
    one, graph = torch.zeros(1, device=DEVICE), torch.cuda.CUDAGraph()
    one.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(200):
            one.add_(1)
    found = {"launch_in_a_graph_seconds": measure.event_seconds(graph.replay) / 200}
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    counters = torch.zeros(BARRIERS, dtype=torch.int32, device=DEVICE)

    def wait(times):
        barriers_kernel[(programs,)](counters, TIMES=times, num_warps=4, launch_cooperative_grid=True)

    def opened() -> tuple:
        counters.zero_()
        return ()

    wait(BARRIERS)
    assert (counters == programs).all(), "a barrier was passed early"
    least, most = (measure.event_seconds(lambda t=t: wait(t), opened) for t in (8, BARRIERS))
    return found | {"grid_barrier_seconds": (most - least) / (BARRIERS - 8)}


def attention() -> dict[str, float | str]:
    """Forward, and forward and backward, of each backend at the adapters' heads; which one PyTorch picks itself."""
    found = {}
    for shape in HEADS:
        q, k, v = (bf16(*shape).requires_grad_() for _ in range(3))
        name = "x".join(map(str, shape))
        picked = SDPBackend(torch._fused_sdp_choice(q, k, v))
        found[f"sdpa_{name}_picked"] = picked.name.lower()
        dy = torch.randn_like(q)
        for backend, kind in BACKENDS.items():

            def forward(q=q, k=k, v=v, kind=kind):
                with sdpa_kernel(kind):
                    return F.scaled_dot_product_attention(q, k, v)

            def both(forward=forward, leaves=(q, k, v), dy=dy):
                return torch.autograd.grad(forward(), leaves, dy)

            try:
                found[f"sdpa_{name}_{backend}_seconds"] = steady(torch.no_grad()(forward))
                found[f"sdpa_{name}_{backend}_both_seconds"] = steady(both)
            except RuntimeError as error:
                found[f"sdpa_{name}_{backend}"] = f"refused: {str(error).splitlines()[0][:100]}"
    return found


def gemms() -> dict[str, float]:
    """The four products of a loss."""
    found = {}
    for shape in SCORES:
        name = "x".join(map(str, shape))
        found |= {f"gemms_{name}_{which}_seconds": took for which, took in measure.gemm_seconds(*shape).items()}
    return found


GROUPS: dict[str, Callable[[], dict]] = {  # what most depends on first, what compiles much last
    "machine": measure.facts,
    "layers": functools.partial(products, LAYERS + WIDENED + ADAPTER + LARGE),
    "losses": gemms,
    "memory": memory,
    "launches": launches,
    "attention": attention,
} | {  # each kept by itself: the first compiles for all, and time may end with any
    f"Triton, {'x'.join(map(str, shape))}": functools.partial(products, (shape,), with_triton=True)
    for shape in LAYERS + LARGE + ADAPTER
}


def run(groups: dict[str, Callable[[], dict]], keep: Callable[[dict], None]) -> list[str]:
    """Measure each group and hand on what it found at once; the names of those that failed."""
    failed = []
    for name, group in groups.items():
        try:
            found = group()
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        keep(found)
        for fact, value in found.items():
            print(f"{fact} = {value if isinstance(value, str) else format(value, '.4g')}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=results.FOLDER, help="folder of the results files")
    parser.add_argument("--commit", help="commit to write, for a copy of the tree without its git folder")
    args = parser.parse_args()
    if INTERPRET or not torch.cuda.is_available():
        parser.error("facts are about a GPU, and there is none")
    failed = run(GROUPS, results.Writer(args.out, results.provenance(args.commit)).facts)
    print(*itertools.chain(["failed:"], failed or ["none"]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
