"""A training step of the LoRA in a tower as ViT-L/14: forward, backward, AdamW; ours, and PEFT's."""

import functools
import gc

import pytest
import torch
from torch import Tensor, nn

import rsfast.models
from benchmarks import lora_memory
from benchmarks.arms import DEVICE, INDUCTOR, short
from benchmarks.lora_memory import RANK, TOWER
from benchmarks.measure import captured_step, measure_step
from rsfast.testing import assert_within_budget
from tests.case import BF16, FP32

DTYPE = BF16 if DEVICE == "cuda" else FP32
BATCHES = (64, 128) if DEVICE == "cuda" else (2,)
# name: (whose tower, compiled, as one CUDA graph), what is least known first
STEPS = {
    "auto": ("auto", False, False),
    "peft-bf16": ("peft-bf16", False, False),
    "auto-graph": ("auto", False, True),
    "peft-bf16-graph": ("peft-bf16", False, True),
    "peft": ("peft", False, False),
    "peft-bf16-compiled": ("peft-bf16", True, False),  # which takes minutes
}
_, TOKENS, WIDTH, LAYERS, HEAD = TOWER
JUDGED = ("0.q_proj", f"{LAYERS - 1}.fc2")  # whose gradients are looked at


@functools.cache
def drawn() -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer by its path; B is not zero, for zeros hide mistakes."""
    g = torch.Generator(DEVICE).manual_seed(1)
    found = {}
    for path, layer in base().named_modules():
        if isinstance(layer, nn.Linear):
            outputs, inputs = layer.weight.shape
            A = torch.randn(RANK, inputs, generator=g, device=DEVICE) * inputs**-0.5
            found[path] = A, torch.randn(outputs, RANK, generator=g, device=DEVICE) * 0.02
    return found


def base() -> nn.Module:
    torch.manual_seed(0)
    return lora_memory.tower("frozen", WIDTH, LAYERS, HEAD)


def tower(whose: str) -> tuple[nn.Module, dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """The same tower and factors whoever computes it, and the factors that it trains."""
    torch.manual_seed(0)
    model = lora_memory.tower(whose, WIDTH, LAYERS, HEAD)
    if whose.startswith("peft"):
        named, factors = dict(model.named_parameters()), {}
        for path in drawn():
            factors[path] = tuple(named[f"{path}.lora_{which}.default.weight"] for which in "AB")
    else:
        factors = {path: (m.lora_A, m.lora_B) for path, m in rsfast.models.lora_layers(model).items()}
    with torch.no_grad():
        for path, both in drawn().items():
            for mine, one in zip(factors[path], both, strict=True):
                mine.copy_(one)
    return model, factors


def images(batch: int) -> tuple[Tensor, Tensor]:
    """What enters the tower, and a gradient of what leaves it."""
    g = torch.Generator(DEVICE).manual_seed(2)
    return tuple(torch.randn(batch, TOKENS, WIDTH, generator=g, device=DEVICE).to(DTYPE) for _ in range(2))


@functools.cache
def truth(kind: torch.dtype) -> list[Tensor]:
    """Output and judged gradients with every product of factors added to its weight, in ``kind``."""
    model, (x, dy) = base().to(kind).eval(), images(2)
    factors = {path: [t.to(kind).requires_grad_() for t in both] for path, both in drawn().items()}
    weights = {f"{path}.weight": model.get_parameter(f"{path}.weight") + B @ A for path, (A, B) in factors.items()}
    y = torch.func.functional_call(model, weights, x.to(kind))
    grads = torch.autograd.grad(y, [t for path in JUDGED for t in factors[path]], dy.to(kind))
    return [y.detach(), *grads]


def errors(whose: str) -> dict[str, float]:
    """Of a tower without dropout.

    Raises:
        AssertionError: Ours is outside the budget, or another's is another function.
    """
    model, factors = tower(whose)
    x, dy = images(2)
    y = model.eval()(x)
    grads = torch.autograd.grad(y, [t for path in JUDGED for t in factors[path]], dy)
    found, names = {}, ("y", *(f"{path}.lora_{which}" for path in JUDGED for which in "AB"))
    for name, a, g, e in zip(names, [y.detach(), *grads], truth(torch.float64), truth(DTYPE), strict=True):
        if whose == "auto":
            assert_within_budget(a.to(DTYPE), g, e, terms=2 * TOKENS * LAYERS, name=f"{whose} {name}")
        found[f"error_{name}"] = ((a.double() - g).norm() / g.norm()).item()
        assert found[f"error_{name}"] < 0.1, f"{whose} computes something else: {name} is off by {found}"
    return found


def step_of(impl: str, batch: int):
    """(a step, what its capture held at most or None)."""
    whose, compiled, graph = STEPS[impl]
    model, factors = tower(whose)
    x, dy = images(batch)
    called = model.train()
    if compiled:
        torch.compiler.reset()
        called = torch.compile(model, backend=INDUCTOR, dynamic=False)
    options = dict(fused=DEVICE == "cuda", capturable=graph and DEVICE == "cuda")
    optimizer = torch.optim.AdamW([t for both in factors.values() for t in both], lr=1e-4, **options)

    def step():
        called(x).backward(dy)
        optimizer.step()
        optimizer.zero_grad()

    return captured_step(step) if graph else (step, None)


def flops(batch: int) -> int:
    """Frozen products forward and once more for x; attention three times; the factors three times."""
    frozen, scores = 24 * WIDTH**2, 4 * TOKENS * WIDTH
    return batch * TOKENS * LAYERS * (2 * frozen + 3 * scores + 3 * 2 * RANK * 18 * WIDTH)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("impl", STEPS)
def bench_step_lora(record, impl, batch):
    if STEPS[impl][0].startswith("peft"):
        pytest.importorskip("peft")
    gc.collect()
    found = errors(STEPS[impl][0])
    step, peak = step_of(impl, batch)
    if peak is not None:
        found["peak_memory"] = peak
    ours = None if impl == "auto" or DEVICE != "cuda" else lambda: step_of("auto", batch)[0]
    key = dict(family="step", op="lora_vit_l_14", shape=f"{batch}", dtype=short(DTYPE), impl=impl) | {"pass": "step"}
    record(
        key,
        lambda benchmark, clock: measure_step(benchmark, step, beside=ours, samples=batch) | found,
        moved=None,
        flops=flops(batch),
    )
