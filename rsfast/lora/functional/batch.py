"""Which adapter every token of a batch uses, in the order in which the kernels want to know it."""

import torch
from torch import Tensor


class AdapterBatch:
    """Adapter ids of a batch, with what the kernels derive from them; made once, used by every layer.

    What is derived has a size that depends on shapes only and is computed on the ids' device without waiting for it, so
    a CUDA graph can hold it. It is kept for each number of tokens a sample that layers ask for, until somebody writes
    into the ids. A graph that is to be replayed with other ids has to capture the making of the batch too.

    Args:
        adapter_ids: int32 or int64; one a sample, or one a token in the shape of the layers' input without its width.
            -1 uses the base model alone.
        num_adapters: How many there are; an id must be below. Ids on the CPU are checked here; on a GPU by an
            asynchronous assertion, as an index of ``nn.Embedding`` is.

    Raises:
        ValueError: The ids are no integers, or one is out of range.

    Example:
        >>> import torch, rsfast
        >>> rsfast.AdapterBatch(torch.tensor([1, -1, 0]), num_adapters=2).ids
        tensor([ 1, -1,  0])
    """

    def __init__(self, adapter_ids: Tensor, num_adapters: int):
        if not isinstance(adapter_ids, Tensor) or adapter_ids.dtype not in (torch.int32, torch.int64):
            got = adapter_ids.dtype if isinstance(adapter_ids, Tensor) else type(adapter_ids).__name__
            raise ValueError(f"adapter_ids must be a tensor of int32 or int64, got {got}")
        if adapter_ids.numel() and not torch.compiler.is_compiling():
            self._check(adapter_ids, num_adapters)
        self.ids, self.num_adapters = adapter_ids, num_adapters
        self._plans: dict[int, list[Tensor]] = {}
        self._version = self._written()

    @staticmethod
    def _check(ids: Tensor, num_adapters: int) -> None:
        inside = ((ids >= -1) & (ids < num_adapters)).all()
        text = f"adapter_ids must be -1 (no adapter) to {num_adapters - 1}, one of {num_adapters} adapters"
        if ids.device.type != "cpu":
            torch._assert_async(inside, text)
        elif not inside:
            raise ValueError(f"{text}; got {int(ids.min())} to {int(ids.max())}")

    def plan(self, repeats: int) -> list[Tensor]:
        """What the kernels read, for layers that take ``repeats`` tokens for each id."""
        written = self._written()
        if written not in (None, self._version):
            self._check(self.ids, self.num_adapters)
            self._plans, self._version = {}, written
        if repeats not in self._plans:
            from rsfast.lora.kernels.tables import make_plan

            with torch.inference_mode(False):  # what is made inside could not be kept for backward outside
                self._plans[repeats] = make_plan(self.ids, repeats, self.num_adapters)
        return self._plans[repeats]

    def _written(self) -> int | None:
        """How often the ids were written into, where that is known."""
        return None if torch.compiler.is_compiling() or self.ids.is_inference() else self.ids._version
