"""``rsfast tune``: times every implementation of a LoRA layer's stages on this GPU, and writes which one is fastest.

Nothing is ever timed while a model trains: what this command wrote is read once a process.
"""

import argparse
import copy
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import rsfast
from rsfast._dispatch import HAS_TRITON
from rsfast.testing import assert_within_budget

# rows, inputs, outputs: square layers, then ViT-B/16, ViT-L/14, a decoder, ViT-B/32, UNets
SHAPES = (
    (65792, 1024, 1024), (50432, 768, 768), (50432, 512, 512), (65536, 320, 320),
    (50432, 768, 2304), (50432, 768, 3072), (50432, 3072, 768), (65792, 1024, 3072), (65792, 1024, 4096),
    (65792, 4096, 1024), (50432, 512, 2048), (12800, 768, 768), (12800, 768, 2304), (12800, 768, 3072),
    (16384, 640, 640), (16384, 1280, 1280), (19712, 768, 320), (19712, 768, 640), (19712, 768, 1280),
)  # fmt: skip
RANKS = (16, 8)
# dgrad and low together: an augmented product wants ds where only one pass over dY writes it
GROUPS = (("forward",), ("dgrad", "low"), ("factor",))
DROPOUT_P, ADAPTERS = 0.1, 8  # of the layers with dropout, and with several adapters
ROUNDS = 15
CHECKED_ROWS = 4099  # against the reference; at its full size a result is held to the composed one
UNTUNED = "untuned: composed"


def table_in_use(device: torch.device) -> str:
    """Path of the table that speaks for a GPU, or that there is none, so that products of cuBLAS run."""
    if not HAS_TRITON:
        return UNTUNED
    from rsfast.lora.kernels import plan

    path = plan.table_path(plan.gpu_name(device))
    return UNTUNED if path is None else str(path)


