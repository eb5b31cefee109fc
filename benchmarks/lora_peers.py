"""A linear layer with LoRA as others compute it: PEFT, and compositions of PyTorch's own products.

Every builder takes a :class:`Layer` and returns a function of ``x`` and the factors that it trains. What is known of a
batch beforehand, the order of its rows by adapter, is made once and not timed, which favours the compositions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast.lora import reference

Built = tuple[Callable[[Tensor], Tensor], list[Tensor]]


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer and its LoRA; several of them, with an axis of adapters in front, if ``ids`` are given."""

    weight: Tensor
    bias: Tensor
    lora_A: Tensor  # fp32, as trained
    lora_B: Tensor
    scaling: tuple[float, ...]
    dropout_p: float = 0.0
    seed: Tensor | None = None  # drops what the reference drops, so that the result can be judged; None: as each draws
    ids: tuple[int, ...] = ()  # of the samples

    def factors(self, dtype: torch.dtype) -> list[Tensor]:
        """Copies that a gradient is taken of."""
        return [t.detach().to(dtype, copy=True).requires_grad_() for t in (self.lora_A, self.lora_B)]

    def drop(self, x: Tensor) -> tuple[Tensor, Tensor | None, float]:
        """What dropout leaves of ``x``, which elements those are, and what they were multiplied by."""
        if not self.dropout_p:
            return x, None, 1.0
        if self.seed is None:
            return *torch.native_dropout(x, self.dropout_p, True), 1 / (1 - self.dropout_p)
        keep = reference.keep_mask(x.shape[:-1].numel(), x.shape[-1], self.dropout_p, self.seed).view(x.shape)
        share = 1 - reference.levels(self.dropout_p) / reference.LEVELS
        return reference.dropped(x, self.dropout_p, self.seed), keep, 1 / share

    def sorted_rows(self, repeats: int) -> tuple[Tensor | None, Tensor | None, list[int]]:
        """(order, its inverse, where each adapter's rows end); None and None where they are sorted as they come."""
        ids = torch.tensor(self.ids).repeat_interleave(repeats)
        ends = torch.bincount(ids, minlength=len(self.lora_A)).cumsum(0).tolist()
        if (ids[1:] >= ids[:-1]).all():
            return None, None, ends
        order = ids.argsort(stable=True)
        return order.to(self.weight.device), order.argsort().to(self.weight.device), ends


class _Exact(nn.Module):
    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.drop(x)[0]


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """``nn.Linear`` around these tensors, frozen."""
    module = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    module.weight, module.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    return module


def _peft(layer: Layer, autocast_adapter_dtype: bool) -> nn.Module:
    """PEFT's layer; the model around it, whose forward only passes on, is left out."""
    from peft import LoraConfig, get_peft_model

    rank = layer.lora_B.shape[-1]
    several = [t.view(-1, *t.shape[-2:]) for t in (layer.lora_A, layer.lora_B)]
    model = nn.ModuleDict({"linear": linear(layer.weight, layer.bias)})
    options = dict(autocast_adapter_dtype=autocast_adapter_dtype)
    for g, (A, B, scaling) in enumerate(zip(*several, layer.scaling, strict=True)):
        config = LoraConfig(
            r=rank, lora_alpha=scaling * rank, lora_dropout=layer.dropout_p, target_modules=["linear"]
        )  # fmt: skip
        if g == 0:
            model = get_peft_model(model, config, adapter_name="0", **options)
        else:
            model.add_adapter(str(g), config, **options)
        module = model.base_model.model["linear"]
        with torch.no_grad():
            module.lora_A[str(g)].weight.copy_(A)
            module.lora_B[str(g)].weight.copy_(B)
    if layer.seed is not None:
        module.lora_dropout["0"] = _Exact(layer)
    return module


def peft(layer: Layer, autocast_adapter_dtype: bool = True) -> Built:
    module = _peft(layer, autocast_adapter_dtype)
    return module, [module.lora_A["0"].weight, module.lora_B["0"].weight]


def peft_mixed(layer: Layer) -> Built:
    """A batch of several adapters, which PEFT has for inference only."""
    module, names = _peft(layer, False).eval(), [str(g) for g in layer.ids]
    return lambda x: module(x, adapter_names=names), []


