"""Linear layers with low-rank adaptation, as the equation reads."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 1 << 16  # of a draw: a probability of dropout is rounded to a multiple of 2^-16
SOURCES = ("layer_norm", "gelu", "gelu_tanh", "quick_gelu")  # functions whose result can be computed again
ROUNDS = 7  # of Philox 4x32, the fewest that pass BigCrush (Salmon et al., SC 2011)


def levels(dropout_p: float) -> int:
    """How many of the levels of a draw are dropped; at least one, and not all of them."""
    return min(max(round(dropout_p * LEVELS), 1), LEVELS - 1)


def keep_mask(rows: int, width: int, dropout_p: float, seed: Tensor) -> Tensor:
    """Which elements of a ``(rows, width)`` input are kept; the same on every device, for every tiling.

    Philox of key ``seed`` (64 bits) and counter ``(column // 8, row, 0, 0)`` gives four words for eight neighbouring
    columns: the low halves, then the high halves, are their draws.
    """
    word = 0xFFFFFFFF
    columns = torch.arange((width + 7) // 8, device=seed.device)
    c0, c1 = columns.expand(rows, -1), torch.arange(rows, device=seed.device)[:, None].expand(-1, len(columns))
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed.long() & word, seed.long() >> 32 & word
    for _ in range(ROUNDS):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 & word ^ c1 ^ k0, b & word, a >> 32 & word ^ c3 ^ k1, a & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    words = torch.stack([c0, c1, c2, c3], -1)
    draws = torch.cat([words & 0xFFFF, words >> 16], -1).reshape(rows, 8 * len(columns))
    return draws[:, :width] >= levels(dropout_p)


def dropped(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Dropout: elements that are kept, divided by the share that is kept."""
    keep = keep_mask(x.shape[:-1].numel(), x.shape[-1], dropout_p, seed).view(x.shape)
    return x * keep.to(x.dtype) * (LEVELS / (LEVELS - levels(dropout_p)))


def lora_shrink(x: Tensor, lora_A: Tensor, scaling: float | Tensor = 1.0, adapter_ids: Tensor | None = None) -> Tensor:
    if adapter_ids is None:
        return scaling * F.linear(x, lora_A)
    ids = per_token(adapter_ids, x)
    s = x.new_zeros(*x.shape[:-1], lora_A.shape[1])
    for g, A in enumerate(lora_A):
        s = torch.where(ids == g, scaling[g] * F.linear(x, A), s)
    return s


def lora_expand(
    s: Tensor,
    lora_B: Tensor,
    base: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    slices: tuple[tuple[int, int], ...] | None = None,
) -> Tensor:
    if base is None:
        base = s.new_zeros(*s.shape[:-1], slices[-1][1] if slices else lora_B.shape[-2])
    if adapter_ids is None:
        return base + _wide(s, lora_B, slices, base.shape[-1])
    ids, y = per_token(adapter_ids, s), base
    for g, B in enumerate(lora_B):
        y = torch.where(ids == g, base + _wide(s, B, slices, base.shape[-1]), y)
    return y


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    dropout_p: float = 0.0, seed: Tensor | None = None, slices: tuple[tuple[int, int], ...] | None = None,
) -> Tensor:  # fmt: skip
    y = F.linear(x, weight, bias)
    if dropout_p:
        x = dropped(x, dropout_p, seed)
    return y + scaling * _wide(F.linear(x, lora_A), lora_B, slices, len(weight))


def batched_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: Tensor,
    adapter_ids: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None,
    slices: tuple[tuple[int, int], ...] | None = None,
) -> Tensor:  # fmt: skip
    y = base = F.linear(x, weight, bias)
    if dropout_p:
        x = dropped(x, dropout_p, seed)
    ids = per_token(adapter_ids, x)
    for g, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        y = torch.where(ids == g, base + scaling[g] * _wide(F.linear(x, A), B, slices, len(weight)), y)
    return y


def per_token(adapter_ids: Tensor, x: Tensor) -> Tensor:
    """Ids of samples or tokens, shaped to go with ``x (..., K)``."""
    return adapter_ids.view(*adapter_ids.shape, *[1] * (x.ndim - adapter_ids.ndim))


def _wide(s: Tensor, lora_B: Tensor, slices: tuple[tuple[int, int], ...] | None, width: int) -> Tensor:
    """s B^T, where every slice of the output has an s and a B of its own; zero outside the slices."""
    if slices is None:
        return F.linear(s, lora_B)
    y, widths = s.new_zeros(*s.shape[:-1], width), [end - start for start, end in slices]
    for part, B, (start, end) in zip(s.chunk(len(slices), -1), lora_B.split(widths, -2), slices, strict=True):
        y = y + F.pad(F.linear(part, B), (start, width - end))
    return y


def made_again(
    function: str, x: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What a source describes, ``(rows, width)``, rounded to ``dtype``."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if function == "layer_norm":
        x = (x - mean[:, None]) * rstd[:, None]
        x = x if weight is None else x * weight
        x = x if bias is None else x + bias
    elif function == "quick_gelu":
        x = x * torch.sigmoid(1.702 * x)
    else:
        x = F.gelu(x, approximate="tanh" if function == "gelu_tanh" else "none")
    return x.to(dtype)