def shapes_of(model: str, batch_size: int) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of the linear layers in both towers of an open_clip model.

    Raises:
        ValueError: open_clip knows no such model, or a tower is no transformer of its own.
    """
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(f"--model: open_clip knows no {model!r}; open_clip.list_models() names those it knows")
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision.get("layers"), int) or "width" not in text:
        raise ValueError(f"--model {model}: its towers are not open_clip's own transformers; give --shapes M,K,N")
    side = vision.get("image_size", 224) // vision["patch_size"]
    found = []
    for tower, width, tokens in (
        (vision, vision["width"], side * side + 1), (text, text["width"], text.get("context_length", 77)),
    ):  # fmt: skip
        wide, rows = int(width * tower.get("mlp_ratio", 4.0)), batch_size * tokens
        found += [(rows, width, width), (rows, width, 3 * width), (rows, width, wide), (rows, wide, width)]
    return found


def everything(shapes, ranks, dtype: torch.dtype) -> list:
    """The layers to tune, what matters most first: the first shapes in every kind, then the others, rank after rank."""
    from rsfast.lora.kernels.plan import Facts

    # one LoRA, one for each of q, k and v, dropout, a bank
    kinds = ((1, 0, False), (3, 0, False), (1, 0, True), (1, ADAPTERS, False), (3, 0, True))
    return [
        Facts(rows, width, outputs, rank, parts, adapters, dropout, dtype)
        for rank, some, (parts, adapters, dropout) in itertools.product(ranks, (shapes[:4], shapes[4:]), kinds)
        for rows, width, outputs in some
        if parts == 1 or outputs == parts * width
    ]


def label(choices) -> str:
    """What a choice, or a choice for each stage of a group, is called in a table."""
    sizes = "{BLOCK_M}x{BLOCK_N}x{BLOCK_K}/{num_warps}/{num_stages}"
    return " + ".join(c.arm + (" " + sizes.format(**vars(c))) * (c.arm in ("expand", "inside")) for c in choices)


class Table:
    """The user's table, written after every group of stages.

    It starts from the table in use, whose other choices it takes along. ``measured`` says under which versions a key
    was timed; an interrupted command does not time it again.

    Args:
        path: The file; a broken one is moved aside.
        gpu: Name of the GPU.
        top: What else stands at the top: capability, commit.
    """

    VERSIONS = ("rsfast", "torch", "triton")

    def __init__(self, path: Path, gpu: str, **top):
        from rsfast.lora.kernels import plan

        self.path, self.versions = path, {name: importlib.metadata.version(name) for name in self.VERSIONS}
        self.content = {"gpu": gpu, **top, **self.versions, "date": "", "measured": {}, "choices": {}}
        start = path if path.is_file() else plan.table_path(gpu)
        if start is None:
            return
        try:
            plan.read_table(start)
        except ValueError as error:
            print(f"{error}; a new one is written", file=sys.stderr)
            if start == path:
                os.replace(path, path.with_name(f"{path.name}.broken"))
            return
        found = json.loads(start.read_text())
        self.content |= {name: found.get(name, {}) for name in ("measured", "choices")}

    def __contains__(self, key: str) -> bool:
        """Whether it was timed under the versions installed now."""
        measured = self.content["measured"].get(key, {})
        return key in self.content["choices"] and all(measured.get(n) == v for n, v in self.versions.items())

    def add(self, entries: dict[str, dict]) -> None:
        """Write them; a reader, or a command cut off, finds the old file or the new one."""
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
        self.content["date"] = now
        self.content["choices"] |= entries
        self.content["measured"] |= {key: {**self.versions, "date": now} for key in entries}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(f".{os.getpid()}.tmp")
        half.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(half, self.path)


def tune(
    layers: list, table: Table, measure: Callable, budget: float, *, again: bool = False, clock=time.monotonic
) -> Iterator[str]:
    """Time what is not in the table yet, and say a line about each group of stages.

    Args:
        layers: Facts, in order of importance.
        table: Written after each group.
        measure: (facts, stages, combinations) -> (the best one's index, None if the composed one, the first, cannot
            run; seconds of each that can; reasons of the others), by index.
        budget: Seconds after which nothing more is begun.
        again: Also what the table has already.
        clock: Tells the time.
    """
    from rsfast.lora.kernels import plan

    begun, seen, waiting = clock(), set(), 0
    for facts, stages in itertools.product(layers, GROUPS):
        keys = [facts.key(stage) for stage in stages]
        combinations = list(itertools.product(*(plan.candidates(stage, facts) for stage in stages)))
        if len(combinations) == 1 or keys[0] in seen or (not again and all(key in table for key in keys)):
            continue
        seen.add(keys[0])
        if clock() - begun > budget:
            waiting += 1
            continue
        best, seconds, reasons = measure(facts, stages, combinations)
        yield from (f"  {label(combinations[i])} is left out: {reason}" for i, reason in reasons.items())
        if best is None:
            yield f"{keys[0]}: not tuned, for there is nothing to compare with"
            continue
        timed = {label(combinations[i]): took for i, took in seconds.items()}
        table.add({
            key: vars(choice) | {"seconds": timed} for key, choice in zip(keys, combinations[best], strict=True)
        })  # fmt: skip
        mine, composed = (1e6 * seconds[i] for i in (best, 0))
        yield f"{keys[0]}: {label(combinations[best])}, {mine:.1f} us; composed {composed:.1f} us"
    if waiting:
        yield f"the budget is spent: {waiting} more to time; the same command goes on with them"


class Layer:
    """A layer of some facts with random tensors, B too, on which these stages can be run by forced choices.

    A gradient is asked for of what the stages are for, and of nothing else, which would be computed beside it.
    """

    def __init__(self, facts, stages: tuple[str, ...], device: torch.device, sets: int = 1):
        g = torch.Generator(device).manual_seed(0)

        def draw(*size, std=1.0, dtype=facts.dtype):
            return (torch.randn(size, generator=g, device=device) * std).to(dtype)

        k, n, r, bank = facts.contracted, facts.outputs, facts.rank, (facts.adapters,) * bool(facts.adapters)
        self.weight, self.bias = draw(n, k, std=k**-0.5), draw(n, std=0.3)
        factors = ((*bank, facts.parts * r, k), k**-0.5), ((*bank, n, r), r**-0.5)
        self.stages, low = stages, "low" in stages
        self.factors = [
            draw(*size, std=std, dtype=torch.float32).requires_grad_(learned)
            for (size, std), learned in zip(factors, ("factor" in stages, low), strict=True)
        ]
        x, dy = draw(facts.rows, k), draw(facts.rows, n)
        self.x = [x.roll(i, 0).requires_grad_(low) for i in range(sets)]
        self.dy = [dy.roll(i, 0) for i in range(sets)]
        ends = [n * part // facts.parts for part in range(facts.parts + 1)]
        self.options = dict(slices=tuple(itertools.pairwise(ends)) if facts.parts > 1 else None)
        if facts.dropout:
            self.options |= dict(dropout_p=DROPOUT_P, seed=torch.full((), 7, device=device))
        self.batch, self.scaling = None, 1.5
        if facts.adapters:  # neighbours differ, as samples of a shuffled batch do
            ids = torch.arange(facts.rows, device=device) // 64 * 5 % facts.adapters
            self.batch = rsfast.AdapterBatch(ids, facts.adapters)
            self.scaling = torch.full((facts.adapters,), 1.5, device=device)

    def widened(self, dtype: torch.dtype) -> "Layer":
        """The same numbers in a wider dtype."""
        wide = copy.copy(self)
        wide.weight, wide.bias = self.weight.to(dtype), self.bias.to(dtype)
        wide.factors, wide.x = (
            [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in ts] for ts in (self.factors, self.x)
        )
        return wide

    def forward(self, i: int = 0, impl: str = "fused") -> Tensor:
        args = self.x[i], self.weight, self.bias, *self.factors, self.scaling
        if self.batch is None:
            return rsfast.lora_linear(*args, **self.options, impl=impl)
        return rsfast.batched_lora_linear(*args, self.batch, **self.options, impl=impl)

    def backward(self, y: Tensor, i: int = 0) -> tuple[Tensor, ...]:
        leaves = [t for t in (self.x[i], *self.factors) if t.requires_grad]
        return torch.autograd.grad(y, leaves, self.dy[i].to(y.dtype), retain_graph=True)

    def results(self, choices, impl: str = "fused") -> tuple[Tensor, ...]:
        """What the stages compute by these choices, the other stages composed."""
        with forced(self.stages, choices):
            y = self.forward(impl=impl)
            return (y,) if self.stages == ("forward",) else self.backward(y)


def forced(stages: tuple[str, ...], choices):
    """Inside, these stages run these choices, and every other stage is composed."""
    from rsfast.lora.kernels import plan

    return plan.forced(dict.fromkeys(plan.STAGES, plan.COMPOSED) | dict(zip(stages, choices, strict=True)))


def check(facts, stages, combinations, device: torch.device) -> tuple[dict[int, list[float]], dict[int, str]]:
    """Each result's distance from the reference in a wider dtype; a reason instead where it is over the budget."""
    few = dataclasses.replace(facts, rows=min(facts.rows, CHECKED_ROWS))
    layer = Layer(few, stages, device)
    wide = layer.widened(torch.float64 if facts.dtype == torch.float32 else torch.float32)
    gold, plain = (one.results(combinations[0], impl="reference") for one in (wide, layer))
    found, reasons = {}, {}
    for i, choices in enumerate(combinations):
        try:
            actual = layer.results(choices)
            for a, g, e in zip(actual, gold, plain, strict=True):
                terms = max(few.rows, few.contracted, few.outputs)
                assert_within_budget(a.to(facts.dtype), g, e.to(facts.dtype), terms=terms, name="its result")
            found[i] = [_distance(a, g) for a, g in zip(actual, gold, strict=True)]
        except Exception as error:  # whatever ails one of them, the others can be used
            reasons[i] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found, reasons


