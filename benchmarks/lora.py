"""What is timed of a linear layer with LoRA: ours, PEFT's, compositions of PyTorch's products, and the layer alone."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import rsfast
from benchmarks import lora_peers as peers
from benchmarks.arms import DEVICE, TIMED, compiled, slow_last
from benchmarks.measure import Call, sets_of_inputs
from rsfast._dispatch import INTERPRET
from rsfast.lora import reference
from rsfast.testing import assert_within_budget
from tests.case import BF16, FP32, Case
from tests.lora_cases import linear_case

NAMES = ("y", "x", "lora_A", "lora_B")  # what is judged: the output, then gradients
SEED = 2**40 + 7
DTYPE = BF16 if DEVICE == "cuda" else FP32
LINEAR, SAMPLES = TIMED["lora_linear"].large, TIMED["batched_lora_linear"].large
SQUARE = LINEAR[:4]  # what the targets are set for


@dataclass(frozen=True)
class Row:
    """A linear layer at its benchmark shapes, the first ``main`` of which are timed before anything else."""

    name: str
    case: Case  # of these sizes, for its bytes and operations
    rank: int
    shapes: tuple[tuple[int, ...], ...]
    main: int = 0
    dropout_p: float = 0.0
    adapters: int = 0
    order: str = ""  # of the samples' ids: "random" or "sorted"

    @property
    def scaling(self) -> tuple[float, ...]:
        return tuple(1.5 / 2 ** (g % 2) for g in range(max(self.adapters, 1)))

    def ids(self, samples: int) -> tuple[int, ...]:
        """As many samples of each adapter, as far as that goes."""
        ids = torch.arange(samples) % self.adapters if self.adapters else torch.arange(0)
        shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
        return tuple((shuffled if self.order == "random" else ids.sort().values).tolist())


def _single(rank: int, shapes, main: int = 0, dropout_p: float = 0.0) -> Row:
    case = linear_case("", rank=rank, dropout_p=dropout_p)
    return Row(f"lora_linear_r{rank}{'_dropout' * bool(dropout_p)}", case, rank, shapes, main, dropout_p)


def _several(adapters: int, order: str, shapes=SAMPLES[:1], main: int = 0) -> Row:
    name = f"batched_lora_linear_g{adapters}_{order}"
    return Row(name, linear_case("", rank=16, adapters=adapters), 16, shapes, main, 0.0, adapters, order)


ROWS = {
    row.name: row
    for row in (
        _single(16, LINEAR, main=4),
        _several(8, "random", SAMPLES, main=2),
        _several(64, "random", main=1),
        _single(16, (*SQUARE, (50432, 768, 3072), (12800, 768, 768)), main=2, dropout_p=0.1),
        _single(8, ((65536, 320, 320), (16384, 1280, 1280), (50432, 768, 768))),
        _single(64, ((65792, 1024, 1024), (50432, 768, 768))),
        _single(4, ((50432, 768, 768),)),
        _several(16, "random"),
        _several(4, "random"),
        _several(1, "sorted"),
        _several(8, "sorted"),
        _several(64, "sorted"),
    )
}

SINGLE = {  # of (layer, compiled or not)
    "frozen": peers.frozen,
    "peft-bf16": functools.partial(peers.peft, autocast_adapter_dtype=False),
    "composed": peers.composed,
    "peft": peers.peft,
    "merged": peers.merged,
}
SEVERAL = {"frozen": peers.frozen, "peft-mixed": peers.peft_mixed, "bmm": peers.bmm}
BY_ROW = {"loop": peers.loop, "grouped_mm": peers.grouped_mm}  # want to know the tokens a sample
OURS, OWN = ("auto", "fused"), ("auto", "fused", "composed", "loop")  # OWN are held to the budget
FORWARD_ONLY = ("merged", "peft-mixed", "vllm-form")
# what matters most first; the second group only where everyone is timed
FIRST = ("auto", "frozen", "peft-bf16", "composed", "peft-mixed", "grouped_mm", "loop", "fused")
THEN = ("peft", "peft-bf16-compiled", "bmm", "vllm-form", "merged", "peft-bf16-tuned")

# of issue 4: theirs / ours at least, by width of a square layer, or by number of adapters; forward and backward but for
# PEFT's mixed batch, which has no backward. "auto" is ours over the frozen layer, at most. Nothing here was measured.
TARGETS = {
    "lora_linear_r16": {
        "peft-bf16": {1024: 1.7, 768: 1.9, 512: 2.2, 320: 2.8},
        "composed": {1024: 1.25, 768: 1.35, 512: 1.5, 320: 1.8},
        "auto": {1024: 1.22, 768: 1.28},
    },
    "batched_lora_linear_g8_random": {"peft-mixed": {768: 2.2, 1024: 2.2}, "grouped_mm": {768: 1.25, 1024: 1.25}},
    "batched_lora_linear_g64_random": {"peft-mixed": {768: 5.0}, "grouped_mm": {768: 1.25}},
}


def target(name: str, shape: tuple[int, ...], impl: str, which: str) -> float | None:
    """The one that this row is for, or None."""
    *_, width, outputs = shape
    fits = width == outputs and (which == "forward+backward") == (impl not in FORWARD_ONLY)
    return TARGETS.get(name, {}).get(impl, {}).get(width) if fits else None


def implementations(row: Row) -> tuple[str, ...]:
    """Everything that computes this row, in the order in which it is timed."""
    found = {*OURS, *(SEVERAL | BY_ROW if row.adapters else SINGLE)}
    found |= {"vllm-form"} if row.adapters else {"peft-bf16-compiled"}
    if DEVICE == "cuda" and not row.adapters:
        found |= {"peft-bf16-tuned"}
    if row.dropout_p:
        found -= {"merged"}
    return tuple(impl for impl in FIRST + THEN if impl in found)


def grid(main: bool) -> list[tuple]:
    """(row, shape, implementation, pass): what has targets, or all the rest; what matters most first."""
    rows, both = [], ("forward+backward", "forward")
    for impls, rest, passes in (
        ((FIRST, False, both[:1]), (FIRST, False, both[1:]))
        if main
        else ((FIRST, True, both[:1]), (THEN, False, both), (FIRST, True, both[1:]))
    ):
        for row in ROWS.values():
            until = row.main if impls is FIRST else max(row.main, 1)
            for shape in _shapes(row)[until:] if rest else _shapes(row)[:until]:
                for impl in [impl for impl in implementations(row) if impl in impls]:
                    # an implementation of one pass comes when the first is asked for
                    mine = both[1:] * (passes[0] == both[0]) if impl in FORWARD_ONLY else passes
                    rows += [(row.name, shape, impl, which) for which in mine]
    return slow_last(rows)


def _shapes(row: Row) -> tuple:
    if DEVICE == "cuda":
        return row.shapes
    return ((4, 6, 32, 48),) if row.adapters else ((24, 32, 48),)


def why_not(row: Row, dtype: torch.dtype, impl: str) -> str | None:
    """Why an implementation cannot run here, as far as that is known beforehand."""
    if impl == "fused" and not row.case.has_kernel():
        return f"{row.case} has no kernel yet"
    if impl == "fused" and DEVICE == "cpu" and not INTERPRET:
        return "fused kernels need a GPU, or TRITON_INTERPRET=1 to run slowly without one"
    if impl == "grouped_mm" and DEVICE == "cuda" and dtype != BF16:
        return f"F.grouped_mm takes bf16 on a GPU, not {dtype}"
    return None


@functools.lru_cache(maxsize=1)
def tensors(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, peers.Layer, Tensor]:
    """x, the layer, and a gradient of the output: random everywhere, B too, for zeros hide mistakes and save power."""
    row, (*tokens, width, outputs) = ROWS[name], shape
    g = torch.Generator(DEVICE).manual_seed(0)

    def draw(*size, std=1.0):
        return torch.randn(size, generator=g, device=DEVICE) * std

    several = (row.adapters,) * bool(row.adapters)
    weight, bias = draw(outputs, width, std=width**-0.5).to(dtype), draw(outputs, std=0.3).to(dtype)
    A, B = draw(*several, row.rank, width, std=width**-0.5), draw(*several, outputs, row.rank, std=row.rank**-0.5)
    layer = peers.Layer(weight, bias, A, B, row.scaling, row.dropout_p, ids=row.ids(tokens[0]))
    return draw(*tokens, width).to(dtype), layer, draw(*tokens, outputs).to(dtype)


def exact(layer: peers.Layer) -> peers.Layer:
    """The same, dropping what the reference drops."""
    return replace(layer, seed=torch.full((), SEED, device=layer.weight.device)) if layer.dropout_p else layer


def equation(layer: peers.Layer, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """By the reference; with several adapters one after the other, each on its own rows alone."""
    weight, bias, A, B = (t.to(x.dtype) for t in (layer.weight, layer.bias, A, B))
    if not layer.ids:
        return reference.lora_linear(x, weight, bias, A, B, layer.scaling[0], layer.dropout_p, exact(layer).seed)
    ids = torch.tensor(layer.ids)
    order = ids.argsort(stable=True).to(x.device)
    parts = x[order].split(torch.bincount(ids, minlength=len(A)).tolist())
    y = [reference.lora_linear(part, weight, bias, *one) for part, *one in zip(parts, A, B, layer.scaling, strict=True)]
    return torch.cat(y)[order.argsort()]


def results(run: Callable, x: Tensor, factors: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output and its gradients."""
    leaves = [x.detach().requires_grad_(), *factors]
    y = run(leaves[0])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@functools.lru_cache(maxsize=1)
