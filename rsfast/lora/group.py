"""Linear layers that share their input, with a LoRA each, as one product."""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast._dispatch import Impl
from rsfast.lora.functional import lora_linear
from rsfast.lora.functional.checks import working_dtype
from rsfast.lora.module import LoRALinear


class _Held(NamedTuple):
    """Outputs that were computed for the first layer called, and wait for the others."""

    x: weakref.ref
    state: tuple
    parts: list[tuple[Tensor, tuple] | None]  # with the state of the layer


class LoRALinearGroup(LoRALinear):
    """Several linear layers that share their input, with a LoRA each, as one product.

    For q, k and v that are layers of their own, or the key and value projections of all cross-attentions of a diffusion
    model, which all take the text. The layers stay where they are in the model, under their names; their weights
    become views of the group's ``weight``, which is frozen, so memory holds them once. Called with ``x (..., K)`` the
    group returns a tuple of their outputs. After :meth:`attach` the layers themselves do, so that the model's own code
    need not change. Register the group in the model: its ``lora_A`` and ``lora_B`` train.

    The maths, precision and determinism are those of :func:`rsfast.lora_linear` with ``slices``. Dropout drops the
    same elements of the input for all layers.

    Args:
        layers: Plain ``nn.Linear`` of the same inputs K, dtype and device, S of N outputs in all; some with a bias.
        r: Rank of each layer's LoRA; ``lora_A`` is ``(S r, K)``, ``lora_B`` is ``(N, r)``.
        alpha: As in :class:`rsfast.LoRALinear`.
        dropout: As in :class:`rsfast.LoRALinear`.
        impl: As in :func:`rsfast.lora_linear`.

    Raises:
        TypeError: A layer is no plain ``nn.Linear``.
        ValueError: There is none, one comes twice, they differ in inputs, dtype or device, or ``r`` or ``dropout`` does
            not fit.

    Example:
        >>> import torch, rsfast
        >>> q, k, v = (torch.nn.Linear(6, width) for width in (4, 4, 8))
        >>> [y.shape[1] for y in rsfast.LoRALinearGroup([q, k, v], r=2)(torch.ones(1, 6))]
        [4, 4, 8]
    """

    def __init__(
        self, layers: Sequence[nn.Linear], r: int = 8, alpha: float = 8, dropout: float = 0.0, *, impl: Impl = "auto"
    ):  # fmt: skip
        layers = tuple(layers)
        _check(layers)
        ends = list(itertools.accumulate(layer.out_features for layer in layers))
        slices = tuple(zip([0, *ends[:-1]], ends, strict=True))
        base = nn.Linear(layers[0].in_features, ends[-1], bias=False, device="meta")
        weight, bias = _whole(layers)
        base.weight, base.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        super().__init__(base, r, alpha, dropout, slices=slices, impl=impl)
        self.train(layers[0].training)
        self.layers, self._held = layers, None
        for layer in layers:
            layer.requires_grad_(False)
        self._tie()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():  # where memory lies is unknown, so the layers' own weights are taken
            weight, bias = _whole(self.layers)
        else:
            self._retie()
            weight, bias = self.weight, self.bias
        if self.merged:
            y = F.linear(x, weight, bias)
        else:
            y = lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scaling, **self._options(x))
        return tuple(y[..., start:end] for start, end in self.slices)  # not split: its views refuse changes in place

    def merge(self) -> None:
        self._retie()
        super().merge()

    def unmerge(self) -> None:
        self._retie()
        super().unmerge()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._tie()  # layers that the model has elsewhere are moved too, which is nothing to do then
        return self

    def __getstate__(self):
        return {**self.__dict__, "_held": None}

    def _views(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What each layer has, and the piece of the group's that it is to share."""
        for layer, (start, end) in zip(self.layers, self.slices, strict=True):
            yield layer.weight, self.weight.data[start:end]
            if layer.bias is not None:
                yield layer.bias, self.bias.data[start:end]

    def _tie(self) -> None:
        """Make the layers' parameters views of the group's."""
        for parameter, view in self._views():
            parameter.data = view

    def _retie(self) -> None:
        """After a copy, or loading that replaced tensors, what the layers hold counts."""
        if any(parameter.data_ptr() != view.data_ptr() for parameter, view in self._views()):
            weight, bias = _whole(self.layers)
            self.weight.data = weight
            if bias is not None:
                self.bias.data = bias
            self._tie()

    def attach(self) -> None:
        """From now on each layer, called by itself, returns its part of the group's outputs.

        The first one called computes all, which the others take when they are called with the same tensor; the last
        one, or a call with another tensor, lets go of them. A layer computes its part alone, with a product of its own,
        where backward would compute all parts again or where a change of the input would not show: in checkpointed and
        compiled regions, under other hooks on saved tensors, and in inference mode.

        Raises:
            ValueError: The layers are attached already.
        """
        if any(type(layer) is not nn.Linear for layer in self.layers):
            raise ValueError("the layers are attached already")
        for index, layer in enumerate(self.layers):
            layer.__class__ = _Member
            layer.__dict__["group"] = self, index  # not registered: the group would be its own grandchild

    def detach(self) -> None:
        """Undo :meth:`attach`: the layers, called by themselves, have no LoRA again.

        Raises:
            ValueError: The layers are not attached.
        """
        if any(type(layer) is not _Member for layer in self.layers):
            raise ValueError("the layers are not attached")
        self._held = None
        for layer in self.layers:
            layer.__class__ = nn.Linear
            del layer.__dict__["group"]

    def part(self, index: int, x: Tensor) -> Tensor:
        """Output of one layer; the others' are kept for them if they will be asked for with the same ``x``."""
        if not self._shareable(x):
            return self._alone(index, x)
        state, held = self._state(x), self._held
        found = held.parts[index] if held and held.x() is x and held.state == state else None
        if found is None or found[1] != self._state_of(index):
            outputs = self(x)
            each = [(y, self._state_of(i)) for i, y in enumerate(outputs)]
            held = self._held = _Held(weakref.ref(x), state, each)
            found = each[index]
        held.parts[index] = None
        if not any(held.parts):
            self._held = None
        return found[0]

    def _shareable(self, x: Tensor) -> bool:
        """Whether changes of ``x`` show, and backward will not make the same call again, with other random numbers."""
        if torch.compiler.is_compiling() or x.is_inference():
            return False
        if self.training and self.dropout and not torch.is_grad_enabled():  # reentrant checkpoints forward
            return False
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return not hooked and torch._C._current_graph_task_id() == -1

    def _state(self, x: Tensor) -> tuple:
        """What all outputs depend on beside which tensor ``x`` is."""
        parameters = ((p._version, p.data_ptr(), p.requires_grad) for p in self._parameters.values() if p is not None)
        return (
            *parameters, x._version, x.requires_grad, self.training, self.merged, torch.is_grad_enabled(),
            working_dtype(x), torch.cuda.current_stream(x.device) if x.is_cuda else None,
        )  # fmt: skip

    def _state_of(self, index: int) -> tuple:
        """What one output depends on beside."""
        parameters = self.layers[index]._parameters.values()
        return tuple((p._version, p.data_ptr()) for p in parameters if p is not None)

    def _alone(self, index: int, x: Tensor) -> Tensor:
        layer, (start, end), ranks = self.layers[index], self.slices[index], slice(index * self.r, (index + 1) * self.r)
        if self.merged:
            return F.linear(x, layer.weight, layer.bias)
        options = self._options(x) | dict(slices=None)
        return lora_linear(
            x, layer.weight, layer.bias, self.lora_A[ranks], self.lora_B[start:end], self.scaling, **options
        )


class _Member(nn.Linear):
    """A layer of an attached group."""

    def forward(self, x: Tensor) -> Tensor:
        group, index = self.group
        return group.part(index, x)


def _check(layers: tuple[nn.Linear, ...]) -> None:
    for i, layer in enumerate(layers):
        if type(layer) is not nn.Linear:
            raise TypeError(f"layers must be plain nn.Linear, got {type(layer).__name__} at {i}")
    if not layers or len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(f"layers must be one or more, each once, got {len(layers)}")
    if len({id(layer.weight) for layer in layers}) < len(layers):
        raise ValueError("layers must have weights of their own, but two share one")
    for i, layer in enumerate(layers):
        facts = [(one.in_features, one.weight.dtype, one.weight.device) for one in (layers[0], layer)]
        if facts[0] != facts[1]:
            raise ValueError(
                f"layers must agree in inputs, dtype and device, got {facts[0]} at 0 and {facts[1]} at {i}"
            )


@torch.no_grad()
def _whole(layers: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """All weights under each other, and all biases, zero for layers without one."""
    weight = torch.cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    return weight, torch.cat(biases)
