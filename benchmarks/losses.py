"""What is timed of the in-batch losses: ours, the same losses as others compute them, and other libraries' kernels."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor

import rsfast
from benchmarks import harma_losses, oracle, peers
from benchmarks.arms import DEVICE, TIMED, compiled
from benchmarks.measure import PASSES, Call, memory, sets_of_inputs
from rsfast._dispatch import INTERPRET
from rsfast.similarity import reference
from rsfast.testing import assert_within_budget
from tests.cases import BF16, FP32

GRAPH_UP_TO = 4096  # above it a call takes so long that launches do not count, and several of some would not fit
WHOLE_UP_TO = 1 << 17  # above it every gradient in float64 would take minutes: the results are sampled
SAMPLE, PROBE = 256, 2048  # rows of such a sample; batch whose memory says what a larger one needs
SCALARS = {"contrastive_loss": (1 / 0.07, 0.0), "harma_loss": (1 / 0.07, 0.0), "sigmoid_loss": (10.0, -10.0)}


@dataclass(frozen=True)
class Loss:
    """A row of tests/cases.py that is timed, and who else computes it."""

    op: str  # name of the public function and of its reference
    oracle: Callable
    others: dict[str, Callable]  # plain PyTorch of others: name -> function of the tensors and the row's options
    peers: dict[str, peers.Peer]


def _autocast(features: Tensor):
    """As open_clip trains: products in 16 bits, softmax in fp32."""
    return torch.autocast(features.device.type, features.dtype, enabled=features.dtype == BF16)


_clip, _siglip = open_clip.ClipLoss(), SigLipLoss()


def _open_clip(image, text, logit_scale):
    with _autocast(image):
        return _clip(image, text, logit_scale)


def _open_clip_sigmoid(image, text, logit_scale, logit_bias):
    with _autocast(image):
        return _siglip(image, text, logit_scale, logit_bias)


LOSSES = {
    "contrastive_loss": Loss("contrastive_loss", oracle.contrastive, {"open_clip": _open_clip}, peers.CONTRASTIVE),
    "harma_loss_ids": Loss(
        "harma_loss", oracle.harma, {"harma-cleaned": harma_losses.cleaned, "harma": harma_losses.as_written}, {}
    ),
    "triplet_loss_hardest": Loss("triplet_loss", oracle.triplet, {}, {}),
    "sigmoid_loss": Loss("sigmoid_loss", oracle.sigmoid, {"open_clip": _open_clip_sigmoid}, peers.SIGMOID),
    "adaptive_triplet_loss": Loss("adaptive_triplet_loss", oracle.adaptive_triplet, {}, {}),
    "uniformity_loss": Loss("uniformity_loss", oracle.uniformity, {}, {}),
}
# what matters most first: ours, then the strongest others; a batch of a million rows, which only ours takes, between
ORDER = (
    "fused", "memeff", "quack-8192-exp", "siglip-kernel", "harma-cleaned", "open_clip", "reference-compiled",
    "open_clip-compiled", "harma-cleaned-compiled", "fused on a million", "reference", "harma", "chunked",
    "quack-4096-exp", "quack-8192", "quack-4096", "liger-scaled", "liger", "cce-exact", "cce", "inf-cl",
)  # fmt: skip
AT_EVERY_SHAPE = ("fused", "memeff", "open_clip")  # the others at the first, and in plain PyTorch at the smallest too
AIMED_AT = {"liger": (65536, 1024)}  # the shape that a target is for, where it is not the first


def implementations(name: str) -> tuple[str, ...]:
    """Everything that computes this loss, in the order of ORDER."""
    loss = LOSSES[name]
    plain = ["reference", *loss.others]
    found = {"fused", "chunked", *plain, *loss.peers}
    found |= {f"{impl}-compiled" for impl in plain if impl != "harma"}  # its mask from the CPU breaks the graph
    return tuple(impl for impl in ORDER if impl in found)


def grid() -> list[tuple]:
    """(case, shape, dtype, implementation, pass) in the order in which a run that may be cut off should meet them."""
    rows = []
    for impl in ORDER:
        for name in LOSSES:
            for shape in _shapes(name, impl):
                passes = ("forward+backward",) if impl == "fused on a million" else PASSES
                if impl != "fused" and shape[0] > GRAPH_UP_TO:
                    passes = [which for which in passes if which != "backward"]  # a difference of the other two
                rows += [(name, shape, dtype, impl.split()[0], w) for dtype in _dtypes(name) for w in passes]
    return rows


def _shapes(name: str, impl: str) -> tuple:
    shapes = TIMED[name].large if DEVICE == "cuda" else TIMED[name].small[:1]
    usual = [shape for shape in shapes if shape[0] <= WHOLE_UP_TO]
    if impl == "fused on a million":
        return tuple(shape for shape in shapes if shape not in usual)
    if impl not in implementations(name):
        return ()
    if impl in AT_EVERY_SHAPE:
        return tuple(usual)
    if impl in LOSSES[name].peers:
        return (usual[0], *[shape for shape in usual if shape == AIMED_AT.get(impl)])
    return tuple({usual[0]: None, min(usual): None})


def _dtypes(name: str) -> tuple[torch.dtype, ...]:
    if DEVICE != "cuda":
        return (FP32,)
    return (BF16, FP32) if name == "harma_loss_ids" else (BF16,)  # HarMA itself trains in fp32


def why_not(name: str, shape: tuple[int, int], dtype: torch.dtype, impl: str) -> str | None:
    """Why an implementation cannot run here, as far as that is known beforehand; None if nothing is known."""
    if impl == "fused" and not TIMED[name].has_kernel():
        return f"{name} has no kernel yet"
    if impl == "fused" and DEVICE == "cpu" and not INTERPRET:
        return "fused kernels need a GPU, or TRITON_INTERPRET=1 to run slowly without one"
    peer = LOSSES[name].peers.get(impl)
    return peer and peer.why_not(shape[1], dtype)


def build(name: str, dtype: torch.dtype, impl: str, kwargs: dict) -> Callable:
    """The loss, or its several losses, as a function of the tensors alone."""
    loss = LOSSES[name]
    plain = {"reference": getattr(reference, loss.op)} | loss.others
    if impl == "fused":
        return functools.partial(getattr(rsfast, loss.op), impl="fused", **kwargs)
    if impl == "chunked":
        return functools.partial(loss.oracle, oracle.Scores(dtype, rows=4096), **kwargs)
    if impl in plain:
        return functools.partial(plain[impl], **kwargs)
    if impl in loss.peers:
        return loss.peers[impl].bound(SCALARS[loss.op][0])
    return compiled(functools.partial(plain[impl.removesuffix("-compiled")], **kwargs))


def inputs(name: str, shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Unit features with a common mean, as models have them: cosines about 0.2, of partners 0.3; scalars in fp32.

    So most pairs violate the margin of the triplets: nothing is timed on a batch that is already learnt.
    """
    n, d = shape
    g = torch.Generator(DEVICE).manual_seed(0)

    def unit(rows):
        return F.normalize(torch.randn(rows, d, generator=g, device=DEVICE), dim=1)

    common, shared = unit(1) * math.sqrt(0.2), unit(n) * math.sqrt(0.1)
    wide = torch.promote_types(dtype, FP32)
    scale, bias = SCALARS.get(LOSSES[name].op, (0.0, 0.0))
    return [
        torch.tensor(scale if label == "logit_scale" else bias, dtype=wide, device=DEVICE)
        if label.startswith("logit")
        else F.normalize(common + shared + unit(n) * math.sqrt(0.7), dim=1).to(dtype)
        for label in TIMED[name].names
    ]