def truth(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """In float64, and as plain PyTorch rounds in ``dtype``."""
    x, layer, dy = tensors(name, shape, dtype)
    found = []
    for kind in (torch.float64, dtype):
        factors = layer.factors(torch.promote_types(kind, FP32))
        found.append(results(lambda x, f=factors: equation(layer, x, *f), x.to(kind), factors, dy.to(kind)))
    return found[0], found[1]


def build(row: Row, layer: peers.Layer, shape: tuple[int, ...], impl: str) -> peers.Built:
    """An implementation of this layer as a function of x, and the factors that it trains."""
    if impl in OURS:
        return _ours(row, layer, impl)
    if impl == "vllm-form":
        return _vllm_form(layer)
    if impl in BY_ROW:
        return BY_ROW[impl](layer, shape[1])
    plain = impl.removesuffix("-compiled").removesuffix("-tuned")
    run, factors = (SEVERAL if row.adapters else SINGLE)[plain](layer)
    if impl == plain:
        return run, factors
    mode = "max-autotune-no-cudagraphs" if impl.endswith("-tuned") else "default"
    return compiled(run, mode=mode), factors


def _ours(row: Row, layer: peers.Layer, impl: str) -> peers.Built:
    base, rank = peers.linear(layer.weight, layer.bias), layer.lora_B.shape[-1]
    alpha = [scaling * rank for scaling in layer.scaling]
    if row.adapters:
        module = rsfast.BatchedLoRALinear(base, row.adapters, rank, alpha, layer.dropout_p, impl=impl)
        module.adapter_ids = rsfast.AdapterBatch(torch.tensor(layer.ids, device=layer.weight.device), row.adapters)
    else:
        module = rsfast.LoRALinear(base, rank, alpha[0], layer.dropout_p, impl=impl)
    with torch.no_grad():
        module.lora_A.copy_(layer.lora_A)
        module.lora_B.copy_(layer.lora_B)
    factors = [module.lora_A, module.lora_B]
    if layer.seed is None:
        return module, factors
    options = dict(dropout_p=layer.dropout_p, seed=layer.seed, impl=impl)
    return lambda x: rsfast.lora_linear(x, module.weight, module.bias, *factors, module.scaling, **options), factors


def _vllm_form(layer: peers.Layer) -> peers.Built:
    """Our own halves, added to the finished output of the layer, as vLLM serves."""
    batch = rsfast.AdapterBatch(torch.tensor(layer.ids, device=layer.weight.device), len(layer.lora_A))
    scaling = torch.tensor(layer.scaling, device=layer.weight.device)

    def run(x):
        base = torch.nn.functional.linear(x, layer.weight, layer.bias)
        return rsfast.lora_expand(rsfast.lora_shrink(x, layer.lora_A, scaling, batch), layer.lora_B, base, batch)

    return run, []


def errors(actual: list[Tensor], gold: list[Tensor], names: tuple[str, ...] = NAMES) -> dict[str, float]:
    """``error_<name>``: ||actual - gold|| / ||gold||, of the output and of each gradient there is."""
    pairs = zip(names, actual, gold, strict=False)
    return {f"error_{name}": ((a.double() - g.double()).norm() / g.double().norm()).item() for name, a, g in pairs}


def judge(name: str, shape: tuple[int, ...], dtype: torch.dtype, impl: str) -> dict[str, float]:
    """Errors of an implementation; of a compiled one with dropout those that it has uncompiled.

    Raises:
        AssertionError: Ours, or a composition of ours, is outside the budget; or a result is not finite.
    """
    row, (x, layer, dy), (gold, eager) = ROWS[name], tensors(name, shape, dtype), truth(name, shape, dtype)
    judged = impl.removesuffix("-compiled").removesuffix("-tuned") if layer.dropout_p else impl
    run, factors = build(row, exact(layer), shape, judged)
    if impl == "frozen":
        gold, eager = alone(layer, x, dy)
    if impl in FORWARD_ONLY:
        with torch.no_grad():
            actual = [run(x)]
    else:
        actual = results(run, x, factors, dy)
    assert all(a.isfinite().all() for a in actual), f"{impl} is not finite"
    if impl in OWN:
        terms = max(row.case.terms(shape), 1)
        for label, a, g, e in zip(NAMES, actual, gold, eager, strict=False):
            assert_within_budget(a.to(dtype), g, e.to(dtype), terms=terms, name=f"{impl} {name} {label}")
    return errors(actual, gold)


def alone(layer: peers.Layer, x: Tensor, dy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The frozen layer's results, which has no LoRA."""
    kinds = (torch.float64, x.dtype)
    run = torch.nn.functional.linear
    return tuple(
        results(lambda x: run(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype)), x.to(kind), [], dy)
        for kind in kinds
    )


@functools.lru_cache(maxsize=2)  # the passes of one implementation follow each other; ours is run beside them
def prepared(name: str, shape: tuple[int, ...], dtype: torch.dtype, impl: str) -> tuple[list[Call], dict[str, float]]:
    """An implementation on several inputs, ready to be timed, and its errors.

    Raises:
        AssertionError: As :func:`judge`.
    """
    found = judge(name, shape, dtype, impl)
    x, layer, dy = tensors(name, shape, dtype)
    run, factors = build(ROWS[name], layer, shape, impl)
    calls = []
    for i in range(sets_of_inputs(x.nbytes)):
        moved = x.roll(i, 0).requires_grad_()
        calls.append(Call(functools.partial(run, moved), [moved, *factors], dy.roll(i, 0)))
    return calls, found
