"""What several processes started by torchrun do together; with one process every method is a no-op."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes:
    """The group of training processes, as torchrun's environment describes it.

    Attributes:
        rank: Number of this process.
        world: How many there are.
        device: This process's device.
    """

    def __init__(self, device: str):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        on_gpu = device.startswith("cuda")
        if self.world > 1 and on_gpu:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        self.device = torch.device(device)
        self.own_group = self.world > 1 and not dist.is_initialized()
        if self.own_group:
            dist.init_process_group("nccl" if on_gpu else "gloo")

    def close(self) -> None:
        if self.own_group:
            dist.destroy_process_group()

    def wrap(self, module: nn.Module) -> nn.Module:
        """With gradients averaged over the processes."""
        if self.world == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        return nn.parallel.DistributedDataParallel(module, device_ids=[self.device] if self.device.index else None)

    def gather(self, x: Tensor) -> Tensor:
        """Everyone's rows. The gradient is summed over the processes, so that after averaging it is the true one."""
        if self.world == 1:
            return x
        if x.requires_grad:
            return torch.cat(torch.distributed.nn.functional.all_gather(x.contiguous()))
        rows = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere, so that all of them stop after the same step."""
        if self.world == 1:
            return flag
        flags = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(flags)
        return bool(flags.item())

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()
