"""One command for a machine with a GPU and little time: build, tests on CUDA, sanitizers, then benchmarks.

    python -m benchmarks.gpu --budget 540

Results are written as they come, what every part says goes to gpu-run.log beside them, so a run that is cut off keeps
both. Exits with 1 if any part failed.
"""

import argparse
import contextlib
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import torch

from benchmarks import results, sanitize
from benchmarks.capture import LOST
from tests import aot

ROOT = pathlib.Path(__file__).parent.parent
PARTS = (
    "build",
    "facts",
    "tests",
    "sample",
    "memcheck",
    "racecheck",
    "ops",
    "losses",
    "tune",
    "lora",
    "kmeans",
    "deblora",
    "step",
    "suite",
)  # "tests" are the kernels', "suite" is all the others
# seconds, so that no part eats the others; benchmarks get what is left
AT_MOST = {"build": 90.0, "facts": 75.0, "tests": 150.0, "sample": 45.0, "memcheck": 80.0, "racecheck": 50.0}
KEPT_FOR = {
    "losses": 150.0,
    "tune": 120.0,
    "lora": 150.0,
    "kmeans": 150.0,
    "deblora": 30.0,
    "step": 90.0,
    "suite": 60.0,
}  # seconds that the parts before leave, if so
KERNELS = (
    "contract",
    "adapter",
    "similarity*",
    "lora*",
    "tune*",
    "kmeans*",
    "extension",
    "csrc",
)  # tests that a GPU sees more of than a CPU
LOG, COMPILED = "gpu-run.log", "gpu-run-kernels.jsonl"
ROW_AT_MOST = 170.0  # seconds: a kernel that never ends takes one row with it, not all that come after
GRACE = 15.0  # seconds in which what is interrupted may still say what it found
WORD = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
AFTER = re.compile(
    rf"^(?:\[gw\d+\] \[ *\d+%\] )?({WORD}) (\S+\.py(?:::.+?)?)(?: - .*)?\s*$"
)  # xdist's lines, the summary's
BEGUN = re.compile(r"^(benchmarks/\S+\.py::\S+)", re.MULTILINE)  # a row, said before it runs
DIED = re.compile(rf"Timeout \(.+\)!$|{LOST}", re.MULTILINE)
BEFORE = re.compile(rf"^(\S+\.py::.+?) ({WORD})(?: \(.*)?(?: +\[ *\d+%\])?\s*$")
SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] (\S+?): (.*)$", re.MULTILINE)
QUIET = re.compile(r" (PASSED|SKIPPED)\b")  # lines for the log alone


def files_of_tests(part: str) -> list[str]:
    """Of the kernels, or all the others."""
    kernels = {path for name in KERNELS for path in ROOT.glob(f"tests/test_{name}.py")}
    chosen = kernels if part == "tests" else set(ROOT.glob("tests/test_*.py")) - kernels
    return [str(path.relative_to(ROOT)) for path in sorted(chosen)]


def command(part: str, args: argparse.Namespace, seconds: float, after: str | None = None) -> list[str]:
    """What runs a part, or what of its rows comes ``after`` one; benchmarks end shortly before their time is up."""
    # verbose: then a run that is cut off has said what failed
    pytest = [sys.executable, "-m", "pytest", "-v", "-rfEs", "-p", "no:cacheprovider"]
    chosen = ["-k", args.k] if args.k else []
    commit = ["--commit", args.commit] if args.commit else []
    if part == "build":
        return [sys.executable, "-m", "benchmarks.build"]
    if part == "facts":
        return [sys.executable, "-m", "benchmarks.facts", "--out", str(args.out), *commit]
    if part in ("tests", "suite"):
        workers = max((os.cpu_count() or 1) - 2, 1)  # kernels compile on the CPU, which takes most of the time
        several = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
        # a barrier that never opens would hang: then the log says where
        return [*pytest, "-o", "faulthandler_timeout=60", *files_of_tests(part), *several, *chosen]
    if part == "sample" or part in sanitize.TOOLS:
        sample = [sys.executable, "-m", "benchmarks.sanitize"]  # first alone, so that the kernels are compiled
        return sample if part == "sample" else sanitize.command(part, sanitize.tool(), sample)
    if part == "tune":
        rsfast = [sys.executable, "-c", "import sys; from rsfast.cli import main; sys.exit(main())"]
        return [*rsfast, "tune", "--budget", str(max(seconds - 30, 5)), *commit]
    target = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(f"benchmarks/bench_{part}*.py"))]
    until = str(time.monotonic() + max(seconds - 1.5 * GRACE, 5))  # importing takes of their time too
    options = ["--results", str(args.out), "--until", until, "--benchmark-disable-gc"]
    options += ["-o", f"faulthandler_timeout={ROW_AT_MOST:.0f}", "-o", "faulthandler_exit_on_timeout=true"]
    return [*pytest, *target, *options, *(["--after", after] if after else []), *commit, *chosen]


