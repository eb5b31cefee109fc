"""What is timed of the adapter: every operation at its benchmark shapes, in every implementation there is."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import rsfast
from benchmarks.harma import HarmaAdapter
from benchmarks.measure import Call, sets_of_inputs
from rsfast.testing import assert_within_budget
from tests.cases import BF16, CASES, FP32, TEXT, Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INDUCTOR = "inductor" if DEVICE == "cuda" else "aot_eager"  # without a GPU only tracing is checked
FORCED = {  # "harma-sdpa" takes the backend that PyTorch picks
    "harma-sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "harma-sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "harma-sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
GATED = 11  # tensors of a gated adapter without its shared part: x, nine weights, the block's gate


def caption_lengths(batch: int) -> Tensor:
    """Tokens of ``batch`` captions drawn as RSITMD's are spread: mean 12.5, nine in ten within 18, 37 at most."""
    drawn = 8 + torch.empty(batch).exponential_(1 / 4.5, generator=torch.Generator().manual_seed(0))
    return drawn.round().clamp(max=37).long()


def _captions(case: Case) -> Case:
    """The same case with the texts' lengths given: work is counted for valid tokens only, bytes for all."""

    def pack(tensors):
        args, kwargs = case.pack(tensors)
        x = tensors[0]
        return args, kwargs | {"lengths": caption_lengths(len(x)).clamp(max=x.shape[1]).to(x.device)}

    def flops(shape, backward=False):
        return sum(case.flops((1, min(n, shape[1]), shape[2]), backward) for n in caption_lengths(shape[0]).tolist())

    return dataclasses.replace(case, name=f"{case.name}_captions", pack=pack, flops=flops, large=TEXT)


TIMED = {case.name: case for case in CASES if case.large}  # the in-batch losses too, which losses.py times
TIMED["gated_adapter_shared_captions"] = _captions(TIMED["gated_adapter_shared"])
ADAPTERS = {name: case for name, case in TIMED.items() if name.startswith("gated_adapter")}


@dataclasses.dataclass
class Built:
    """An implementation made ready for one case, shape and dtype."""

    run: Callable[[Sequence[Tensor]], Tensor]  # leaves -> y
    leaves: list[Tensor]  # in the order of case.names
    sequence_first: bool = False  # x and y are (L, B, D)

    def turned(self, t: Tensor) -> Tensor:
        """From our layout to this one's, or back."""
        return t.transpose(0, 1).contiguous() if self.sequence_first else t


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def compiled(target, mode="default"):
    """``target`` compiled whole for the shapes it meets; without a GPU only traced."""
    torch.compiler.reset()  # else the limit on recompilations, which counts all shapes, sends later ones to eager
    options = {"mode": mode} if INDUCTOR == "inductor" else {}
    return torch.compile(target, fullgraph=True, dynamic=False, backend=INDUCTOR, **options)


def _ours(case: Case, tensors, prepare=lambda f: f, public=False) -> Built:
    target = functools.partial(case.public, impl="fused") if public else prepare(case.reference)
    return Built(lambda leaves: case.call(target, leaves), _leaves(tensors))


def _harma(case: Case, tensors, prepare=lambda f: f, need_weights=True) -> Built:
    _, kwargs = case.pack(tensors)
    heads = {name: kwargs[name] for name in ("num_heads", "shared_heads") if name in kwargs}
    module = HarmaAdapter(
        tensors[1:10], tensors[10], tensors[GATED:] or None, need_weights=need_weights, **heads
    )  # fmt: skip
    run = prepare(module)
    x = tensors[0].transpose(0, 1).contiguous().requires_grad_()
    return Built(lambda leaves: run(leaves[0]), [x, *module.leaves], sequence_first=True)


def _attending_by(backend: SDPBackend):
    """What makes a function's attention run on this backend alone; where it cannot, it raises."""

    def prepare(function):
        def run(*args):
            with sdpa_kernel(backend):
                return function(*args)

        return run

    return prepare


_tuned = functools.partial(compiled, mode="max-autotune-no-cudagraphs")
OURS = {  # in the order in which they are timed: what is least known first
    "fused": functools.partial(_ours, public=True),
    "reference": _ours,
    "reference-compiled": functools.partial(_ours, prepare=compiled),
    "reference-tuned": functools.partial(_ours, prepare=_tuned),
}
PEERS = {  # of the gated adapter without lengths, which HarMA's does not know
    "harma": _harma,
    "harma-sdpa": functools.partial(_harma, need_weights=False),
    "harma-compiled": functools.partial(_harma, prepare=compiled),
    "harma-sdpa-compiled": functools.partial(_harma, prepare=compiled, need_weights=False),
    "harma-sdpa-tuned": functools.partial(_harma, prepare=_tuned, need_weights=False),
} | {
    name: functools.partial(_harma, prepare=_attending_by(backend), need_weights=False)
    for name, backend in FORCED.items()
}  # fmt: skip
ORDER = (
    "fused", "harma", "harma-sdpa", "reference",
    "reference-compiled", "harma-sdpa-compiled", "harma-compiled", "harma-sdpa-tuned", "reference-tuned",
    *FORCED,
)  # fmt: skip