def weights(name: str, n: int) -> tuple[float, ...]:
    """Gradient of each loss; of HarMA's two such that neither hides the other, for one is a mean and one a sum."""
    return (0.75, 750 / n**2) if LOSSES[name].op == "harma_loss" else (0.75,)


@dataclass(frozen=True)
class Truth:
    """What results are judged by: losses, then gradients, of all rows or of some."""

    tensors: list[Tensor]
    kwargs: dict
    dy: tuple[Tensor, ...]
    gold: list[Tensor]
    eager: list[Tensor]
    scales: dict[str, float]  # size of the terms of each scalar's gradient
    some: Tensor | None = None

    def results(self, run: Callable, leaves: list[Tensor]) -> list[Tensor]:
        y = run(*leaves)
        y = y if isinstance(y, tuple) else (y,)
        grads = torch.autograd.grad(y, leaves, [g.to(loss.dtype) for g, loss in zip(self.dy, y, strict=True)])
        if self.some is not None:
            grads = [g[self.some] for g in grads if g.ndim]
        return [*(loss.detach() for loss in y), *grads]


@functools.cache
def truth(name: str, shape: tuple[int, int], dtype: torch.dtype) -> Truth:
    tensors = inputs(name, shape, dtype)
    kwargs = TIMED[name].pack(tensors)[1]
    dy = tuple(torch.tensor(w, device=DEVICE) for w in weights(name, shape[0]))
    if shape[0] > WHOLE_UP_TO:
        some = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))[:SAMPLE].to(DEVICE)
        gold, eager = oracle.sampled_contrastive(*tensors, some, (FP32, dtype))
        gold, eager = ([loss, *(dy[0] * g for g in grads)] for loss, *grads in (gold, eager))
        return Truth(tensors, kwargs, dy, gold, [eager[0].float(), *(g.to(dtype) for g in eager[1:])], {}, some)
    loss = LOSSES[name].oracle
    gold, scales = oracle.results(loss, tensors, kwargs, dy, torch.float64)
    eager, _ = oracle.results(loss, tensors, kwargs, dy, dtype)
    return Truth(tensors, kwargs, dy, gold, eager, scales)


