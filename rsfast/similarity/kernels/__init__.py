"""Triton kernels of the in-batch losses: S = I T^T is worked through tile by tile and never stored."""

import torch
from torch import Tensor

from rsfast._dispatch import once_differentiable, register
from rsfast._tiles import multiprocessors
from rsfast.similarity.kernels import hardest, pairwise, small, softmax
from rsfast.similarity.reference import Negatives

_OPTIONS = (
    "bool triplet, bool mask_same, float margin, float gamma, float weight, float smoothing, int offset, bool both_ways"
)


def _fake_softmax_fwd(
    image, text, logit_scale, image_ids, text_ids, triplet, mask_same, margin, gamma, weight, smoothing, offset,
    both_ways,
):  # fmt: skip
    def new(*shape, dtype=torch.float64):
        return image.new_empty(shape, dtype=dtype)

    N, M = len(image), len(text)
    blocks = -(-N // softmax.BLOCK) + (-(-M // softmax.BLOCK) if both_ways else 0)
    contrastive, triplet = new(dtype=torch.float32), new(dtype=torch.float32)
    wide, targets = new(1, dtype=torch.int32), []
    if image_ids is not None:
        targets = [new(n, dtype=dtype) for dtype in (torch.int32, torch.float32) for n in (N, M)]
    return contrastive, triplet, new(N), new(M if both_ways else 0), new(blocks, 3), wide, targets


def _fake_softmax_bwd(
    dcontrastive, dtriplet, image, text, logit_scale, rows, columns, found, wide, targets, diagonal, triplet,
    mask_same, margin, gamma, weight, smoothing, offset, both_ways, need_image, need_text,
):  # fmt: skip
    features = (x.new_empty(len(x) if need else 0, x.shape[1]) for x, need in ((image, need_image), (text, need_text)))
    return *features, logit_scale.new_empty(logit_scale.shape)


def _fake_pairwise_fwd(
    image, text, logit_scale, logit_bias, image_ids, text_ids, mask_same, margin, gamma, weight, offset, need_image,
    need_text, need_scalars,
):  # fmt: skip
    def new(*shape):
        return image.new_empty(shape, dtype=torch.float32)

    D = image.shape[1]
    return new(), new(len(image) if need_image else 0, D), new(len(text) if need_text else 0, D), new(), new()


def _fake_small(
    image, text, logit_scale, image_ids, contrastive, triplet, margin, gamma, adaptive, mask_same, smoothing, grad
):
    def new(*shape):
        return image.new_empty(shape, dtype=torch.float32)

    (N, D), losses = image.shape, contrastive + triplet
    return new(), new(), new(losses, N if grad else 0, D), new(losses, N if grad else 0, D), new()


def _fake_weigh(dcontrastive, dtriplet, by_image, by_text, by_scale, dtype):
    _, N, D = by_image.shape
    return (*(by_image.new_empty(N, D, dtype=dtype) for _ in range(2)), by_image.new_empty(()))


_softmax_fwd = register(
    "softmax_loss_fwd(Tensor image, Tensor text, Tensor logit_scale, Tensor? image_ids, Tensor? text_ids, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    softmax.fwd,
    _fake_softmax_fwd,
)
_softmax_bwd = register(
    "softmax_loss_bwd(Tensor dcontrastive, Tensor? dtriplet, Tensor image, Tensor text, Tensor logit_scale, "
    f"Tensor rows, Tensor columns, Tensor found, Tensor wide, Tensor[] targets, bool diagonal, {_OPTIONS}, "
    "bool need_image, bool need_text) "
    "-> (Tensor, Tensor, Tensor)",
    softmax.bwd,
    _fake_softmax_bwd,
)
_pairwise_fwd = register(
    "pairwise_loss(Tensor image, Tensor text, Tensor? logit_scale, Tensor? logit_bias, Tensor? image_ids, "
    "Tensor? text_ids, bool mask_same, float margin, float gamma, float weight, int offset, bool need_image, "
    "bool need_text, bool need_scalars) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    pairwise.fwd,
    _fake_pairwise_fwd,
)


_small_losses = register(
    "small_losses(Tensor image, Tensor text, Tensor? logit_scale, Tensor? image_ids, bool contrastive, bool triplet, "
    "float margin, float gamma, bool adaptive, bool mask_same, float smoothing, bool grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    small.step,
    _fake_small,
)
_weigh = register(
    "small_losses_weigh(Tensor? dcontrastive, Tensor? dtriplet, Tensor by_image, Tensor by_text, Tensor by_scale, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    small.weigh,
    _fake_weigh,
)


class _Small(torch.autograd.Function):
    """Gradients come with the losses, of each by itself, for backward knows how much either counts."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, image_ids, *options):
        contrastive, triplet, *grads = _small_losses(image, text, logit_scale, image_ids, *options, True)
        ctx.save_for_backward(*grads)
        ctx.asked, ctx.dtype = options[:2], image.dtype
        return contrastive, triplet

    @staticmethod
    @once_differentiable
    def backward(ctx, *dlosses):
        dlosses = (d if asked else None for d, asked in zip(dlosses, ctx.asked, strict=True))
        return _wanted(_weigh(*dlosses, *ctx.saved_tensors, ctx.dtype), ctx.needs_input_grad)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, logit_scale, image_ids, text_ids, *options):
        contrastive, triplet, *kept, targets = _softmax_fwd(image, text, logit_scale, image_ids, text_ids, *options)
        ctx.save_for_backward(image, text, logit_scale, *kept, *targets)
        ctx.options = text_ids is None, *options
        return contrastive, triplet

    @staticmethod
    @once_differentiable
    def backward(ctx, *dlosses):
        need, saved = ctx.needs_input_grad, ctx.saved_tensors
        return _wanted(_softmax_bwd(*dlosses, *saved[:7], list(saved[7:]), *ctx.options, need[0], need[1]), need)


def _wanted(grads, need) -> tuple[Tensor | None, ...]:
    """Gradients that are wanted, and None for what is no feature or number."""
    return *(g if wanted else None for g, wanted in zip(grads, need, strict=False)), *[None] * (len(need) - len(grads))


class _Pairwise(torch.autograd.Function):
    """The gradients come with the loss: they do not depend on a sum over all pairs, as the softmax's do."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, logit_bias, image_ids, text_ids, *options):
        need = ctx.needs_input_grad
        loss, *grads = _pairwise_fwd(
            image, text, logit_scale, logit_bias, image_ids, text_ids, *options, need[0], need[1], need[2] or need[3]
        )
        ctx.save_for_backward(*grads)
        ctx.like = [(t.dtype, t.shape) if t is not None else None for t in (image, text, logit_scale, logit_bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        need = ctx.needs_input_grad
        grads = (
            (dloss * g).to(like[0]).reshape(like[1]) if wanted else None
            for g, like, wanted in zip(ctx.saved_tensors, ctx.like, need[:4], strict=True)
        )
        return *grads, *[None] * (len(need) - 4)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _softmax(image, text, logit_scale, image_ids, text_ids, *options) -> tuple[Tensor, Tensor]:
    if _wants_grad(image, text, logit_scale):
        return _Softmax.apply(image, text, logit_scale, image_ids, text_ids, *options)
    return _softmax_fwd(image, text, logit_scale, image_ids, text_ids, *options)[:2]


def _fits_one_launch(image: Tensor, text: Tensor, losses: int = 1) -> bool:
    return small.supports(len(image), len(text), image.shape[1], image.dtype, multiprocessors(image.device), losses)


def _small(image, text, logit_scale, image_ids, *options) -> tuple[Tensor, Tensor]:
    if _wants_grad(image, text, logit_scale):
        return _Small.apply(image, text, logit_scale, image_ids, *options)
    return _small_losses(image, text, logit_scale, image_ids, *options, False)[:2]


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, image_ids: Tensor | None, text_ids: Tensor | None,
    label_smoothing: float,
) -> Tensor:  # fmt: skip
    if text_ids is None and _fits_one_launch(image, text):
        return _small(
            image, text, logit_scale, image_ids, True, False, 0.0, 0.0, False, False, label_smoothing
        )[0]  # fmt: skip
    return _softmax(
        image, text, logit_scale, image_ids, text_ids, False, False, 0.0, 0.0, 0.0, label_smoothing, 0, True
    )[0]  # fmt: skip


def one_way_loss(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, *, offset: int, query_ids: Tensor | None,
    key_ids: Tensor | None, label_smoothing: float,
) -> Tensor:  # fmt: skip
    return _softmax(
        queries, keys, logit_scale, query_ids, key_ids, False, False, 0.0, 0.0, 0.0, label_smoothing, offset, False
    )[0]  # fmt: skip


def harma_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, image_ids: Tensor | None, margin: float, gamma: float
) -> tuple[Tensor, Tensor]:
    if _fits_one_launch(image, text, losses=2):
        return _small(image, text, logit_scale, image_ids, True, True, margin, gamma, True, False, 0.0)
    return _softmax(image, text, logit_scale, image_ids, None, True, False, margin, gamma, 0.5, 0.0, 0, True)


def triplet_loss(
    image: Tensor, text: Tensor, *, margin: float, gamma: float, weight: float, negatives: Negatives,
    image_ids: Tensor | None, text_ids: Tensor | None, mask_same_id: bool,
) -> Tensor:  # fmt: skip
    """``weight`` times the sum; ``gamma`` 0 is the plain hinge."""
    if negatives == "hardest":
        return hardest.triplet_loss(image, text, image_ids, text_ids, mask_same_id, margin, gamma, weight)
    if text_ids is None and weight in (0.5, 1) and _fits_one_launch(image, text):
        adaptive = weight == 0.5
        return _small(image, text, None, image_ids, False, True, margin, gamma, adaptive, mask_same_id, 0.0)[1]
    return _pairwise(image, text, None, None, image_ids, text_ids, mask_same_id, margin, gamma, weight, 0)


def sigmoid_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, *, offset: int) -> Tensor:
    return _pairwise(image, text, logit_scale, logit_bias, None, None, False, 0.0, 0.0, 1 / len(image), offset)


def _pairwise(image, text, logit_scale, logit_bias, *options) -> Tensor:
    if _wants_grad(image, text, logit_scale, logit_bias):
        return _Pairwise.apply(image, text, logit_scale, logit_bias, *options)
    return _pairwise_fwd(image, text, logit_scale, logit_bias, *options, False, False, False)[0]
