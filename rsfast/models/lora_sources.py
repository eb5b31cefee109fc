"""LayerNorms and activations that say how their output was made, so that a LoRA layer behind them need not keep it."""

import timm.layers
from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU
from torch import Tensor, is_grad_enabled, native_layer_norm, nn
from torch.compiler import is_compiling

from rsfast import Source


def _norm(module: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Source]:
    """What ``F.layer_norm`` computes, with the statistics that autograd keeps for it."""
    y, mean, rstd = native_layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    return y, Source("layer_norm", x, mean, rstd, module.weight, module.bias)


def _silent() -> bool:
    """Whether no backward will ask for a source, or none can be told."""
    return not is_grad_enabled() or is_compiling()


class NotedNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        if _silent():
            return super().forward(x)
        y, source = _norm(self, x)
        return source.note(y)


class NotedTimmNorm(timm.layers.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        if _silent() or self._fast_norm:
            return super().forward(x)
        y, source = _norm(self, x)
        return source.note(y)


class NotedClipNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        if _silent():
            return super().forward(x)
        y, source = _norm(self, x)
        return source.note(y.to(x.dtype))


class NotedNormFp32(LayerNormFp32):
    def forward(self, x: Tensor) -> Tensor:
        if _silent():
            return super().forward(x)
        y, source = _norm(self, x.float())
        return source._replace(input=x).note(y.to(x.dtype))


class NotedGELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if _silent() else Source("gelu_tanh" if self.approximate == "tanh" else "gelu", x).note(y)


class NotedQuickGELU(QuickGELU):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if _silent() else Source("quick_gelu", x).note(y)


NOTED = {
    nn.LayerNorm: NotedNorm, timm.layers.LayerNorm: NotedTimmNorm, LayerNorm: NotedClipNorm,
    LayerNormFp32: NotedNormFp32, nn.GELU: NotedGELU, QuickGELU: NotedQuickGELU,
}  # fmt: skip


def note_sources(model: nn.Module) -> dict[str, type]:
    """Swap the class of every LayerNorm over one axis and every GELU of a kind known here; path -> the class before."""
    found = {
        path: type(module)
        for path, module in model.named_modules()
        if type(module) in NOTED and len(getattr(module, "normalized_shape", (1,))) == 1
    }
    for path, kind in found.items():
        model.get_submodule(path).__class__ = NOTED[kind]
    return found