def _distance(a: Tensor, b: Tensor) -> float:
    return (torch.linalg.vector_norm(a.to(b.dtype) - b) / torch.linalg.vector_norm(b)).item()


def agree(layer: Layer, combinations, errors: dict[int, list[float]]) -> dict[int, str]:
    """Reasons against those that, at the full size, are further from the composed result than both are wrong."""
    composed, reasons = layer.results(combinations[0]), {}
    for i in errors:
        actual = layer.results(combinations[i])
        for a, b, own, other in zip(actual, composed, errors[i], errors[0], strict=True):
            if not _distance(a, b) <= 2 * (own + other):
                reasons[i] = f"at {len(layer.x[0])} rows it is {_distance(a, b):.1e} from the composed result"
    return reasons


def on_gpu(facts, stages, combinations, device: torch.device | None = None):
    """For :func:`tune`: device seconds a call, by CUDA graphs over rotating inputs, in turn, from a cold cache.

    The best one has to be faster than the composed one a second time.
    """
    torch.cuda.empty_cache()
    device = device or torch.device("cuda", torch.cuda.current_device())
    try:
        errors, reasons = check(facts, stages, combinations, device)
        if 0 in reasons:
            return None, {}, reasons
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        bytes_of_one = facts.rows * facts.contracted * facts.dtype.itemsize
        layer = Layer(facts, stages, device, max(4, math.ceil(2 * l2 / bytes_of_one)))
        reasons |= agree(layer, combinations, errors)
        right = [i for i in range(len(combinations)) if i not in reasons]
        runs = dict(zip(right, _captured(layer, [combinations[i] for i in right]), strict=True))
        junk = torch.empty(4 * l2, dtype=torch.uint8, device=device)
        took = _in_turn(runs, junk)
        best = 0
        for i in sorted(right, key=took.get):
            again = _in_turn({0: runs[0], i: runs[i]}, junk) if i else {}
            if not i or again[i] < again[0]:
                best = i
                break
        return best, {i: seconds / len(layer.x) for i, seconds in took.items()}, reasons
    except torch.OutOfMemoryError as error:
        return None, {}, {0: f"out of memory: {str(error).splitlines()[0]}"}


