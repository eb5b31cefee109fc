"""Floors of the adapter, the in-batch losses, layers with LoRA and k-means: what no version can run much faster than.

python -m benchmarks.floors            rewrite the table in benchmarks/NOTES.md
"""

import math
import pathlib

import torch

from benchmarks import kmeans
from benchmarks.arms import ADAPTERS, TIMED, caption_lengths
from benchmarks.lora import ROWS

NOTES = pathlib.Path(__file__).parent / "NOTES.md"
LORA = ("lora_linear_r16", "lora_linear_r16_dropout", "lora_linear_r64", "batched_lora_linear_g8_random")
START, END = "<!-- floors:start -->", "<!-- floors:end -->"
# rates of an H200 in units a second: a large copy and a large bf16 product as measured on one before this library was
# written; exponentials as 16 a clock on each of 132 multiprocessors at 1.755 GHz, which nobody has measured
COPY, PRODUCTS, EXPONENTIALS = 4.3e12, 790e12, 16 * 132 * 1.755e9
BARRIER = 2.5e-6  # seconds that all blocks of a grid take to wait for each other; a guess
MANY = 256  # clusters from which on k-means is bound by products, and sums by label read the rows again
ROUNDS = 16  # passes over all costs that the size constraint makes
CACHE = 50e6  # bytes of rows that stay on the chip
SCANS = 3  # passes that k-means++ by rejection makes


# of a loss, forward and backward without S in memory: products of 2 N^2 D operations; exponentials or logarithms a
# pair. A softmax needs its sums before any gradient, so S is computed twice; a sum over pairs does not, and the hardest
# negatives have few gradients; S of the uniformity is symmetric
LOSSES = {
    "contrastive_loss": (4, 2), "harma_loss_ids": (4, 4), "adaptive_triplet_loss": (3, 1),
    "triplet_loss_hardest": (1, 0), "sigmoid_loss": (3, 2), "uniformity_loss": (1.5, 0.5),
}  # fmt: skip


def exponentials(name: str, shape: tuple[int, int, int]) -> int:
    """One a score: 8 heads, two passes over the tokens, three with the sub-adapter."""
    batch, tokens, _ = shape
    lengths = caption_lengths(batch).clamp(max=tokens).tolist() if "captions" in name else [tokens] * batch
    return 8 * (3 if "shared" in name else 2) * sum(n * n for n in lengths)


def table() -> list[str]:
    lines = [
        "| operation | shape | pass | MB | GFLOP | G exp | bytes, us | products, us | exp, us | floor, us |",
        "|---|---|---|" + "---:|" * 7,
    ]
    for name, case in ADAPTERS.items():
        for shape in case.large:
            for which, backward in (("forward", False), ("backward", True)):
                work = (
                    case.io_bytes(shape, 2, backward=backward),
                    case.flops(shape, backward=backward),
                    exponentials(name, shape),  # the backward draws the probabilities again
                )
                times = [1e6 * amount / rate for amount, rate in zip(work, (COPY, PRODUCTS, EXPONENTIALS), strict=True)]
                cells = [name, "x".join(map(str, shape)), which]
                cells += [f"{work[0] / 1e6:.1f}", f"{work[1] / 1e9:.1f}", f"{work[2] / 1e9:.2f}"]
                lines.append("| " + " | ".join([*cells, *(f"{t:.1f}" for t in (*times, max(times)))]) + " |")
    return lines


def loss_table() -> list[str]:
    lines = [
        "| loss, both passes | shape | MB | products | TFLOP | G exp | bytes, ms | products, ms | exp, ms | floor |",
        "|---|---|" + "---:|" * 8,
    ]
    for name, (products, each) in LOSSES.items():
        for n, d in TIMED[name].large:
            moved = sum(TIMED[name].io_bytes((n, d), 2, backward=backward) for backward in (False, True))
            work = moved, products * 2 * n * n * d, each * n * n
            times = [1e3 * amount / rate for amount, rate in zip(work, (COPY, PRODUCTS, EXPONENTIALS), strict=True)]
            cells = [name, f"{n}x{d}", f"{work[0] / 1e6:.0f}", f"{products:g}"]
            cells += [f"{work[1] / 1e12:.3g}", f"{work[2] / 1e9:.3g}", *(f"{t:.3g}" for t in (*times, max(times)))]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def lora_table() -> list[str]:
    lines = [
        "| layer | shape | pass | MB | GFLOP | of the layer alone | bytes, us | products, us | floor, us |",
        "|---|---|---|" + "---:|" * 6,
    ]
    for name in LORA:
        for shape in ROWS[name].shapes:
            for which, passes in (("forward", (False,)), ("forward+backward", (False, True))):
                moved = sum(ROWS[name].case.io_bytes(shape, 2, backward=backward) for backward in passes)
                flops = sum(ROWS[name].case.flops(shape, backward=backward) for backward in passes)
                alone = len(passes) * 2 * math.prod(shape)
                times = [1e6 * moved / COPY, 1e6 * flops / PRODUCTS]
                cells = [name, "x".join(map(str, shape)), which, f"{moved / 1e6:.0f}", f"{flops / 1e9:.0f}"]
                cells += [f"{100 * alone / flops:.0f} %", *(f"{t:.0f}" for t in (*times, max(times)))]
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def _slowest(passes: list[tuple[float, ...]]) -> float:
    """Seconds: of each pass its bytes, operations of products and exponentials over their rates, the largest."""
    return sum(max(w / r for w, r in zip(work, (COPY, PRODUCTS, EXPONENTIALS), strict=False)) for work in passes)


