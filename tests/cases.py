"""One row per operation variant: what the contract suite and the benchmarks need to know about it."""

import functools
import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import rsfast
from rsfast.adapter import reference as adapter
from rsfast.similarity import functional
from rsfast.similarity import reference as similarity
from tests.case import BF16, FP16, FP32, Case, draw
from tests.lora_cases import LORA

WEIGHTS = adapter.SharedWeights._fields  # the adapter and its sub-adapter have parameters of the same names


def _weights(width, r):
    """Values about 1 behind every product, so that fp16 holds them all, and scores about 1 apart.

    Sharper attention would multiply the rounding of one pass a hundredfold in the next, and hide errors behind it.
    """
    down, square, sharp = 1 / math.sqrt(width), 1 / math.sqrt(r), 1.25 if r > 64 else 1
    return [
        ((r, width), down), ((r,), 0.3), ((3 * r, r), sharp * square), ((3 * r,), 0.3),
        ((r, r), square), ((r,), 0.3), ((width, r), square), ((width,), 0.3), ((), 0.6),
    ]  # fmt: skip


def some_lengths(x):
    """Some tokens, more than there are, none, one, all; and around again."""
    b, tokens, _ = x.shape
    return torch.tensor([max(tokens // 2, 1), tokens + 3, 0, 1, tokens]).repeat(b)[:b].to(x.device)


def _adapter(
    name, *, small, large=(), bottleneck=128, num_heads=8, shared=0, residual_gate=True, lengths=False, mixed=False,
    dtypes=(FP32, FP16, BF16), tiny=(),
):  # fmt: skip
    """Row of the gated adapter; ``shared`` is the number of heads of the shared sub-adapter, 0 for none."""
    r, s = bottleneck, bottleneck // 2
    names = ("x", *WEIGHTS, *["residual_gate"] * residual_gate, *[f"shared.{n}" for n in WEIGHTS if shared])

    def inputs(shape, dtype, device):
        width = shape[2]
        x = draw([(shape, 1)], dtype, device)
        shapes = _weights(width, r) + [((), 0.6)] * residual_gate + (_weights(r, s) if shared else [])
        return (*x, *draw(shapes, FP32 if mixed and dtype != torch.float64 else dtype, device))

    def pack(tensors):
        gated = 10 + residual_gate
        kwargs = dict(num_heads=num_heads, lengths=some_lengths(tensors[0]) if lengths else None)
        if shared:
            kwargs |= dict(shared=rsfast.SharedWeights(*tensors[gated:]), shared_heads=shared)
        return tensors[:gated], kwargs

    def scalars(shape):
        b, tokens, width = shape
        each = {"gate": r, "residual_gate": width if residual_gate else 0, "shared.gate": s if shared else 0}
        return {gate: (b, tokens, wide) for gate, wide in each.items() if wide}

    def flops(shape, backward=False):
        b, tokens, width = shape
        # a token: down and up 4 D R; each pass over in_proj and out_proj 8 R^2, over the scores and values 4 L R
        each = 4 * width * r + 2 * (8 * r * r + 4 * tokens * r)
        if shared:  # its down and up 4 R S, one pass at S
            each += 4 * r * s + 8 * s * s + 4 * tokens * s
        return b * tokens * each * (2 if backward else 1)  # backward: two products of the same size for each one

    def io_bytes(shape, itemsize, backward=False):
        # x in, y out; backward: x and dy in, dx out; the weights are small and stay in the cache
        return math.prod(shape) * itemsize * (3 if backward else 2)

    return Case(
        f"gated_adapter{name}",
        rsfast.gated_adapter,
        adapter.gated_adapter,
        names,
        inputs,
        pack,
        terms=lambda shape: max(shape[0] * shape[1], shape[2], 3 * r),
        io_bytes=io_bytes,
        flops=flops,
        scalars=scalars,
        small=small,
        large=large,
        dtypes=dtypes,
        tiny=tiny,
    )


def stacked(losses: Callable) -> Callable:
    """The same with the losses it returns in one tensor."""

    @functools.wraps(losses)
    def call(*args, **kwargs):
        return torch.stack(losses(*args, **kwargs))

    return call


NUMBERS = {"logit_scale": 5.0, "logit_bias": -2.0}


def _loss(
    op,
    name="",
    *,
    texts=lambda n: n,
    ids=(),
    small=((7, 13), (9, 24)),
    large=(),
    dtypes=(FP32, BF16),
    tiny=(),
    **options,
):
    """Row of a loss over the pairs of a batch of shape (N, D), which has ``texts(N)`` texts.

    ``ids`` are the names of the ids to give; rows 2 k and 2 k + 1 share one.
    """
    public, reference = getattr(functional, op), getattr(similarity, op)
    tensors = [p.name for p in inspect.signature(public).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    numbers = [tensor for tensor in tensors if tensor in NUMBERS]
    sides = len(tensors) - len(numbers)
    if op == "harma_loss":
        public, reference = stacked(public), stacked(reference)

    def sizes(shape):
        return (shape[0], texts(shape[0]))[:sides]

    def inputs(shape, dtype, device):
        drawn = draw([((n, shape[1]), 1) for n in sizes(shape)], FP32, device)
        features = [F.normalize(t, dim=1).to(dtype) for t in drawn]
        wide = torch.promote_types(dtype, FP32)  # as models keep what is one number
        return (*features, *[torch.tensor(NUMBERS[number], dtype=wide, device=device) for number in numbers])

    def pack(tensors):
        each = {name: torch.arange(len(t), device=t.device) // 2 for name, t in zip(ids, tensors, strict=False)}
        return tensors, options | each

    def io_bytes(shape, itemsize, backward=False):
        # features in; backward: features in once more, their gradients out
        return sum(sizes(shape)) * shape[1] * itemsize * (2 if backward else 1)

    def flops(shape, backward=False):
        # the scores 2 N M D, half of them where both sides are one; backward: as many again for either side's gradient
        each = 2 * sizes(shape)[0] * sizes(shape)[-1] * shape[1]
        if backward and options.get("negatives") == "hardest":
            return 12 * shape[0] * shape[1]  # two rows for each of 2 N negatives and N partners
        return (each if sides == 1 else 2 * each) if backward else each // (3 - sides)

    return Case(
        f"{op}{name}",
        public,
        reference,
        tuple(tensors),
        inputs,
        pack,
        terms=lambda shape: max(*shape, *sizes(shape)),
        io_bytes=io_bytes,
        flops=flops,
        scalars=lambda shape: {number: (sizes(shape)[0], sizes(shape)[-1]) for number in numbers},
        small=small,
        large=large,
        dtypes=dtypes,
        enough=1536,
        tiny=tiny,
    )


VISION = ((256, 50, 768), (64, 50, 768))
TEXT = ((256, 77, 512), (64, 77, 512))
LONG_VISION = ((256, 197, 768), (64, 197, 768), (256, 257, 1024), (64, 257, 1024))
ODD, LONG, ONES, EMPTY = (2, 13, 37), (1, 77, 40), (1, 1, 1), (0, 5, 24)
# interpreted kernels take seconds, so most rows are as narrow as the kernels allow, and head sizes get one dtype
NARROW = dict(bottleneck=32, num_heads=2, tiny=(2, 5, 24))
HEADS = dict(dtypes=(FP32, FP16, BF16) if torch.cuda.is_available() else (FP32,))
EVERY = (FP32, FP16, BF16)
# the first is the one that every implementation is timed at
HARMA_PAIRS, PAIRS = ((32768, 512), (428, 512)), ((65536, 512), (428, 512))
ALL_PAIRS = ((65536, 512), (32768, 512), (428, 512), (65536, 1024), (16384, 512), (4096, 512), (1048576, 512))
MAIN = dict(dtypes=EVERY, tiny=(7, 13))

CASES = [
    _adapter("", small=((1, 16, 32), ODD, ONES, EMPTY, (1, 64, 24), LONG), large=VISION + LONG_VISION + TEXT),
    _adapter("_shared", shared=8, small=(ODD, EMPTY, (1, 64, 24), LONG), large=TEXT + VISION),
    _adapter("_narrow", small=(ODD, (2, 65, 8), (1, 130, 8)), **NARROW),
    _adapter("_ungated", residual_gate=False, small=(ODD, (1, 66, 8)), **NARROW),
    _adapter("_lengths", lengths=True, small=((5, 11, 24), EMPTY, (2, 67, 8)), **NARROW),
    _adapter("_shared_lengths", shared=2, lengths=True, small=((4, 11, 24), (2, 67, 8)), **NARROW),
    _adapter("_mixed_shared", mixed=True, shared=4, dtypes=(FP16, BF16), small=(ODD,), **NARROW),
    _adapter("_33x3", bottleneck=33, num_heads=3, small=(ODD, (1, 66, 8)), **HEADS),
    _adapter("_96x8", bottleneck=96, num_heads=8, small=(ODD,), **HEADS),
    _adapter("_48x4_shared_3", bottleneck=48, num_heads=4, shared=8, small=(ODD, (1, 70, 24)), **HEADS),
    _adapter("_48x4_shared_6", bottleneck=48, num_heads=4, shared=4, small=(ODD,), **HEADS),
    _adapter("_64x1", bottleneck=64, num_heads=1, small=(ODD,), **HEADS),
    _adapter("_256x8_shared", bottleneck=256, num_heads=8, shared=8, small=((1, 9, 37),), **HEADS),
    _adapter("_256x4", bottleneck=256, num_heads=4, small=((1, 65, 24),), **HEADS),
    _loss("contrastive_loss", **MAIN, large=ALL_PAIRS),
    _loss("contrastive_loss", "_ids", ids=("image_ids",), dtypes=EVERY),
    _loss("contrastive_loss", "_rect", ids=("image_ids", "text_ids"), texts=lambda n: 2 * n + 3, tiny=(7, 13)),
    _loss("contrastive_loss", "_smooth", label_smoothing=0.1),
    _loss("one_way_loss", texts=lambda n: 2 * n + 3, offset=5, tiny=(7, 13)),
    _loss("triplet_loss", **MAIN),
    _loss("triplet_loss", "_hardest", negatives="hardest", tiny=(7, 13), large=PAIRS),
    _loss("adaptive_triplet_loss", **MAIN, large=HARMA_PAIRS),
    _loss("adaptive_triplet_loss", "_masked", mask_same_id=True, ids=("image_ids",)),
    _loss("adaptive_triplet_loss", "_gamma1", gamma=1.0),
    _loss("adaptive_triplet_loss", "_hardest", negatives="hardest"),
    _loss("harma_loss", dtypes=EVERY),
    _loss("harma_loss", "_ids", **MAIN, ids=("image_ids",), large=HARMA_PAIRS),
    _loss("sigmoid_loss", **MAIN, large=((65536, 768),)),
    _loss("one_way_sigmoid_loss", texts=lambda n: 2 * n + 3, offset=5, tiny=(7, 13)),
    _loss("uniformity_loss", **MAIN, large=((65536, 512),)),
    *LORA,
]
