"""One node of autograd behind all layers of a model: it adds up the partial sums that they leave in one launch."""

import collections
import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rsfast._dispatch import once_differentiable
from rsfast.lora.kernels import once, outer
from rsfast.lora.kernels.launch import batch_of, bwd, facts_of
from rsfast.lora.kernels.plan import choose
from rsfast.lora.kernels.sums import ALIGN, AT_ONCE, Sum, Sums, add_up_all, aligned


@dataclasses.dataclass
class _Run:
    """What layers have left so far in one run of backward, in the order in which autograd would have added it."""

    workspace: Tensor
    used: int = 0
    results: int = 0  # numbers that the gradients take
    sums: list[Sum] = dataclasses.field(default_factory=list)
    owed: list[tuple[int, Tensor | slice]] = dataclasses.field(default_factory=list)  # factor, and one gradient of it
    lasts: list[Tensor] = dataclasses.field(default_factory=list)

    def place_of(self, last: Tensor | None) -> int:
        """Where ``last``, which layers of one batch share, is among all of them."""
        if last is None:
            return -1
        if not any(known is last for known in self.lasts):
            self.lasts.append(last)
        first = next(i for i, known in enumerate(self.lasts) if known is last)
        return sum(map(len, self.lasts[:first]))


class _Pile:
    """Partial sums for factors of one device and dtype, in one workspace for each run of backward."""

    def __init__(self, factors: Sequence[Tensor], limit: int):
        self.device, self.dtype, self.shapes = factors[0].device, factors[0].dtype, [f.shape for f in factors]
        self.limit, self.expected, self.stream = limit, 0, _stream(self.device)
        self.runs: dict[int, _Run] = {}

    def expect(self, numbers: int) -> None:
        self.expected = min(self.expected + aligned(numbers), self.limit)

    def run(self, like: Tensor) -> _Run:
        number = torch._C._current_graph_task_id()
        if number not in self.runs:
            self.runs[number] = _Run(like.new_empty(self.expected, dtype=torch.float32))
        return self.runs[number]

    def add_up(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of all factors; ``grads`` are what autograd brought."""
        run, grads = self.runs.pop(torch._C._current_graph_task_id(), None), list(grads)
        if run is None:
            return grads
        out = run.workspace.new_empty(run.results, dtype=self.dtype)
        if run.sums:
            add_up_all(run.workspace, out, tuple(run.sums), torch.cat(run.lasts) if run.lasts else None)
        ours = set()
        for index, grad in run.owed:  # a factor that several calls used is owed several
            grad = out[grad].view(self.shapes[index]) if isinstance(grad, slice) else grad
            if index in ours:
                grads[index].add_(grad)
            else:
                grads[index] = grad if grads[index] is None else grads[index] + grad
                ours.add(index)
        return grads


class _Later(Sums):
    """Partial sums of one factor, which wait in the workspace if it has room for them."""

    def __init__(self, run: _Run, index: int):
        self.run, self.index, self.at = run, index, -1

    def room(self, like, chunks, size):
        run, numbers = self.run, aligned(chunks * size)
        if run.used + numbers > len(run.workspace):
            return super().room(like, chunks, size)
        self.at, run.used = run.used, run.used + numbers
        return run.workspace[self.at : self.at + chunks * size].view(chunks, size)

    def add_up(self, part, like, batch, last, *, times=1, factor=1.0):
        if self.at < 0:
            return super().add_up(part, like, batch, last, times=times, factor=factor)
        run, adapters = self.run, len(like) if batch.several else 1
        chunks, size = part.shape
        run.sums.append(Sum(self.at // ALIGN, run.results, size, chunks, factor, times, run.place_of(last), adapters))
        run.owed.append((self.index, slice(run.results, run.results + like.numel())))
        run.results += aligned(like.numel())
        return None

    def keep(self, grad: Tensor | None) -> None:
        """A gradient that is whole already waits too: autograd would add it out of turn."""
        if grad is not None:
            self.run.owed.append((self.index, grad))


@dataclasses.dataclass(frozen=True)
class Share:
    """A factor, and the alias of it that layers take, whose gradients are added up together."""

    factor: Tensor
    alias: Tensor
    pile: _Pile
    index: int

    def sums(self) -> Sums | None:
        """Where its partial sums go in this run of backward; None if nobody asks for them."""
        if not torch._C._will_engine_execute_node(self.alias.grad_fn):
            return None
        # a layer that ran on another stream is not ordered with those that left their sums
        return (
            _Later(self.pile.run(self.factor), self.index) if _stream(self.pile.device) == self.pile.stream else AT_ONCE
        )


class _Collect(torch.autograd.Function):
    """Aliases of all factors of a pile: autograd runs the backward after that of every layer that took one."""

    @staticmethod
    def forward(ctx, pile, *factors):
        ctx.set_materialize_grads(False)
        ctx.pile = pile
        return tuple(factor.view_as(factor) for factor in factors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return None, *ctx.pile.add_up(grads)


_SHARES = contextvars.ContextVar("shares", default=None)


@contextlib.contextmanager
def collected(factors: Sequence[Tensor], max_bytes: int) -> Iterator[None]:
    """Inside, layers take aliases of these factors.

    Raises:
        RuntimeError: Inside another one.
    """
    if _SHARES.get() is not None:
        raise RuntimeError("reduce_together is active already: one call takes all layers of a step")
    groups, shares = collections.defaultdict(list), {}
    for factor in factors:
        groups[factor.device, factor.dtype].append(factor)
    with torch.enable_grad():
        for members in groups.values():
            pile = _Pile(members, max_bytes // 4)
            for index, alias in enumerate(_Collect.apply(pile, *members)):
                shares[id(members[index])] = Share(members[index], alias, pile, index)
    token = _SHARES.set(shares)
    try:
        yield
    finally:
        _SHARES.reset(token)


Shares = tuple[Share | None, Share | None]


def take(x, weight, lora_A, lora_B, tables, slices, dropout_p, insist, source):
    """The factors as the layer takes them, and their shares; piles now expect the partial sums that it will leave."""
    found = {} if torch.compiler.is_compiling() else _SHARES.get() or {}
    share_A, share_B = (found.get(id(factor)) for factor in (lora_A, lora_B))
    if share_A is None and share_B is None:
        return lora_A, lora_B, None
    facts, batch = facts_of(x, x.dtype, weight, lora_A, lora_B, slices, dropout_p), batch_of(tables, None)
    if share_B is not None:
        if choose("low", facts, x.device, insist).arm == "once" and facts.rank <= once.MAX_RANK:
            _, programs = once.tiling(facts.rows, facts.rank, x.element_size() == 4, batch)
            share_B.pile.expect(programs * lora_B.shape[-2] * facts.rank)
        lora_B = share_B.alias
    if share_A is not None:
        if choose("factor", facts, x.device, insist).arm != "composed" or dropout_p or batch.several:
            *_, chunks = outer.tiling(x if source is None else source[1], lora_A.shape[-2], batch)
            share_A.pile.expect(chunks * lora_A.shape[-2] * facts.contracted)
        lora_A = share_A.alias
    return lora_A, lora_B, (share_A, share_B)


def bwd_later(shares: Shares, *arguments):
    """``bwd``, whose dA and dB are None where they come later or nobody asks for them."""
    *others, need_x, need_A, need_B, need_weight, need_bias, function, made = arguments
    sums = [AT_ONCE if share is None else share.sums() for share in shares]
    needs = need_A and sums[0] is not None, need_B and sums[1] is not None
    dx, *grads, dW, db = bwd(*others, need_x, *needs, need_weight, need_bias, function, made, *sums)
    for i, (need, later) in enumerate(zip(needs, sums, strict=True)):
        if not need:
            grads[i] = None
        elif isinstance(later, _Later):
            grads[i] = later.keep(grads[i])
    return dx, *grads, dW, db


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
