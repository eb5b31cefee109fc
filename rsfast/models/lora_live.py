"""Which adapters of a model cannot change its output, whatever they learn."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rsfast import BatchedLoRALinear

SMALL, LARGE = 0.1, 1.0  # perturbations of B: one that saturates nothing, one that no rounding hides


class _Pair(NamedTuple):
    """One adapter of one layer: its B, or the part of a bank that is."""

    name: str
    lora_B: Tensor
    index: int | None

    @property
    def part(self) -> Tensor:
        return self.lora_B if self.index is None else self.lora_B[self.index]


def check_live(model: nn.Module, batch: tuple | list | Mapping) -> list[str]:
    """Names of the LoRA adapters that cannot change what ``model`` computes of this batch: nothing will train them.

    Such are, say, those that PEFT puts on the ``out_proj`` of an ``nn.MultiheadAttention``, which reads the weight of
    that layer and never calls it. Runs on a copy, in evaluation mode, so that the model, its training mode and the
    random numbers to come are as they were, also after an error. Needs memory for the copy, one forward and backward,
    and four more forwards if something seems dead; more only where gradients miss adapters that are live.

    An adapter is dead if the output's gradient with respect to its B is zero or missing, with every B perturbed so that
    those of zero count as live, and if then large changes of its B change no bit of the output.

    Args:
        model: With LoRA of :func:`add_lora`, of PEFT, or of any modules that have ``lora_A`` and ``lora_B``; not
            wrapped in DDP.
        batch: Positional arguments of the model in a tuple or list, or its keyword arguments in a dict.

    Returns:
        One name for each A and B, in the order of the model's modules: the path of the layer, with ``[adapter]`` behind
        it if the layer has several (its number, or its name in PEFT). Empty if all are live. An adapter that no sample
        of the batch uses is dead on that batch, and so are all of a tower that the batch does not reach.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, cannot be copied, or ``batch`` is of another type.
        ValueError: There is no LoRA, or the output holds no tensor or is not finite.

    Example:
        >>> import torch, rsfast.models
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> report = rsfast.models.add_lora(model, r=2, targets=("0", "1"))
        >>> rsfast.models.check_live(model, (torch.randn(3, 8),))
        []
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(batch, tuple | list | Mapping):
        raise TypeError(
            f"batch must be a tuple or list of positional arguments or a dict of keyword arguments, "
            f"got {type(batch).__name__}"
        )
    if not any(True for _ in _pairs(model)):
        raise ValueError("model has no LoRA: no module of it has a lora_A and a lora_B")
    random = _random_state()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return _Trial(model, batch, random).dead()
    finally:
        _set_random_state(random)


class _Trial:
    """A copy of a model that may be perturbed."""

    def __init__(self, model: nn.Module, batch: tuple | list | Mapping, random: list[Tensor]):
        try:
            self.model = copy.deepcopy(model).eval().requires_grad_(False)
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"model must be one that copy.deepcopy can copy: {error}") from error
        for module in list(self.model.modules()):
            if getattr(module, "merged", False) and hasattr(module, "lora_A"):
                module.unmerge()
        self.batch, self.random = batch, random
        self.pairs = list(_pairs(self.model))
        self.draws = torch.Generator().manual_seed(0)

    def dead(self) -> list[str]:
        for pair in self.pairs:
            pair.part.add_(self.like(pair.part), alpha=SMALL)
        grads = self.gradients()
        silent = [pair for pair in self.pairs if not _speaks(pair, grads[id(pair.lora_B)])]
        if not silent:
            return []
        with torch.no_grad():
            self.before = self.run()
            if not self.before or not all(x.isfinite().all() for x in self.before):
                what = "is not finite" if self.before else "holds no tensor"
                raise ValueError(f"the model's output of this batch {what}, so that no change of it can be seen")
            again = self.run()
            self.noise = [_distance(a, b) for a, b in zip(self.before, again, strict=True)]
            return [pair.name for pair in self.without_effect(silent)]

    def gradients(self) -> dict[int, Tensor | None]:
        """Of a random sum of all outputs, with respect to every B."""
        factors = list({id(pair.lora_B): pair.lora_B.requires_grad_() for pair in self.pairs}.values())
        outputs = [x for x in self.run() if x.requires_grad]
        grads = [None] * len(factors)
        if outputs:
            grads = torch.autograd.grad(outputs, factors, [self.like(x) for x in outputs], allow_unused=True)
        for factor in factors:
            factor.requires_grad_(False)
        return {id(factor): grad for factor, grad in zip(factors, grads, strict=True)}

    def without_effect(self, pairs: list[_Pair]) -> list[_Pair]:
        """Those of the pairs whose B changes no output; a half at a time where some of them do."""
        if all(self.same(self.changed(pairs, sign)) for sign in (LARGE, -LARGE)):
            return pairs
        half = len(pairs) // 2
        return [*self.without_effect(pairs[:half]), *self.without_effect(pairs[half:])] if half else []

    def changed(self, pairs: list[_Pair], size: float) -> list[Tensor]:
        kept = [pair.part.clone() for pair in pairs]
        for pair in pairs:
            pair.part.add_(self.like(pair.part), alpha=size)
        outputs = self.run()
        for pair, values in zip(pairs, kept, strict=True):
            pair.part.copy_(values)
        return outputs

    def same(self, outputs: list[Tensor]) -> bool:
        """Whether outputs are those from before, but for what two runs of the same model differ by."""
        if [x.shape for x in outputs] != [x.shape for x in self.before]:
            return False
        far = zip(map(_distance, outputs, self.before), self.noise, strict=True)
        return all(distance <= 2 * noise for distance, noise in far)

    def run(self) -> list[Tensor]:
        _set_random_state(self.random)
        named = isinstance(self.batch, Mapping)
        return list(_tensors(self.model(**self.batch) if named else self.model(*self.batch)))

    def like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.draws).to(x.device, x.dtype)


def _speaks(pair: _Pair, grad: Tensor | None) -> bool:
    if grad is None:
        return False
    grad = grad if pair.index is None else grad[pair.index]
    return bool(grad.isfinite().all() and grad.any())


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; NaN, which is below nothing, where one is not finite."""
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def _pairs(model: nn.Module) -> Iterator[_Pair]:
    for path, module in model.named_modules():
        for kind in ("lora_", "lora_embedding_"):
            factor = getattr(module, f"{kind}B", None)
            if factor is None or not hasattr(module, f"{kind}A"):
                continue
            if isinstance(module, BatchedLoRALinear):
                yield from (_Pair(f"{path}[{g}]", factor, g) for g in range(module.num_adapters))
            elif isinstance(factor, nn.ModuleDict | nn.ParameterDict):  # PEFT's, by the name of the adapter
                for adapter, B in factor.items():
                    yield _Pair(path if len(factor) == 1 else f"{path}[{adapter}]", _weight(B), None)
            else:
                yield _Pair(path, _weight(factor), None)


def _weight(factor: nn.Module | Tensor) -> Tensor:
    return factor if isinstance(factor, Tensor) else factor.weight


def _tensors(output) -> Iterator[Tensor]:
    """All tensors of numbers in what a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (x for value in output.values() for x in _tensors(value))
    elif isinstance(output, tuple | list):
        yield from (x for value in output for x in _tensors(value))
    elif dataclasses.is_dataclass(output):
        yield from (x for f in dataclasses.fields(output) for x in _tensors(getattr(output, f.name)))


def _random_state() -> list[Tensor]:
    """Of the CPU's generator and, if CUDA is in use, of its devices'."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