class _Composed(torch.autograd.Function):
    """cuBLAS products with the updates added in place, dY B taken once; the base weight gets no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, drop):
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        y = F.linear(x, weight, bias)
        kept_x, keep, ctx.factor = drop(x)
        s = F.linear(kept_x, A)
        y.addmm_(s, B.T, alpha=scaling)
        ctx.save_for_backward(kept_x, keep, s, weight, A, B)
        ctx.scaling, ctx.dtype = scaling, lora_A.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        kept_x, keep, s, weight, A, B = ctx.saved_tensors
        ds = torch.mm(dy, B).mul_(ctx.scaling)
        dB, dA = torch.mm(dy.T, s).mul_(ctx.scaling), torch.mm(ds.T, kept_x)
        dx = torch.mm(dy, weight)
        if keep is None:
            dx.addmm_(ds, A)
        else:
            dx.addcmul_(torch.mm(ds, A), keep.to(dx.dtype), value=ctx.factor)
        return dx, None, None, dA.to(ctx.dtype), dB.to(ctx.dtype), None, None


def composed(layer: Layer) -> Built:
    A, B = layer.factors(torch.promote_types(layer.weight.dtype, torch.float32))
    scaling = layer.scaling[0]
    return lambda x: _Composed.apply(x, layer.weight, layer.bias, A, B, scaling, layer.drop), [A, B]


class _Loop(torch.autograd.Function):
    """The same, adapter by adapter on rows sorted by adapter."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, rows):
        order, inverse, ends = rows
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        x2 = x.flatten(0, -2)
        xs = x2 if order is None else x2[order]
        y, s = F.linear(xs, weight, bias), xs.new_empty(len(xs), A.shape[1])
        for g, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            torch.mm(xs[start:end], A[g].T, out=s[start:end])
            y[start:end].addmm_(s[start:end], B[g].T, alpha=scaling[g])
        ctx.save_for_backward(xs, s, weight, A, B)
        ctx.scaling, ctx.rows, ctx.dtype = scaling, rows, lora_A.dtype
        return (y if order is None else y[inverse]).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        xs, s, weight, A, B = ctx.saved_tensors
        order, inverse, ends = ctx.rows
        shape, dy = dy.shape, dy.flatten(0, -2)
        dy = dy if order is None else dy[order]
        dx, dA, dB = torch.mm(dy, weight), torch.empty_like(A), torch.empty_like(B)
        for g, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            one = dy[start:end]
            ds = torch.mm(one, B[g]).mul_(ctx.scaling[g])
            torch.mm(one.T, s[start:end], out=dB[g]).mul_(ctx.scaling[g])
            torch.mm(ds.T, xs[start:end], out=dA[g])
            dx[start:end].addmm_(ds, A[g])
        dx = (dx if order is None else dx[inverse]).view(*shape[:-1], -1)
        return dx, None, None, dA.to(ctx.dtype), dB.to(ctx.dtype), None, None


def loop(layer: Layer, repeats: int) -> Built:
    A, B = layer.factors(torch.promote_types(layer.weight.dtype, torch.float32))
    rows = layer.sorted_rows(repeats)
    return lambda x: _Loop.apply(x, layer.weight, layer.bias, A, B, layer.scaling, rows), [A, B]


def grouped_mm(layer: Layer, repeats: int) -> Built:
    """Rows sorted by adapter and ``F.grouped_mm`` for either factor, gradients by autograd."""
    A, B = layer.factors(torch.promote_types(layer.weight.dtype, torch.float32))
    order, inverse, ends = layer.sorted_rows(repeats)
    ends = torch.tensor(ends, dtype=torch.int32, device=A.device)
    scaling = torch.tensor(layer.scaling, device=A.device)[:, None, None]

    def run(x):
        flat = x.flatten(0, -2)
        s = F.grouped_mm(flat if order is None else flat[order], A.to(x.dtype).mT, offs=ends)
        delta = F.grouped_mm(s, (B * scaling).to(x.dtype).mT, offs=ends)
        y = F.linear(flat, layer.weight, layer.bias) + (delta if order is None else delta[inverse])
        return y.view(*x.shape[:-1], -1)

    return run, [A, B]


def bmm(layer: Layer) -> Built:
    """The factors of every sample gathered, then batched products."""
    A, B = layer.factors(torch.promote_types(layer.weight.dtype, torch.float32))
    ids = torch.tensor(layer.ids, device=A.device)
    scaling = torch.tensor(layer.scaling, device=A.device)[:, None, None]

    def run(x):
        s = torch.bmm(x, A.to(x.dtype)[ids].mT)
        return torch.baddbmm(F.linear(x, layer.weight, layer.bias), s, (B * scaling).to(x.dtype)[ids].mT)

    return run, [A, B]


def frozen(layer: Layer) -> Built:
    """The layer without LoRA: the floor."""
    return lambda x: F.linear(x, layer.weight, layer.bias), []


def merged(layer: Layer) -> Built:
    """The LoRA added to the weight, which cannot train: the floor of an inference."""
    delta = layer.scaling[0] * (layer.lora_B.double() @ layer.lora_A.double())
    weight = (layer.weight.double() + delta).to(layer.weight.dtype)
    return lambda x: F.linear(x, weight, layer.bias), []