def implementations(case: Case) -> dict[str, Callable]:
    """Name -> builder, of everything that computes this case."""
    harma = case.public is rsfast.gated_adapter and "captions" not in case.name
    return OURS | PEERS if harma else OURS


def slow_last(rows) -> list[tuple]:
    """The same rows, those that autotune at the very end: one can take as long as fifty others."""
    return sorted(rows, key=lambda row: any(str(value).endswith("-tuned") for value in row))


def _few_compiled(row: tuple) -> bool:
    """Whether it compiles for a batch that no target is for."""
    return row[3].endswith("-compiled") and row[1][0] < 256


def grid() -> list[tuple]:
    """(case, shape, dtype, implementation) in the order in which a run that may be cut off should meet them."""
    return slow_last(sorted(_grid(), key=_few_compiled))


def _grid():
    dtype = BF16 if DEVICE == "cuda" else FP32
    for impl in ORDER:
        for name, case in ADAPTERS.items():
            if impl in implementations(case) and (DEVICE == "cuda" or not impl.endswith(("-tuned", *FORCED))):
                yield from ((name, shape, dtype, impl) for shape in _shapes(case))
    if DEVICE == "cuda":  # HarMA itself trains in fp32
        for impl in ORDER[:4]:
            for name, case in ADAPTERS.items():
                if impl in implementations(case):
                    yield from ((name, shape, FP32, impl) for shape in _shapes(case) if shape[0] >= 256)


def _shapes(case: Case):
    return case.large if DEVICE == "cuda" else case.small[:1]


def short(value) -> str:
    """A shape or a dtype as it stands in a row and in the name of a benchmark."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def work(case: Case, shape, dtype: torch.dtype, which: str) -> dict[str, int]:
    """Bytes and operations of an ideal kernel in one of PASSES."""
    passes = {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}[which]
    return dict(
        moved=sum(case.io_bytes(shape, dtype.itemsize, backward=backward) for backward in passes),
        flops=sum(case.flops(shape, backward=backward) for backward in passes),
    )


@functools.cache
def truth(name: str, shape: tuple[int, ...], dtype: torch.dtype):
    """Inputs, a gradient of the output, and the reference's result in float64 and in ``dtype``."""
    case = TIMED[name]
    tensors = case.inputs(shape, dtype, DEVICE)
    y = case.call(case.reference, tensors)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    results = []
    for kind in (torch.float64, dtype):
        leaves = [t.to(kind).requires_grad_() for t in _leaves(tensors)]
        out = case.call(case.reference, leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dy.to(kind))))
    return tensors, dy, *results


@functools.lru_cache(maxsize=2)  # the passes of one implementation follow each other; ours is run beside them
def prepared(name: str, shape: tuple[int, ...], dtype: torch.dtype, impl: str) -> list[Call]:
    """An implementation on several inputs, ready to be timed.

    Raises:
        AssertionError: Its output or a gradient is wrong: no wrong answer is ever timed.
    """
    case = TIMED[name]
    tensors, dy, gold, eager = truth(name, shape, dtype)
    build = implementations(case)[impl]
    if impl in PEERS:
        plain = PEERS["harma-sdpa" if impl in FORCED else impl.removesuffix("-compiled").removesuffix("-tuned")]
        few = (2, *shape[1:])
        exact = truth(name, few, torch.float64)
        check(case, few, _results(plain(case, exact[0]), exact[1]), *exact)  # the same maths as ours
        eager = _results(plain(case, tensors), dy)  # and compiled, or by another backend, it may round as it does so
    built = build(case, tensors)
    check(case, shape, _results(built, dy), tensors, dy, gold, eager)
    moving = [t.shape == tensors[0].shape for t in tensors]  # inputs, as opposed to weights
    calls = []
    for i in range(sets_of_inputs(tensors[0].nbytes)):
        leaves = [
            t.detach().roll(i, 0).requires_grad_() if move else t
            for t, move in zip(built.leaves, moving, strict=True)
        ]  # fmt: skip
        shifted = built.turned(dy).roll(i, 0) if dy.ndim else dy
        calls.append(Call(functools.partial(built.run, leaves), leaves, shifted))
    return calls


def _results(built: Built, dy: Tensor) -> list[Tensor]:
    """Output and every gradient, in our layout."""
    y = built.run(built.leaves)
    dx, *others = torch.autograd.grad(y, built.leaves, built.turned(dy))
    return [built.turned(y.detach()), built.turned(dx), *others]


def check(case: Case, shape, actual, tensors, dy, gold, eager) -> None:
    """Output and every gradient against float64, within the budget of the contract suite."""
    scale = case.scale(tensors, dy)
    for label, a, g, e in zip(("y", *case.names), actual, gold, eager, strict=True):
        assert_within_budget(a, g, e, terms=case.terms(shape), scale=scale.get(label), name=f"{case.name} {label}")
