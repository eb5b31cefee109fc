"""Who has which adapter, as the kernels read it: computed on the ids' device, in sizes that only shapes decide."""

import torch
from torch import Tensor

TILE = 128  # rows that one tile of a product takes, in the batch's order
FINE, COARSE = 256, 2048  # rows of one adapter that a program takes, in the order of the adapters


def make_plan(adapter_ids: Tensor, repeats: int, adapters: int) -> list[Tensor]:
    """All int32: each row's id; for each tile how many adapters it has, and which; the rows sorted by adapter; for
    either size of chunk the table of (adapter, first, last) into the sorted rows, and each adapter's first chunk."""
    ids = adapter_ids.reshape(-1).repeat_interleave(repeats)
    rows = len(ids)
    tiles = (rows + TILE - 1) // TILE
    present = ids.new_zeros(max(tiles, 1), adapters + 1, dtype=torch.int32)
    flat = torch.arange(rows, device=ids.device) // TILE * (adapters + 1) + ids + 1
    present.view(-1).index_fill_(0, flat, 1)
    present = present[:, 1:]
    listed = torch.sort(present, dim=1, descending=True, stable=True).indices[:, : min(TILE, adapters)]
    order = torch.sort(ids, stable=True).indices
    sizes = ids.new_zeros(adapters + 1).index_add_(0, ids + 1, torch.ones_like(ids))
    plan = [ids, present.sum(1), listed, order]
    for size in (FINE, COARSE):
        plan += _chunks(sizes, size, rows // size + adapters + 1)
    return [t.int().contiguous() for t in plan]


def _chunks(sizes: Tensor, size: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Table of chunks of one adapter's rows each, -1's first, padded with empty ones; the first chunk of each."""
    each = (sizes + size - 1) // size
    last = each.cumsum(0)
    index = torch.arange(capacity, device=sizes.device)
    adapter = torch.searchsorted(last, index, right=True).clamp(max=len(sizes) - 1)
    ends = sizes.cumsum(0)[adapter]
    begin = torch.minimum(ends - sizes[adapter] + (index - (last - each)[adapter]) * size, ends)
    table = torch.stack([adapter - 1, begin, torch.minimum(begin + size, ends)], 1)
    return table, last  # of -1 first: where an adapter's chunks begin, and those of the one before end
