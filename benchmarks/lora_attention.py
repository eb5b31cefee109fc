"""Attention with LoRA in its projections: ours in ``nn.MultiheadAttention``, PEFT's, and the attention alone."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rsfast.models
from benchmarks.arms import DEVICE
from benchmarks.lora import errors
from benchmarks.measure import Call, sets_of_inputs
from rsfast.lora import reference
from rsfast.testing import assert_within_budget

RANK, SCALING = 16, 1.5
NAMES = ("y", "x", "out_lora_A", "in_lora_B", "out_lora_B")  # PEFT shares in_lora_A among q, k and v, we do not
IMPLEMENTATIONS = ("auto", "frozen", "peft-mha")
SHAPES = ((256, 197, 768), (256, 50, 768)) if DEVICE == "cuda" else ((2, 5, 32),)
HEAD = 64 if DEVICE == "cuda" else 16


@functools.lru_cache(maxsize=1)
def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor], list[Tensor]]:
    """x, a gradient of the output, the attention's own state, and its factors: in A, in B, out A, out B."""
    width, g = shape[-1], torch.Generator(DEVICE).manual_seed(0)

    def draw(*size, std=1.0):
        return torch.randn(size, generator=g, device=DEVICE) * std

    state = {
        "in_proj_weight": draw(3 * width, width, std=width**-0.5), "in_proj_bias": draw(3 * width, std=0.3),
        "out_proj.weight": draw(width, width, std=width**-0.5), "out_proj.bias": draw(width, std=0.3),
    }  # fmt: skip
    down, up = width**-0.5, RANK**-0.5
    factors = [
        draw(RANK, width, std=down), draw(3 * width, RANK, std=up),
        draw(RANK, width, std=down), draw(width, RANK, std=up),
    ]  # fmt: skip
    return draw(*shape).to(dtype), draw(*shape).to(dtype), {k: v.to(dtype) for k, v in state.items()}, factors


def equation(x: Tensor, state: dict[str, Tensor], factors: list[Tensor]) -> Tensor:
    (w, b, w_out, b_out), (A, B, A_out, B_out) = ([t.to(x.dtype) for t in ts] for ts in (state.values(), factors))
    qkv = reference.lora_linear(x, w, b, A, B, SCALING).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
    z = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
    return reference.lora_linear(z, w_out, b_out, A_out, B_out, SCALING)


def build(impl: str, state: dict[str, Tensor], factors: list[Tensor]):
    """(attention as a function of x, factors in the order of :func:`tensors`)."""
    width = len(state["out_proj.bias"])
    attention = nn.MultiheadAttention(width, width // HEAD, batch_first=True, device="meta")
    attention.load_state_dict(state, assign=True)
    attention.requires_grad_(False)
    own = []
    if impl == "auto":
        model, r = nn.ModuleDict({"attn": attention}), RANK
        rsfast.models.add_lora(model, r, SCALING * r, ("q", "k", "v", "out"), impl=impl)
        attention = model["attn"]
        own = [f for layer in (attention.in_proj, attention.out_proj) for f in (layer.lora_A, layer.lora_B)]
    elif impl == "peft-mha":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["attn"])
        model = get_peft_model(nn.ModuleDict({"attn": attention}), config, autocast_adapter_dtype=False)
        attention = model.base_model.model["attn"]
        layers = attention, attention.base_layer.out_proj
        own = [f["default"].weight for layer in layers for f in (layer.lora_A, layer.lora_B)]
    with torch.no_grad():
        for mine, drawn in zip(own, factors, strict=bool(own)):
            mine.copy_(drawn.repeat(len(mine) // len(drawn), 1))  # one A for q, k and v, as PEFT has it
    return lambda x: attention(x, x, x, need_weights=False)[0], own


def results(run, x: Tensor, factors: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y, dx, and the gradients that NAMES names."""
    x = x.detach().requires_grad_()
    y = run(x)
    dx, *others = torch.autograd.grad(y, [x, *factors], dy.to(y.dtype))
    return [y.detach(), dx, *(others[i] for i in (2, 1, 3) if others)]


@functools.lru_cache(maxsize=1)
def truth(shape: tuple[int, ...], dtype: torch.dtype) -> list[list[Tensor]]:
    """In float64, and as plain PyTorch rounds in ``dtype``."""
    x, dy, state, factors = tensors(shape, dtype)
    found = []
    for kind in (torch.float64, dtype):
        own = [f.to(torch.promote_types(kind, f.dtype), copy=True).requires_grad_() for f in factors]
        found.append(results(lambda x, own=own: equation(x, state, own), x.to(kind), own, dy))
    return found


@functools.lru_cache(maxsize=2)
def prepared(shape: tuple[int, ...], dtype: torch.dtype, impl: str) -> tuple[list[Call], dict[str, float]]:
    """An attention on several inputs, ready to be timed, and its errors.

    Raises:
        AssertionError: Ours is outside the budget.
    """
    x, dy, state, factors = tensors(shape, dtype)
    run, own = build(impl, state, factors)
    actual, (gold, eager) = results(run, x, own, dy), truth(shape, dtype)
    found = {} if impl == "frozen" else errors(actual, gold, NAMES)
    if impl == "auto":
        terms = max(shape[0] * shape[1], 3 * shape[2])
        for name, a, g, e in zip(NAMES, actual, gold, eager, strict=True):
            assert_within_budget(a.to(dtype), g, e.to(dtype), terms=terms, name=f"lora_attention {name}")
    calls = []
    for i in range(sets_of_inputs(x.nbytes)):
        moved = x.roll(i, 0).requires_grad_()
        calls.append(Call(functools.partial(run, moved), [moved, *own], dy.roll(i, 0)))
    return calls, found


def work(shape: tuple[int, ...], itemsize: int, which: str) -> dict[str, int]:
    """Bytes and operations of an ideal kernel: four products with LoRA, two of the scores; x in, y out."""
    samples, tokens, width = shape
    each = 8 * width * width + 4 * tokens * width
    low, unit = 2 * RANK * (6 * width), samples * tokens * width * itemsize
    # backward: dx as large as the forward, two products more for each of the scores', the factors' gradients
    back = 8 * width * width + 8 * tokens * width + 2 * low
    passes = {"forward": ((each + low, 2),), "forward+backward": ((each + low, 2), (back, 3))}[which]
    return dict(
        moved=sum(units for _, units in passes) * unit, flops=samples * tokens * sum(flops for flops, _ in passes)
    )