def whole(part: str, args: argparse.Namespace, seconds: float, start) -> tuple[int | None, str]:
    """(exit code, output) of a part; benchmarks go on after a row that took their process with it."""
    begun, output, after, died = time.monotonic(), "", None, None
    while True:
        left = seconds - (time.monotonic() - begun)
        code, said = start(command(part, args, left, after), left, environment(part, args.out))
        output += said
        rows = BEGUN.findall(said)
        if code is None or (code >= 0 and not DIED.search(said)) or not rows or left < 2 * GRACE:
            return None if code is None else code or died or 0, output
        after, died = rows[-1], code
        output += f"\n{after} ERROR\n"
        print(f"== {after} took its process with it; the rows after it follow", flush=True)


def environment(part: str, out: pathlib.Path) -> dict[str, str]:
    """Caches, so that tests see no table of `rsfast tune`, benchmarks see the one in ``out``, and all share a build."""
    plain = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "rsfast-gpu"
    if part not in AT_MOST and part != "suite":
        tuned = plain / "tuned" / results.slug(str(out))
        for link, target in (
            (tuned / "rsfast/csrc", plain / "rsfast/csrc"),
            (tuned / "rsfast/lora", out / "rsfast/lora"),
        ):
            target.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(target, target_is_directory=True)
        plain = tuned
    return {"XDG_CACHE_HOME": str(plain)} | (sanitize.ENVIRONMENT if part in sanitize.TOOLS else {})


def said(part: str, code: int | None, output: str) -> tuple[str, dict]:
    """(outcome, what else is kept of a part in the results), from its exit code (None: cut off) and its output."""
    if part in sanitize.TOOLS:
        report = sanitize.parse(output)
        return sanitize.verdict(code, report), report
    if part == "build":
        found = re.findall(r"^(compiled|built) (.+?) in ([\d.]+) s$", output, re.MULTILINE)
        kept = {"units": {name: float(took) for word, name, took in found if word == "compiled"}}
        if code:
            kept["error"] = output[-4000:]
    else:
        kept = counted(output)
    outcome = {0: "passed", None: "cut off", 5: "nothing selected"}.get(code, f"FAILED with {code}")
    if code is None and (kept.get("failed") or kept.get("errors")):
        outcome = "FAILED, and cut off"
    return outcome, kept


