"""Other libraries' kernels for the same losses, each called as its own documentation says.

Their mathematics differs from ours in places, so they are not held to the error budget; a row carries their error.
None is a dependency of rsfast: `pip install rsfast[bench]` brings them, and what is missing is skipped with the reason.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """A kernel of another library.

    Args:
        modules: What must be importable, its own first.
        loss: (those modules, image, text, logit_scale, ...) -> loss; without a gradient of the scale, a number comes
            after the modules.
        dtypes: Features that it takes; fp32 would be TF32 in most.
        multiple_of: What the width of the features must be a multiple of.
        learns_scale: Whether it returns a gradient of the scalars.
    """

    modules: tuple[str, ...]
    loss: Callable
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    multiple_of: int = 1
    learns_scale: bool = True

    def why_not(self, width: int, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        if dtype not in self.dtypes:
            return f"{self.modules[0]} does not compute in {dtype}"
        if width % self.multiple_of:
            return f"{self.modules[0]} takes widths that are a multiple of {self.multiple_of}, not {width}"
        try:
            self._load()
        except Exception as error:  # whatever ails another library must not end the run
            return f"{self.modules[0]} cannot be imported: {error}"
        return None if torch.cuda.is_available() else f"{self.modules[0]} needs a GPU"

    def _load(self):
        return [importlib.import_module(name) for name in self.modules]

    def bound(self, scale: float) -> Callable:
        """The loss as a function of tensors alone; ``scale`` is for those whose temperature is a number."""
        return functools.partial(self.loss, *self._load(), *[] if self.learns_scale else [scale])


def _two_ways(one_way: Callable) -> Callable:
    """Both directions of a linear cross entropy whose weight is the other side; the temperature goes into one."""

    def loss(module, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        target = torch.arange(len(image), device=image.device)
        by_image = one_way(module, logit_scale * image, text, target)
        return (by_image + one_way(module, logit_scale * text, image, target)) / 2

    return loss


def _memeff(module, scale, image, text, _):
    # stable=True, its default, would return another gradient
    return module.MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)(image, text)


def _inf_cl(module, image, text, logit_scale):
    by_image, by_text = (module.cal_flash_loss(*pair, scale=logit_scale) for pair in ((image, text), (text, image)))
    return (by_image.mean() + by_text.mean()) / 2


def _quack(chunk_size: int, use_scaled_exp: bool) -> Callable:
    return _two_ways(
        lambda module, x, weight, target: module.chunked_linear_cross_entropy(
            x, weight, target, chunk_size=chunk_size, use_scaled_exp=use_scaled_exp
        )
    )


def _liger(module, x, weight, target):
    return module.liger_fused_linear_cross_entropy(x, weight, target, accum_dtype=torch.float32)


def _liger_scaled(module, x, weight, target):
    return module.LigerFusedLinearScaledCrossEntropyFunction.apply(x, weight, target).mean()


def _cce(filter_eps: str | None) -> Callable:
    return _two_ways(
        lambda module, x, weight, target: module.linear_cross_entropy(x, weight, target, filter_eps=filter_eps)
    )


def _siglip_kernel(module, image, text, logit_scale, logit_bias):
    return module.fused_siglip_loss(image, text, logit_scale.log(), logit_bias)


QUACK, LIGER = "quack.linear_cross_entropy", "liger_kernel.transformers.functional"
CONTRASTIVE = {
    "memeff": Peer(("memeff",), _memeff, learns_scale=False),
    "quack-4096-exp": Peer((QUACK,), _quack(4096, True)),
    "quack-8192-exp": Peer((QUACK,), _quack(8192, True)),
    "quack-4096": Peer((QUACK,), _quack(4096, False)),
    "quack-8192": Peer((QUACK,), _quack(8192, False)),
    "liger": Peer((LIGER,), _two_ways(_liger)),
    "liger-scaled": Peer(("liger_kernel.ops.fused_linear_scaled_cross_entropy",), _two_ways(_liger_scaled)),
    "cce-exact": Peer(("cut_cross_entropy",), _cce(None)),
    "cce": Peer(("cut_cross_entropy",), _cce("auto")),
    "inf-cl": Peer(("inf_cl",), _inf_cl, multiple_of=256),
}
SIGMOID = {"siglip-kernel": Peer(("siglip_kernel",), _siglip_kernel)}