def errors(names: tuple[str, ...], actual: list[Tensor], gold: list[Tensor]) -> dict[str, float]:
    """``error_<name>``: ||actual - gold|| / ||gold||, the largest where several are of one name."""
    found = {}
    for label, a, g in zip(names, actual, gold, strict=True):
        error = ((a.double() - g.double()).norm() / g.double().norm()).item()
        found[f"error_{label}"] = max(error, found.get(f"error_{label}", 0.0))
    return found


def too_large(name: str, shape: tuple[int, int], dtype: torch.dtype, impl: str) -> str | None:
    """Why plain PyTorch would not fit the memory that is free, judged by what it takes at a small batch."""
    plain = impl in ("reference", *LOSSES[name].others)
    if not plain or DEVICE != "cuda" or shape[0] <= PROBE:
        return None
    small = truth(name, (PROBE, shape[1]), dtype)
    leaves = [t.detach().requires_grad_() for t in small.tensors]
    run = build(name, dtype, impl, small.kwargs)
    call = Call(functools.partial(run, *leaves), leaves, small.dy)
    call.both()  # what a first call allocates once must not be multiplied
    a_pair = memory(call, "forward+backward")[0]["peak_memory"] / PROBE**2
    torch.cuda.empty_cache()
    free, need = torch.cuda.mem_get_info()[0], a_pair * shape[0] ** 2
    return None if need < free else f"{impl} needs {need / 1e9:.0f} GB ({a_pair:.0f} a pair), {free / 1e9:.0f} are free"


@functools.lru_cache(maxsize=2)  # the passes of one implementation follow each other; ours is run beside them
def prepared(name: str, shape: tuple[int, int], dtype: torch.dtype, impl: str) -> tuple[list[Call], dict[str, float]]:
    """An implementation on several inputs, ready to be timed, and its errors.

    Raises:
        AssertionError: Ours is outside the budget, or another library's result is not finite.
    """
    case, known = TIMED[name], truth(name, shape, dtype)
    peer = LOSSES[name].peers.get(impl)
    learned = len(known.tensors) if peer is None or peer.learns_scale else 2
    leaves = [t.detach().clone().requires_grad_() for t in known.tensors[:learned]]
    fixed = known.tensors[learned:]
    run = build(name, dtype, impl, known.kwargs)
    actual = known.results(lambda *moving: run(*moving, *fixed), leaves)
    names = (*["loss"] * len(known.dy), *case.names)[: len(actual)]
    assert all(a.isfinite().all() for a in actual), f"{impl} is not finite"
    if impl in ("fused", "reference", "reference-compiled"):  # chunks by hand add their gradients in 16 bits
        for label, a, g, e in zip(names, actual, known.gold, known.eager, strict=True):
            terms, scale = case.terms(shape), known.scales.get(label)
            assert_within_budget(a, g, e, terms=terms, scale=scale, name=f"{impl} {name} {label}")
    found = errors(names, actual, known.gold[: len(actual)])
    dy = tuple(g.to(loss.dtype) for g, loss in zip(known.dy, actual, strict=False))
    several = sets_of_inputs(2 * leaves[0].nbytes) if shape[0] <= GRAPH_UP_TO else 1
    calls = []
    for i in range(several):
        moved = [t.detach().roll(i, 0).requires_grad_() if t.ndim else t for t in leaves] if i else leaves
        calls.append(Call(functools.partial(run, *moved, *fixed), moved, dy))
    return calls, found
