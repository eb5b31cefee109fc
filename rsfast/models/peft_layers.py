"""The classes that PEFT's LoRA layers are swapped to; static, so that pickling and class policies work."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, Linear, LoraLayer, MultiheadAttention
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from rsfast import AdapterBatch, batched_lora_linear, lora_expand, lora_linear, lora_shrink
from rsfast._dispatch import Impl
from rsfast.models.attention import attend, project

BASES = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)  # the second is MultiheadAttention's out_proj
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Factors(NamedTuple):
    """One adapter of a layer."""

    A: Tensor  # (r, K)
    B: Tensor  # (N, r)
    scaling: float
    dropout_p: float


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether calling ``module`` does nothing but what its class does, so that its parameters say it all."""
    return type(module) in kinds and "forward" not in vars(module) and not any(getattr(module, h) for h in HOOKS)


def why_not_adapters(layer: LoraLayer, names: list[str]) -> str | None:
    """Why the fused path cannot serve these adapters of a layer, None if it can."""
    for name in names:
        if name in layer.lora_variant:
            return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}, not a plain LoRA"
        if layer.lora_bias.get(name):
            return f"adapter {name!r} has a bias (lora_bias=True)"
        parts = (layer.lora_A[name], layer.lora_B[name])
        if not all(is_plain(part, nn.Linear) for part in parts):
            return f"adapter {name!r} is wrapped or has hooks"
        if not is_plain(layer.lora_dropout[name], nn.Identity, nn.Dropout):
            return f"the dropout of adapter {name!r} is a {type(layer.lora_dropout[name]).__name__}, or has hooks"
    return None


def factors_of(layer: LoraLayer, name: str) -> Factors:
    dropout, B, scaling = layer.lora_dropout[name], layer.lora_B[name].weight, layer.scaling[name]
    if isinstance(scaling, Tensor):  # after peft's prepare_model_for_compiled_hotswap
        B, scaling = B * scaling, 1.0
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Factors(layer.lora_A[name].weight, B, scaling, p)


def stack(factors: list[Factors]) -> Factors:
    """Several adapters without dropout as one of the sum of their ranks."""
    if len(factors) == 1:
        return factors[0]
    B = torch.cat([f.scaling * f.B.to(torch.promote_types(f.B.dtype, torch.float32)) for f in factors], 1)
    return Factors(torch.cat([f.A.to(B.dtype) for f in factors]), B, 1.0, 0.0)


def adapted(x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[Factors], impl: Impl) -> Tensor:
    """A linear layer with any number of adapters; each has a dropout of its own."""
    steady = [f for f in factors if not f.dropout_p]
    groups = ([stack(steady)] if steady else []) + [f for f in factors if f.dropout_p]
    if not groups:
        return F.linear(x, weight, bias)
    (A, B, scaling, dropout_p), *others = groups
    y = lora_linear(x, weight, bias, A, B, scaling, dropout_p=dropout_p, impl=impl)
    for A, B, scaling, dropout_p in others:
        y = lora_expand(lora_shrink(F.dropout(x, dropout_p), A, scaling, impl=impl), B, y, impl=impl)
    return y


def readable(x: Tensor, factors: list[Factors]) -> list[Factors]:
    """The adapters in a dtype that the operations take with ``x``; PEFT's layers take any beside any."""
    if torch.is_autocast_enabled(x.device.type):
        return factors
    wide = torch.promote_types(x.dtype, torch.float32)
    A_B = (tuple(t if t.dtype in (x.dtype, torch.float32) else t.to(wide) for t in f[:2]) for f in factors)
    return [Factors(*pair, *f[2:]) for pair, f in zip(A_B, factors, strict=True)]


@functools.lru_cache(maxsize=16)
def batch_of(ids: tuple[int, ...], adapters: int, device: torch.device) -> AdapterBatch:
    """The metadata of a mixed batch, made by the first of a model's layers for all of them."""
    with torch.inference_mode(False):  # what is made inside could not be used outside
        return AdapterBatch(torch.tensor(ids, dtype=torch.int32).to(device), adapters)


