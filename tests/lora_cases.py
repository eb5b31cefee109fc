"""Rows of the linear layers with LoRA, and of their two halves."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

import rsfast
from rsfast.lora import reference as lora
from rsfast.tune import SHAPES
from tests.case import BF16, FP16, FP32, Case, draw


def some_ids(shape, adapters):
    """Every adapter and none of them, in no order."""
    return (7 * torch.arange(math.prod(shape)) % (adapters + 1) - 1).view(shape)


def _factors(width, outputs, rank, parts, adapted, adapters):
    several = (adapters,) * bool(adapters)
    return [
        ((*several, parts * rank, width), 1 / math.sqrt(width)),
        ((*several, adapted, rank), 1 / math.sqrt(rank)),
    ]  # fmt: skip


def linear_case(
    name="", *, rank=8, adapters=0, by_token=False, dropout_p=0.0, slices=None, bias=True, mixed=False, ranks=None,
    small=((33, 40, 24),), large=(), ahead=(), dtypes=(FP32, BF16), tiny=(),
):  # fmt: skip
    """Row of a linear layer with LoRA, of shape (tokens, K, N); with ``adapters`` (samples, tokens, K, N).

    ``slices`` are shares of N; ``ranks`` those of the adapters, if they differ.
    """
    public = rsfast.batched_lora_linear if adapters else rsfast.lora_linear
    names = ("x", "weight", *["bias"] * bias, "lora_A", "lora_B")

    def columns(outputs):
        return None if slices is None else tuple((round(a * outputs), round(b * outputs)) for a, b in slices)

    def inputs(shape, dtype, device):
        *tokens, width, outputs = shape
        parts, adapted = 1, outputs
        if slices is not None:
            parts, adapted = len(slices), sum(end - start for start, end in columns(outputs))
        x, weight, *b = draw(
            [((*tokens, width), 1), ((outputs, width), 1 / math.sqrt(width)), ((outputs,), 0.3)][: 2 + bias],
            dtype, device,
        )  # fmt: skip
        wide = FP32 if mixed and dtype != torch.float64 else dtype
        A, B = draw(_factors(width, outputs, rank, parts, adapted, adapters), wide, device)
        for g, r in enumerate(ranks or ()):
            A.view(adapters, parts, rank, width)[g, :, r:] = 0
            B[g, :, r:] = 0
        return x, weight, *b, A, B

    def pack(tensors):
        x, weight, *b, A, B = tensors
        options = dict(dropout_p=dropout_p, seed=torch.full((), 2**40 + 7, device=x.device)) if dropout_p else {}
        if slices is not None:
            options |= dict(slices=columns(len(weight)))
        if not adapters:
            return (x, weight, b[0] if bias else None, A, B, 1.7), options
        scaling = torch.linspace(0.5, 2, adapters).to(x)  # in the dtype of x, for the oracle has one too
        ids = some_ids(x.shape[:-1] if by_token else x.shape[:1], adapters).to(x.device)
        return (x, weight, b[0] if bias else None, A, B, scaling, ids), options

    def io_bytes(shape, itemsize, backward=False):
        *tokens, width, outputs = shape
        m, parts = math.prod(tokens), len(slices or (0,))
        weights = outputs * width + max(adapters, 1) * rank * (parts * width + outputs)
        # x in, y out; backward: dy and x in, dx out; s in either, and what dropout kept, one bit an element
        each = m * (width + outputs + parts * rank) + weights + backward * (m * width + weights - outputs * width)
        return round(each * itemsize + (m * width / 8 if dropout_p else 0))

    def flops(shape, backward=False):
        *tokens, width, outputs = shape
        m, parts = math.prod(tokens), len(slices or (0,))
        adapted = outputs if slices is None else sum(end - start for start, end in columns(outputs))
        # base and LoRA; backward, the base being frozen: dx as large as the forward, and the factors' gradients
        low = 2 * m * rank * (parts * width + adapted)
        return 2 * m * width * outputs + (2 if backward else 1) * low

    return Case(
        f"{public.__name__}{name}",
        public,
        getattr(lora, public.__name__),
        names,
        inputs,
        pack,
        terms=lambda shape: max(*shape, math.prod(shape[:-2])),
        io_bytes=io_bytes,
        flops=flops,
        scalars=lambda shape: {},
        small=small,
        large=large,
        ahead=ahead,
        dtypes=dtypes,
        enough=8 if adapters else 1024,
        tiny=tiny,
    )


def _half(
    op, name="", *, rank=8, adapters=0, slices=None, small=((33, 40), (5, 13)), ahead=(), dtypes=(FP32, BF16), tiny=()
):
    """Row of a half of a LoRA, of shape (tokens, width); with ``adapters`` (samples, tokens, width)."""
    shrinks = op == "lora_shrink"
    names = ("x", "lora_A") if shrinks else ("s", "lora_B", "base")

    def columns(outputs):
        return None if slices is None else tuple((round(a * outputs), round(b * outputs)) for a, b in slices)

    def inputs(shape, dtype, device):
        *tokens, width = shape
        parts, adapted = 1, width
        if slices is not None:
            parts, adapted = len(slices), sum(end - start for start, end in columns(width))
        A, B = _factors(width, width, rank, parts, adapted, adapters)
        each = [((*tokens, width), 1), A] if shrinks else [((*tokens, parts * rank), 1), B, ((*tokens, width), 1)]
        return tuple(draw(each, dtype, device))

    def pack(tensors):
        options = {} if slices is None else dict(slices=columns(tensors[2].shape[-1]))
        if not adapters:
            return (*tensors, 1.7) if shrinks else tensors, options
        x = tensors[0]
        ids = some_ids(x.shape[:1], adapters).to(x.device)
        return (*tensors, *[torch.linspace(0.5, 2, adapters).to(x)] * shrinks, ids), options

    def io_bytes(shape, itemsize, backward=False):
        m, width = math.prod(shape[:-1]), shape[-1]
        # shrink reads x, writes s; expand reads s and base, writes y; backward the same, and dx or dbase
        return (m * (rank + width * (2 if backward or not shrinks else 1)) + max(adapters, 1) * rank * width) * itemsize

    return Case(
        f"{op}{name}",
        getattr(rsfast, op),
        getattr(lora, op),
        names,
        inputs,
        pack,
        terms=lambda shape: max(*shape, math.prod(shape[:-1])),
        io_bytes=io_bytes,
        flops=lambda shape, backward=False: 2 * math.prod(shape) * rank * (2 if backward else 1),
        scalars=lambda shape: {},
        small=small,
        ahead=ahead,
        dtypes=dtypes,
        enough=1024,
        tiny=tiny,
    )


def from_norm(x, weight, bias, lora_A, lora_B, scaling, *, impl="auto"):
    """A layer behind a LayerNorm, whose output it need not keep."""
    wide = x.to(torch.promote_types(x.dtype, FP32))
    normed, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, 1e-5)
    source = rsfast.Source("layer_norm", x, mean, rstd)
    return rsfast.lora_linear(normed.to(x.dtype), weight, bias, lora_A, lora_B, scaling, source=source, impl=impl)


def from_gelu(x, weight, bias, lora_A, lora_B, scaling, *, impl="auto"):
    """A layer behind a GELU, whose output it need not keep."""
    source = rsfast.Source("gelu", x)
    return rsfast.lora_linear(F.gelu(x), weight, bias, lora_A, lora_B, scaling, source=source, impl=impl)


def _made(public, **options):
    def plainly(x, weight, bias, lora_A, lora_B, scaling):
        made = F.gelu(x) if public is from_gelu else F.layer_norm(x, x.shape[-1:])
        return lora.lora_linear(made, weight, bias, lora_A, lora_B, scaling)

    return replace(linear_case(**options), name=f"lora_linear_{public.__name__}", public=public, reference=plainly)


EVERY = (FP32, FP16, BF16)
AHEAD = dict(ahead=((1024, 768, 768),))
QV = ((0, 1 / 3), (2 / 3, 1))
MANY = tuple((i / 32, (i + 1) / 32) for i in range(32))  # keys and values of a diffusion model's cross-attentions
ODD, ONES, EMPTY = (37, 41, 29), (1, 1, 1), (0, 24, 16)
LARGE_SAMPLES = ((256, 197, 768, 768), (256, 257, 1024, 1024), (256, 50, 768, 768), (256, 77, 512, 512))
FEW_SAMPLES = ((5, 9, 40, 24), (2, 131, 24, 17), (1, *ONES), (0, *EMPTY))
LORA = [
    linear_case(rank=16, small=((64, 32, 48), ODD, ONES, EMPTY), large=SHAPES, dtypes=EVERY, tiny=(7, 24, 9)),
    linear_case("_rank3", rank=3, bias=False, mixed=True),
    linear_case("_rank70", rank=70, small=((37, 72, 40),), dtypes=(FP32,)),
    linear_case("_dropout", **AHEAD, dropout_p=0.3, small=((33, 40, 24), (5, 13, 7)), tiny=(7, 24, 9)),
    linear_case(
        "_qv", ahead=((1024, 768, 2304),), slices=QV, rank=4, small=((33, 40, 96), (5, 13, 9)), tiny=(7, 24, 9)
    ),
    linear_case(
        "_many", ahead=((1024, 768, 24960),), slices=MANY, rank=2, small=((19, 24, 100),), dtypes=(FP32,)
    ),  # fmt: skip
    linear_case(adapters=3, small=FEW_SAMPLES, large=LARGE_SAMPLES, dtypes=EVERY, tiny=(3, 4, 24, 9)),
    linear_case("_tokens", adapters=3, by_token=True, ranks=(8, 1, 5), mixed=True, small=((2, 150, 40, 24),)),
    linear_case(
        "_dropout_qv",
        adapters=2,
        dropout_p=0.3,
        slices=QV,
        rank=4,
        small=((3, 13, 40, 30),),
        ahead=((8, 197, 768, 2304),),
        dtypes=(FP32,),
    ),  # fmt: skip
    _made(from_norm, rank=16, **AHEAD),
    _made(from_gelu, rank=16, **AHEAD),
    _half("lora_shrink", ahead=((1024, 768),), tiny=(5, 13)),
    _half("lora_shrink", "_batched", adapters=3, small=((3, 5, 24),), tiny=(3, 2, 9)),
    _half("lora_expand", ahead=((1024, 768),), tiny=(5, 13)),
    _half("lora_expand", "_batched", adapters=3, ahead=((8, 197, 768),), small=((3, 5, 24),), tiny=(3, 2, 9)),
    _half("lora_expand", "_qv", slices=QV, dtypes=(FP32,)),
]