def _passes(which: str) -> tuple[bool, ...]:
    return {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}[which]


def adapter_floor(name: str, shape: tuple[int, ...], which: str) -> float:
    """Seconds, in bf16."""
    case, each = ADAPTERS[name], exponentials(name, shape)
    return _slowest(
        [(case.io_bytes(shape, 2, backward=b), case.flops(shape, backward=b), each) for b in _passes(which)]
    )


def loss_floor(name: str, shape: tuple[int, int]) -> float:
    """Seconds of forward and backward, in bf16."""
    (products, each), (n, d) = LOSSES[name], shape
    moved = sum(TIMED[name].io_bytes(shape, 2, backward=backward) for backward in (False, True))
    return _slowest([(moved, products * 2 * n * n * d, each * n * n)])


def lora_floor(name: str, shape: tuple[int, ...], which: str) -> float:
    """Seconds, in bf16; as in the table, both passes' bytes and products together."""
    case = ROWS[name].case
    work = [(case.io_bytes(shape, 2, backward=b), case.flops(shape, backward=b)) for b in _passes(which)]
    return _slowest([tuple(map(sum, zip(*work, strict=True)))])


def kmeans_work(name: str, shape: kmeans.Shape, dtype: torch.dtype) -> dict[str, int]:
    """Bytes and operations of an ideal kernel, which computes in bf16 on the parts that operands are split into.

    Exact labels take two products of 16-bit rows and three of fp32 rows; few clusters' sums are one more. With many
    clusters one product gives all labels but a few, and sums read the rows again.
    """
    n, width, k = shape
    rows, once = n * width * dtype.itemsize, 2 * n * width * k
    labels = once * (3 if dtype.itemsize == 4 else 2)
    if name == "kmeans_fit":
        reads = kmeans.ITERATIONS if rows > CACHE else 1
        return dict(moved=reads * rows, flops=kmeans.ITERATIONS * (labels + once))
    if name == "kmeans_minibatch":
        return dict(moved=kmeans.STEPS * rows, flops=kmeans.STEPS * (labels + once))
    if name == "kmeans_plusplus":
        return dict(moved=SCANS * rows, flops=labels)
    if name.startswith("kmeans_constrained"):
        return dict(moved=rows + ROUNDS * n * k * 4, flops=labels)
    if k >= MANY:
        return dict(moved=rows if name == "kmeans_assign" else 2 * rows, flops=once)
    return dict(moved=2 * rows if name == "kmeans_step_wide" else rows, flops=labels + once)


def kmeans_floor(name: str, shape: kmeans.Shape, dtype: torch.dtype) -> float:
    """Seconds."""
    moved, flops = kmeans_work(name, shape, dtype).values()
    if name == "kmeans_step_many":  # labels first, at the rate of products, then a pass for the sums
        return flops / PRODUCTS + moved / 2 / COPY
    loops = {"kmeans_fit": kmeans.ITERATIONS, "kmeans_minibatch": kmeans.STEPS}
    return max(moved / COPY, flops / PRODUCTS, loops.get(name, 0) * 2 * BARRIER)


def kmeans_table() -> list[str]:
    lines = [
        "| k-means | shape | dtype | MB | GFLOP | floor, ms | target | target, ms |",
        "|---|---|---|" + "---:|" * 5,
    ]
    for name, row in kmeans.ROWS.items():
        for shape in row.shapes:
            for dtype in row.dtypes:
                moved, flops = kmeans_work(name, shape, dtype).values()
                aim = kmeans.aims(name, shape, dtype, "auto")
                cells = [name, "x".join(map(str, shape)), str(dtype).removeprefix("torch.")]
                cells += [f"{moved / 1e6:.0f}", f"{flops / 1e9:.0f}", f"{1e3 * kmeans_floor(name, shape, dtype):.3g}"]
                cells += [aim.get("target_name", ""), f"{1e3 * aim['target_seconds']:g}" if aim else ""]
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def notes_with_table() -> str:
    before, _, rest = NOTES.read_text().partition(START)
    return (
        f"{before}{START}\n"
        + "\n".join([*table(), "", *loss_table(), "", *lora_table(), "", *kmeans_table()])
        + f"\n{END}{rest.partition(END)[2]}"
    )


if __name__ == "__main__":
    NOTES.write_text(notes_with_table())