class FusedLinear(Linear):
    """PEFT's layer, computed by :func:`rsfast.lora_linear`; what that cannot do, by PEFT's own forward."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = kwargs.get("adapter_names")
        wanted = self.active_adapters if names is None else dict.fromkeys(names)
        present = [name for name in wanted if name in self.lora_A]
        others = args or kwargs.keys() - {"adapter_names", *VARIANT_KWARG_KEYS}
        if self.disable_adapters or self.merged or others or why_not_adapters(self, present):
            return super().forward(x, *args, **kwargs)
        factors, base = readable(x, [factors_of(self, name) for name in present]), self.base_layer
        if not factors or not is_plain(base, *BASES):
            return super().forward(x, **kwargs)
        if names is None:
            return adapted(x, base.weight, base.bias, factors, self.rsfast_impl)
        if any(f.dropout_p for f in factors) or x.ndim < 2:
            return super().forward(x, **kwargs)
        self._check_forward_args(x, **kwargs)
        return self._mixed(x, tuple(present.index(n) if n in present else -1 for n in names), factors)

    def _mixed(self, x: Tensor, ids: tuple[int, ...], factors: list[Factors]) -> Tensor:
        """A batch in which every sample has an adapter of its own, those of lower rank padded with zeros."""
        rank = max(len(f.A) for f in factors)
        dtype = torch.promote_types(factors[0].A.dtype, torch.float32)
        A = torch.stack([F.pad(f.A, (0, 0, 0, rank - len(f.A))).to(dtype) for f in factors])
        B = torch.stack([F.pad(f.scaling * f.B.to(dtype), (0, rank - len(f.A))) for f in factors])
        batch = batch_of(ids, len(factors), x.device)
        ones = torch.ones(len(factors), device=x.device)
        weight, bias = self.base_layer.weight, self.base_layer.bias
        return batched_lora_linear(x, weight, bias, A, B, ones, batch, impl=self.rsfast_impl)


class FusedMultiheadAttention(MultiheadAttention):
    """PEFT's attention with the adapters beside the weights instead of merged into them at every forward.

    Differs from PEFT 0.21: ``out_proj``'s adapter counts once (PEFT adds its delta twice, merged or not), dropout is
    applied, and the weights are never written, so that a 16-bit model does not drift.
    """

    def forward(self, query: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        self._check_forward_args(query, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return super().forward(query, *args, **kwargs)
        base, names = self.base_layer, [name for name in self.active_adapters if name in self.lora_A]
        if (why := why_not_adapters(self, names)) or not is_plain(base, nn.MultiheadAttention):
            raise NotImplementedError(f"{why or 'base_layer has hooks'}: unpatch the model to have PEFT's own forward")
        factors = readable(query, [factors_of(self, name) for name in names])

        def columns(x: Tensor, first: int, last: int) -> Tensor:
            W, b, some = base.in_proj_weight, base.in_proj_bias, factors
            if last - first < len(W):
                W, b = W[first:last], None if b is None else b[first:last]
                some = [f._replace(B=f.B[first:last]) for f in factors]
            return adapted(x, W, b, some, self.rsfast_impl)

        y, weights = self._attend(columns, query, *args, **kwargs)
        return y.to(query.dtype), None if weights is None else weights.to(query.dtype)

    def _attend(self, columns, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        x, weights = attend(self.base_layer, *project(query, key, value, self.embed_dim, columns), *args, **kwargs)
        return self.base_layer.out_proj(x), weights

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's, with ``out_proj``'s delta added once."""
        base = self.base_layer
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            merged = (base.in_proj_weight + self.get_delta_weight(name)).to(base.in_proj_weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"the merged in_proj_weight is not finite: adapter {name!r} seems to be broken")
            base.out_proj.merge(safe_merge, [name])
            base.in_proj_weight.data = merged
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """As PEFT's, with ``out_proj``'s delta taken off once."""
        if not self.merged:
            return super().unmerge()  # says so
        weight = self.base_layer.in_proj_weight
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                weight.data = (weight - self.get_delta_weight(name)).to(weight.dtype)
        if self.base_layer.out_proj.merged:
            self.base_layer.out_proj.unmerge()

    def _restore_weights(self) -> None:
        """Nothing: PEFT registers the weights anew wherever it may have lost them, and here they are never lost."""


PATCHED = {Linear: FusedLinear, MultiheadAttention: FusedMultiheadAttention}
ORIGINAL = {fused: original for original, fused in PATCHED.items()}


def why_not(layer: LoraLayer) -> str | None:
    """Why a LoRA layer stays PEFT's own, None if it need not."""
    base, name = layer.base_layer, type(layer).__name__
    if type(layer) not in PATCHED:
        quantised = not any(p.is_floating_point() for p in base.parameters())
        return f"is a {name} over a {type(base).__name__}{' (quantised)' * quantised}, not PEFT's Linear or attention"
    attention = type(layer) is MultiheadAttention
    if attention and layer.merged:
        return "is merged, and PEFT has added out_proj's delta twice: unmerge the model first"
    if not is_plain(base, *((nn.MultiheadAttention,) if attention else BASES)):
        return f"its base_layer is a {type(base).__module__}.{type(base).__name__}, or wrapped, or has hooks"
    weight = base.in_proj_weight if attention else base.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() < 2:
        return f"the weight of its base_layer is a {type(weight).__name__} of {weight.dtype} (quantised)"
    if getattr(layer, "fan_in_fan_out", False):
        return "fan_in_fan_out is set"
    return why_not_adapters(layer, list(layer.lora_A))
