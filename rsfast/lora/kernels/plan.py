"""Which implementation each stage of a layer runs, and the batch as the kernels take it."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from rsfast._dispatch import capability
from rsfast._tiles import pad, roomy

STAGES = ("forward", "dgrad", "low", "factor")  # y; dx; ds and dB from dY; dA from x and ds
TABLES = pathlib.Path(__file__).parent.parent / "tables"  # that come with the library, measured on a GPU of that name
ROWS = (4096, 16384, 40960)  # where a bucket of rows ends
Slices = tuple[int, ...]  # start, end, and first row of lora_B, of each slice


def flat(slices: tuple[tuple[int, int], ...] | None) -> list[int]:
    """Start, end and first row of lora_B of each slice."""
    numbers, first = [], 0
    for start, end in slices or ():
        numbers += [start, end, first]
        first += end - start
    return numbers


@dataclasses.dataclass(frozen=True)
class Batch:
    """Who has which adapter; everything None for a layer with one. The tables are those of ``AdapterBatch``."""

    ids: Tensor | None = None
    counts: Tensor | None = None
    listed: Tensor | None = None
    order: Tensor | None = None
    fine: Tensor | None = None
    fine_last: Tensor | None = None
    coarse: Tensor | None = None
    coarse_last: Tensor | None = None
    scales: Tensor | None = None

    @property
    def several(self) -> bool:
        return self.ids is not None

    @property
    def most(self) -> int:
        """Adapters that a tile can have."""
        return 0 if self.listed is None else self.listed.shape[1]

    @staticmethod
    def slices_on(x: Tensor, slices: Slices) -> Tensor | None:
        return _on_device(slices, x.device) if slices else None


@functools.cache  # without a limit, for a graph reads what the cache would forget
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied once, so that a CUDA graph, which is captured after a first call, can hold it."""
    return torch.tensor(numbers, dtype=torch.int32).to(device)


@dataclasses.dataclass(frozen=True)
class Made:
    """The function that gave x, with what it needs beside its input."""

    function: str | None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation of a stage; the sizes are those of ``linear_kernel``, unused by the others.

    ``composed`` are products of cuBLAS and what they need between them. ``augmented``: one product of [x | s] and
    [W | B]. ``expand``: the low-rank sum in the product's accumulator. ``inside``: s, too, from the product's tiles.
    ``once``: ds and dB from one read of dY. ``outer``: sums of chunks of rows.
    """

    arm: str
    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    num_warps: int = 8
    num_stages: int = 3


COMPOSED = Choice("composed")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a choice may depend on: nothing but sizes that recur, and never the scale."""

    rows: int
    contracted: int
    outputs: int
    rank: int  # of a slice
    parts: int
    adapters: int  # 0 for a layer with one
    dropout: bool
    dtype: torch.dtype

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - facts are values, and every layer asks at every call
    def key(self, stage: str) -> str:
        """Name of these facts in a table; ranks that the kernels pad to one size share it."""
        bucket = next((f"to{end}" for end in ROWS if self.rows <= end), f"over{ROWS[-1]}")
        name = str(self.dtype).removeprefix("torch.")
        several = "several" if self.adapters else "one"
        return (
            f"{stage} {name} {bucket} {self.contracted}x{self.outputs} r{pad(self.rank)}x{self.parts} {several} "
            f"{'dropout' if self.dropout else 'whole'}"
        )


@functools.lru_cache(maxsize=4096)
def candidates(stage: str, facts: Facts) -> tuple[Choice, ...]:
    """Everything that can run a stage, the composed one first; at most twelve."""
    plain = not facts.adapters and not facts.dropout
    if stage == "low":
        return (COMPOSED, *[Choice("once")] * (facts.rank <= 64))
    if stage == "factor":
        return (COMPOSED, *[Choice("outer")] * plain)  # composed is the same without plain
    found = [COMPOSED]
    # dropout's mask is of x: forward it is spent on s already
    if not facts.adapters and (stage == "forward" or not facts.dropout):
        found.append(Choice("augmented"))
    tiles = _tiles(facts.dtype)
    found += [Choice("expand", **sizes) for sizes in tiles]
    if stage == "forward" and plain and facts.parts == 1 and facts.rank <= 32 and facts.dtype != torch.float32:
        found += [Choice("inside", **sizes) for sizes in tiles]
    return tuple(found[:12])


def _tiles(dtype: torch.dtype) -> list[dict]:
    if dtype == torch.float32:
        return [dict(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2)]
    return [
        dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3),
        dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
        dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=4),
        dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=4),
    ]


def insisted(stage: str, facts: Facts, sm: int) -> Choice:
    """What ``impl="fused"`` runs where no table speaks: our kernels, by estimates that nobody has measured."""
    if stage in ("low", "factor"):
        return candidates(stage, facts)[-1]
    arms = [choice for choice in candidates(stage, facts) if choice.arm in ("expand", "inside")]
    inside = [choice for choice in arms if choice.arm == "inside"]
    if inside and facts.outputs <= 1024 and facts.rank <= 16:  # where one more read of x costs more than more columns
        arms = inside
    wide = sm >= 90 and roomy(sm) and facts.outputs > 512 and facts.dtype != torch.float32
    return arms[0] if wide or len(arms) == 1 else arms[1]


FORCED: dict[str, Choice] = {}


@contextlib.contextmanager
def forced(choices: dict[str, Choice]) -> Iterator[None]:
    """Inside, these stages run these choices, whatever the tables say: for tuning and tests."""
    before = dict(FORCED)
    FORCED.update(choices)
    try:
        yield
    finally:
        FORCED.clear()
        FORCED.update(before)


def choose(stage: str, facts: Facts, device: torch.device, insist: bool) -> Choice:
    """The forced one, else the table's, else the kernels if ``insist``, else the composed one."""
    if stage in FORCED:
        return FORCED[stage]
    choice = table_of(device).get(facts.key(stage))
    if choice is not None and choice in candidates(stage, facts):  # a table of another version may know others
        return choice
    return insisted(stage, facts, capability(device)) if insist else COMPOSED


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


def file_name(gpu: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def user_table(gpu: str) -> pathlib.Path:
    """Where ``rsfast tune`` writes for this GPU."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # pathlib's wants a home, and raises
    return pathlib.Path(cache) / "rsfast" / "lora" / file_name(gpu)


def table_path(gpu: str) -> pathlib.Path | None:
    """The table in use: the user's, else the one that comes with the library, else none."""
    # os.path's is_file: that of pathlib raises where a folder may not be read, as another user's home in a container
    return next((path for path in (user_table(gpu), TABLES / file_name(gpu)) if os.path.isfile(path)), None)


@functools.cache
def table_of(device: torch.device) -> dict[str, Choice]:
    """Choices by key; read once a process, so that equal calls choose equally."""
    path = table_path(gpu_name(device))
    if path is None:
        return {}
    try:
        return read_table(path)
    except ValueError as error:
        warnings.warn(f"{error}; products of cuBLAS run instead. `rsfast tune` writes a new one", stacklevel=2)
        return {}


def read_table(path: pathlib.Path) -> dict[str, Choice]:
    """Choices by key of a table.

    Raises:
        ValueError: It is no table; the message names the file and what is wrong.
    """
    fields = [field.name for field in dataclasses.fields(Choice)]
    try:
        content = json.loads(path.read_text())
        entries, measured = content["choices"], content.get("measured", {})
        if not all(isinstance(versions, dict) for versions in measured.values()):
            raise TypeError("measured must hold a dict for each key")
        return {key: Choice(**{name: entry[name] for name in fields}) for key, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of rsfast tune: {type(error).__name__}: {error}") from None