def counted(output: str) -> dict:
    """How many tests ended how, and the names of those that failed; also of a run that never came to its summary."""
    ended: dict[str, str] = {}
    for line in output.splitlines():
        if found := AFTER.match(line):
            word, name = found.groups()
        elif found := BEFORE.match(line):
            name, word = found.groups()
        else:
            continue
        ended[name] = word if ended.get(name) not in ("FAILED", "ERROR") else ended[name]
    names = {"FAILED": "failed", "ERROR": "errors", "PASSED": "passed", "SKIPPED": "skipped"}
    kept = {key: sum(word == found for found in ended.values()) for word, key in names.items() if ended}
    wrong = [name for name, word in ended.items() if word in ("FAILED", "ERROR")]
    reasons: dict[str, int] = {}
    for number, _, reason in SKIPPED.findall(output):
        reasons[reason[:120]] = reasons.get(reason[:120], 0) + int(number)
    more = {"names": wrong[:50], "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])[:30])}
    return kept | {name: value for name, value in more.items() if value}


def run(parts: list[str], args: argparse.Namespace, start, keep=lambda part, found: None) -> dict[str, str]:
    """Run the parts one after the other; none that fails ends the run.

    Args:
        parts: In their order.
        args: Of the command line.
        start: ``start(command, seconds, environment) -> (exit code, None if cut off; output)``; the environment is
            what differs from ours.
        keep: Told of each part as soon as it has ended.

    Returns:
        Part -> outcome.
    """
    begun, outcomes = time.monotonic(), {}
    for part in parts:
        left = args.budget - (time.monotonic() - begun)
        later = parts[parts.index(part) + 1 :]
        most, kept = AT_MOST.get(part, left), [KEPT_FOR[other] for other in later if other in KEPT_FOR]
        if part not in AT_MOST:
            left -= min(sum(kept), left * len(kept) / (len(kept) + 1))
        elif part == "tests" and all(other in AT_MOST for other in later):  # no benchmarks wait for their time
            most = max(most, left - sum(AT_MOST[other] for other in later))
        seconds = min(left, most)
        found, at = {}, time.monotonic()
        if part in sanitize.TOOLS and sanitize.tool() is None:
            outcomes[part] = f"skipped: {sanitize.NAME} is not installed"
        elif seconds < 10:
            outcomes[part] = "skipped: no time left"
        else:
            print(f"== {part}, at most {seconds:.0f} s", flush=True)
            code, output = whole(part, args, seconds, start)
            outcomes[part], found = said(part, code, output)
        keep(part, {"outcome": outcomes[part], "seconds": round(time.monotonic() - at, 1)} | found)
    return outcomes


def start(argv: list[str], seconds: float, environment: dict[str, str], log: pathlib.Path) -> tuple[int | None, str]:
    """Run a command with everything it starts in a session of its own, and end all of it when its time is up.

    It is first interrupted, as by Ctrl-C, a little before: pytest then prints its failures.
    """
    output: list[str] = []

    def read(pipe):
        with open(log, "a") as file:
            for line in pipe:
                output.append(line)
                file.write(line)
                file.flush()
                if not QUIET.search(line):
                    print(line, end="", flush=True)

    with open(log, "a") as file:
        file.write(f"== {' '.join(argv)}\n")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    process = subprocess.Popen(argv, cwd=ROOT, start_new_session=True, env=os.environ | environment, **pipes)
    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    code, grace = None, min(GRACE, seconds / 4)
    try:
        code = process.wait(seconds - grace)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reader.join(5)  # what was started and lives on may hold the pipe
    return code, "".join(output)


@contextlib.contextmanager
def ahead(out: pathlib.Path):
    """Meanwhile the kernels of the benchmarks are compiled on all cores, as what is most polite to everything else.

    One after the other, as rows meet them, would take more time than measuring. What each needs goes to a file.
    """
    major, minor = torch.cuda.get_device_capability()
    target = 10 * major + minor
    if target not in aot.SHARED_MEMORY:
        yield
        return
    argv = ["nice", "-n", "15", sys.executable, "-m", "tests.aot", str(target), "--dtypes", "bfloat16", "float32"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with open(out / COMPILED, "w") as file:
        process = subprocess.Popen(
            argv, cwd=ROOT, start_new_session=True, stdout=file, stderr=subprocess.STDOUT,
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        lines = (out / COMPILED).read_text().splitlines()
        print(f"ahead      {sum(line.startswith('{') for line in lines)} launches compiled, told in {COMPILED}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: %(default)s)")
    parser.add_argument("-k", help="select tests and benchmarks by name, as pytest does")
    parser.add_argument("--out", type=pathlib.Path, default=results.FOLDER, help="folder of the results files")
    parser.add_argument("--commit", help="commit to write, for a copy of the tree without its git folder")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU; `pytest benchmarks` runs every benchmark once without timing")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    log, writer = args.out / LOG, results.Writer(args.out, results.provenance(args.commit))
    with ahead(args.out):
        outcomes = run(
            [part for part in PARTS if part in parts], args, lambda *what: start(*what, log=log), writer.check
        )  # fmt: skip
    for part, outcome in outcomes.items():
        print(f"{part:10} {outcome}")
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
