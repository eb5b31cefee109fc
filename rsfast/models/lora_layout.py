"""One LoRA in PEFT's terms and in ours: slices as blocks, the projections of an attention as a pair, names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast import BatchedLoRALinear, LoRALinear
from rsfast.models.lora_sites import Columns
from rsfast.models.peft_format import Factors

Slices = tuple[Columns, ...] | None
OUT = ".base_layer.out_proj"  # where PEFT keeps the out-projection of an attention that it targets


def blocks(B: Tensor, slices: Slices, columns: int) -> Tensor:
    """``lora_B (n, r)`` of ``S`` slices as one over all columns, ``(N, S r)``, zero outside the block of each."""
    if slices is None:
        return B
    rank, row = B.shape[1], 0
    whole = B.new_zeros(columns, len(slices) * rank)
    for j, (start, end) in enumerate(slices):
        whole[start:end, j * rank : (j + 1) * rank] = B[row : row + end - start]
        row += end - start
    return whole


def compact(factors: Factors, slices: Slices, rank: int | None = None) -> Factors | None:
    """Back from :func:`blocks`, with ``rank`` for each slice, by default the least that keeps all that is not zero.

    None where something outside the blocks is not zero, or the rank does not keep all.
    """
    parts = 1 if slices is None else len(slices)
    if rank is None:
        live = (factors.A.any(1) | factors.B.any(0)).nonzero()
        rank = max(-(-(int(live[-1]) + 1 if len(live) else 1) // parts), 1)
    ranks = parts * rank
    A, B = factors.A[:ranks], factors.B[:, :ranks]
    if len(A) < ranks or factors.A[ranks:].any() or factors.B[:, ranks:].any():
        return None
    if slices is not None:
        whole = B
        B = torch.cat([B[start:end, j * rank : (j + 1) * rank] for j, (start, end) in enumerate(slices)])
        if not torch.equal(blocks(B, slices, len(whole)), whole):
            return None
    return Factors(A, B, factors.scaling)


def apart(factors: Factors, stored: Slices, columns: list[Columns]) -> tuple[Factors, Slices]:
    """Factors with the slices they were made of: those that are stored, or those of ``columns`` where B is not zero."""
    used = tuple(c for c in columns if factors.B[slice(*c)].any())
    for slices in (stored, used):
        found = compact(factors, slices) if slices and _are_apart(slices, len(factors.B)) else None
        if found is not None:
            return found, slices
    return compact(factors, None), None


def _are_apart(slices: Slices, columns: int) -> bool:
    edges = [0, *(edge for pair in slices for edge in pair), columns]
    return edges == sorted(edges) and all(start < end for start, end in slices)


def of_layer(layer: LoRALinear | BatchedLoRALinear, adapter: int | None) -> Factors:
    """The LoRA of a layer over all of its columns, in PEFT's form."""
    A, B, rank, scaling = layer.lora_A.detach(), layer.lora_B.detach(), layer.r, layer.scaling
    if adapter is not None:
        A, B, rank, scaling = A[adapter], B[adapter], layer.ranks[adapter], layer.scaling[adapter].item()
    A = A.unflatten(0, (-1, layer.r))[:, :rank].flatten(0, 1)
    return Factors(A, blocks(B[:, :rank], layer.slices, layer.out_features), scaling)


@torch.no_grad()
def into_layer(layer: LoRALinear | BatchedLoRALinear, factors: Factors, adapter: int | None) -> None:
    """Copy what :func:`compact` gave into a layer of the same slices, whose rank is as high or, in a bank, higher."""
    rank = factors.B.shape[1]
    A = F.pad(factors.A.unflatten(0, (-1, rank)), (0, 0, 0, layer.r - rank)).flatten(0, 1)
    B = F.pad(factors.B, (0, layer.r - rank))
    if adapter is None:
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
        layer.scaling = factors.scaling
    else:
        layer.lora_A[adapter].copy_(A)
        layer.lora_B[adapter].copy_(B)
        layer.scaling[adapter] = factors.scaling
        layer.ranks = (*layer.ranks[:adapter], rank, *layer.ranks[adapter + 1 :])


def peft_path(model: nn.Module, path: str) -> str:
    """The path of a layer in PEFT's files; where PEFT has none, our own."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    if parent and isinstance(holder, nn.MultiheadAttention) and holder.in_proj_weight is not None:
        return {"in_proj": parent, "out_proj": parent + OUT}.get(name, path)
    return path


def our_path(path: str, known: dict) -> str | None:
    """The one of ``known`` paths that a path in PEFT's files means, None if there is none."""
    names = (path, f"{path}.in_proj", f"{path.removesuffix(OUT)}.out_proj" if path.endswith(OUT) else path)
    return next((name for name in names if name in known), None)


def pair_of_projections(width: int, in_proj: Factors | None, out_proj: Factors | None) -> tuple[Factors, Factors]:
    """The LoRA of an attention's two projections at one rank and scaling, as PEFT has them."""
    given = [factors for factors in (in_proj, out_proj) if factors is not None]
    rank, scaling = max(len(factors.A) for factors in given), given[0].scaling
    pair = []
    for rows, factors in ((3 * width, in_proj), (width, out_proj)):
        A, B = given[0].A.new_zeros(rank, width), given[0].B.new_zeros(rows, rank)
        if factors is not None:
            A[: len(factors.A)] = factors.A
            B[:, : len(factors.A)] = factors.B * (factors.scaling / scaling)
        pair.append(Factors(A, B, scaling))
    return pair[0], pair[1]
