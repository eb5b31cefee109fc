"""One row per operation variant: what the contract suite and the benchmarks need to know about it."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import rsfast
from rsfast.adapter import reference as adapter
from rsfast.lora import reference as lora
from rsfast.similarity import functional
from rsfast.similarity import reference as similarity

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    name: str
    public: Callable
    reference: Callable
    names: tuple[str, ...]  # of the tensors that inputs() makes
    inputs: Callable  # (shape, dtype, device) -> tuple of floating point tensors
    pack: Callable  # those tensors -> (args, kwargs) of public and reference
    terms: Callable  # shape -> longest sum in the maths
    io_bytes: Callable  # (shape, itemsize, backward=False) -> bytes the ideal kernel moves
    flops: Callable  # (shape, backward=False) -> operations of the ideal kernel, which recomputes nothing
    scalars: Callable  # shape -> name of each parameter that is one number, and the shape of what it multiplies
    small: tuple = ()  # shapes for tests: aligned, odd, ones, empty, and both sides of a kernel's choices
    large: tuple = ()  # shapes for benchmarks
    dtypes: tuple = (FP32, FP16, BF16)
    enough: int = 2  # first dimension beyond which the kernels stay the same
    tiny: tuple = ()  # shape for the tests of how it is wired to PyTorch; rows without one only differ in size

    def __str__(self):
        return self.name

    def call(self, fn, tensors, **options):
        args, kwargs = self.pack(tensors)
        return fn(*args, **kwargs, **options)

    def scale(self, tensors, dy) -> dict[str, float]:
        """Norm of the terms in the gradient of each scalar: one sum over everything, so it cancels.

        The other gradients are many sums of the same kind, so the largest of them is the size of the terms.
        """
        tensors = [t.detach().double() for t in tensors]
        scales = {}
        for name, shape in self.scalars(tensors[0].shape).items():
            at = self.names.index(name)
            each = tensors[at].expand(shape).clone().requires_grad_()  # one copy for each number it multiplies
            y = self.call(self.reference, [*tensors[:at], each, *tensors[at + 1 :]])
            scales[name] = torch.autograd.grad(y, each, dy.double())[0].norm().item()
        return scales

    def has_kernel(self) -> bool:
        """No kernel takes float64, so a fused one has to say why it cannot run: because there is none yet?"""
        try:
            self.call(self.public, self.inputs(self.small[0], torch.float64, "cpu"), impl="fused")
        except NotImplementedError as error:
            return "no kernel yet" not in str(error)
        raise AssertionError(f"{self}: a kernel takes float64")


def _draw(shapes, dtype, device):
    """Normal numbers; ``shapes`` holds (shape, standard deviation)."""
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=g) * std).to(device, dtype) for shape, std in shapes]


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
        x = _draw([(shape, 1)], dtype, device)
        shapes = _weights(width, r) + [((), 0.6)] * residual_gate + (_weights(r, s) if shared else [])
        return (*x, *_draw(shapes, FP32 if mixed and dtype != torch.float64 else dtype, device))

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
        drawn = _draw([((n, shape[1]), 1) for n in sizes(shape)], FP32, device)
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


def some_ids(shape, adapters):
    """Every adapter and none of them, in no order."""
    return (7 * torch.arange(math.prod(shape)) % (adapters + 1) - 1).view(shape)


def _factors(width, outputs, rank, parts, adapted, adapters):
    several = (adapters,) * bool(adapters)
    return [
        ((*several, parts * rank, width), 1 / math.sqrt(width)),
        ((*several, adapted, rank), 1 / math.sqrt(rank)),
    ]  # fmt: skip


def lora_case(
    name="", *, rank=8, adapters=0, by_token=False, dropout_p=0.0, slices=None, bias=True, mixed=False, ranks=None,
    small=((33, 40, 24),), large=(), dtypes=(FP32, BF16), tiny=(),
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
        x, weight, *b = _draw(
            [((*tokens, width), 1), ((outputs, width), 1 / math.sqrt(width)), ((outputs,), 0.3)][: 2 + bias],
            dtype, device,
        )  # fmt: skip
        wide = FP32 if mixed and dtype != torch.float64 else dtype
        A, B = _draw(_factors(width, outputs, rank, parts, adapted, adapters), wide, device)
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
        dtypes=dtypes,
        enough=1024,
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
# tokens, inputs, outputs: what the targets are set for, then ViT-B/16, ViT-L/14, a decoder, a UNet, ViT-B/32
LORA = (
    (65792, 1024, 1024), (50432, 768, 768), (50432, 512, 512), (65536, 320, 320),
    (50432, 768, 2304), (50432, 768, 3072), (50432, 3072, 768), (65792, 1024, 3072), (65792, 1024, 4096),
    (65792, 4096, 1024), (50432, 512, 2048), (12800, 768, 768), (12800, 768, 2304), (12800, 768, 3072),
    (16384, 640, 640), (16384, 1280, 1280), (19712, 768, 320), (19712, 768, 640), (19712, 768, 1280),
)  # fmt: skip
FEW_SAMPLES = ((5, 9, 40, 24), (2, 131, 24, 17), (1, 1, 1, 1), (0, 3, 24, 16))
LORA_SAMPLES = ((256, 197, 768, 768), (256, 257, 1024, 1024), (256, 50, 768, 768), (256, 77, 512, 512))
EVERY_LORA, EVERY_SAMPLE = dict(dtypes=EVERY, tiny=(7, 24, 9)), dict(dtypes=EVERY, tiny=(3, 4, 24, 9))

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
    lora_case(rank=16, small=((64, 32, 48), (37, 41, 29), (1, 1, 1), (0, 24, 16)), large=LORA, **EVERY_LORA),
    lora_case("_rank3", rank=3, bias=False, mixed=True),
    lora_case("_rank70", rank=70, small=((37, 72, 40),), dtypes=(FP32,)),
    lora_case("_dropout", dropout_p=0.3, tiny=(7, 24, 9), small=((33, 40, 24), (5, 13, 7))),
    lora_case("_qv", slices=((0, 1 / 3), (2 / 3, 1)), rank=4, tiny=(7, 24, 9), small=((33, 40, 96), (5, 13, 9))),
    lora_case(adapters=3, rank=8, small=FEW_SAMPLES, large=LORA_SAMPLES, **EVERY_SAMPLE),
    lora_case("_tokens", adapters=3, by_token=True, ranks=(8, 1, 5), mixed=True, small=((2, 150, 40, 24),)),
    lora_case(
        "_dropout_qv",
        adapters=2,
        dropout_p=0.3,
        slices=((0, 1 / 3), (2 / 3, 1)),
        rank=4,
        small=((3, 13, 40, 30),),
        dtypes=(FP32,),
    ),
]
