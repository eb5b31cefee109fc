"""What a row of the table of operations is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    name: str
    public: Callable
    reference: Callable
    names: tuple[str, ...]  # of the tensors that inputs() makes
    inputs: Callable  # (shape, dtype, device) -> tuple of floating point tensors
    pack: Callable  # those tensors -> (args, kwargs) of public and reference
    terms: Callable  # shape -> longest sum in the maths
    io_bytes: Callable  # (shape, itemsize, backward=False) -> bytes the ideal kernel moves
    flops: Callable  # (shape, backward=False) -> operations of the ideal kernel, which recomputes nothing
    scalars: Callable  # shape -> name of each parameter that is one number, and the shape of what it multiplies
    small: tuple = ()  # shapes for tests: aligned, odd, ones, empty, and both sides of a kernel's choices
    large: tuple = ()  # shapes for benchmarks
    dtypes: tuple = (FP32, FP16, BF16)
    ahead: tuple = ()  # shapes for compiling ahead of time where nothing is timed
    enough: int = 2  # first dimension beyond which the kernels stay the same
    tiny: tuple = ()  # shape for the tests of how it is wired to PyTorch; rows without one only differ in size

    def __str__(self):
        return self.name

    def call(self, fn, tensors, **options):
        args, kwargs = self.pack(tensors)
        return fn(*args, **kwargs, **options)

    def scale(self, tensors, dy) -> dict[str, float]:
        """Norm of the terms in the gradient of each scalar: one sum over everything, so it cancels.

        The other gradients are many sums of the same kind, so the largest of them is the size of the terms.
        """
        tensors = [t.detach().double() for t in tensors]
        scales = {}
        for name, shape in self.scalars(tensors[0].shape).items():
            at = self.names.index(name)
            each = tensors[at].expand(shape).clone().requires_grad_()  # one copy for each number it multiplies
            y = self.call(self.reference, [*tensors[:at], each, *tensors[at + 1 :]])
            scales[name] = torch.autograd.grad(y, each, dy.double())[0].norm().item()
        return scales

    def has_kernel(self) -> bool:
        """No kernel takes float64, so a fused one has to say why it cannot run: because there is none yet?"""
        try:
            self.call(self.public, self.inputs(self.small[0], torch.float64, "cpu"), impl="fused")
        except NotImplementedError as error:
            return "no kernel yet" not in str(error)
        raise AssertionError(f"{self}: a kernel takes float64")


def draw(shapes, dtype, device):
    """Normal numbers; ``shapes`` holds (shape, standard deviation)."""
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=g) * std).to(device, dtype) for shape, std in shapes]