def _captured(layer: Layer, combinations) -> list[Callable]:
    """What runs each combination over all inputs; every call writes where no other does."""
    pool, sets, backward = torch.cuda.graph_pool_handle(), range(len(layer.x)), layer.stages != ("forward",)
    runs = []
    if backward:
        first = torch.cuda.CUDAGraph()
        with forced((), ()), torch.cuda.graph(first, pool=pool):
            outputs = [layer.forward(i) for i in sets]
        first.replay()
        layer.outputs = outputs, first  # kept, for the backward reads what they hold
    for choices in combinations:
        graph = torch.cuda.CUDAGraph()
        with forced(layer.stages, choices), torch.cuda.graph(graph, pool=pool):
            kept = [layer.backward(outputs[i], i) if backward else layer.forward(i) for i in sets]
            del kept
        runs.append(graph.replay)
    return runs


def _in_turn(runs: dict[int, Callable], junk: Tensor) -> dict[int, float]:
    """Median seconds of each, one after the other in every round."""
    took = {i: [] for i in runs}
    for _, (i, run) in itertools.product(range(ROUNDS + 2), runs.items()):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        junk.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        took[i].append(start.elapsed_time(stop) / 1e3)
    return {i: statistics.median(times[2:]) for i, times in took.items()}


def _shape(text: str) -> tuple[int, int, int]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"a shape is M,K,N: rows, inputs, outputs, all positive; got {text!r}")
    return sizes


def add_parser(subparsers) -> None:
    """Add ``tune`` to the command line."""
    parser = subparsers.add_parser(
        "tune", help="time the implementations of LoRA layers on this GPU and remember the fastest"
    )  # fmt: skip
    parser.add_argument("--ops", default="lora", choices=("lora",), help="what to tune (default: %(default)s)")
    parser.add_argument("--model", nargs="+", default=[], help="open_clip models whose layers to tune")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[], metavar="M,K,N", help="rows, inputs, outputs")
    parser.add_argument("--batch-size", type=int, default=256, help="of --model (default: %(default)s)")
    parser.add_argument("--rank", nargs="+", type=int, default=list(RANKS), help="ranks (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="default: %(default)s"
    )
    parser.add_argument("--budget", type=float, default=600.0, help="seconds to spend (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="also time what the table has already")
    parser.add_argument("--commit", default="", help="commit of the library, written into the table")
    parser.set_defaults(run=main)


def main(args, measure: Callable = on_gpu) -> int:
    from rsfast.lora.functional.checks import MAX_RANK

    if not all(1 <= rank <= MAX_RANK for rank in args.rank) or args.batch_size < 1 or not args.budget > 0:
        raise ValueError(
            f"--rank must be 1 to {MAX_RANK}, --batch-size and --budget positive; got {args.rank}, {args.batch_size}, "
            f"{args.budget}"
        )
    shapes = [shape for model in args.model for shape in shapes_of(model, args.batch_size)] + args.shapes
    if not HAS_TRITON or not torch.cuda.is_available():
        missing = "a GPU, and none is visible" if HAS_TRITON else "Triton, which is not installed"
        raise NotImplementedError(f"tune needs {missing}: without it nothing can be timed and nothing is chosen")
    from rsfast.lora.kernels import plan

    major, minor = torch.cuda.get_device_capability()
    gpu = torch.cuda.get_device_name()
    table = Table(plan.user_table(gpu), gpu, capability=10 * major + minor, commit=args.commit)
    print(f"writing {table.path}", flush=True)
    layers = everything(shapes or SHAPES, args.rank, getattr(torch, args.dtype))
    for line in tune(layers, table, measure, args.budget, again=args.again):
        print(line, flush=True)
    return 0
