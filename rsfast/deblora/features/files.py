"""What lies in the folder of a :class:`rsfast.deblora.FeatureStore`: its header, the log of its appends, its lock."""

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from rsfast._files import replace

FORMAT, VERSION = "rsfast-features", 1
HEADER, LOG, LOCK = "store.json", "appends.log", "lock"
FEATURES, LABELS, TEXT = "features.bin", "labels.bin", "rows.jsonl"
DATA = (FEATURES, LABELS, TEXT)
_writing: dict[Path, int] = {}  # folder: process; a POSIX lock keeps out other processes only


@dataclass(frozen=True)
class Append:
    """One append as the log has it: which rows, how many bytes of each file, and their checksums."""

    first: int
    rows: int
    bytes: dict[str, int]
    crc32: dict[str, int]
    left_out: list = field(default_factory=list)  # [index, name, reason]

    def line(self) -> bytes:
        return _sealed(vars(self)) + b"\n"


def _sealed(content: dict) -> bytes:
    """JSON in one line behind its own checksum."""
    text = json.dumps(content, sort_keys=True).encode()
    return b"%08x %s" % (zlib.crc32(text), text)


def _unsealed(line: bytes) -> dict | None:
    """What was sealed, or None where it is not what was written."""
    crc, _, text = line.partition(b" ")
    return json.loads(text) if crc == b"%08x" % zlib.crc32(text) else None


def write_header(folder: Path, content: dict) -> None:
    content = {"format": FORMAT, "version": VERSION, **content}
    crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    text = json.dumps({**content, "crc32": crc}, indent=2) + "\n"
    replace(folder / HEADER, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_header(folder: Path) -> dict:
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"there is no feature store in {folder}: it has no {HEADER}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no header of a feature store")
    if content.get("version") != VERSION:
        raise ValueError(f"{path} is of version {content.get('version')!r}; this rsfast reads version {VERSION}")
    crc = content.pop("crc32", None)
    if crc != zlib.crc32(json.dumps(content, sort_keys=True).encode()):
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    return content


def read_log(folder: Path, row_bytes: dict[str, int]) -> tuple[list[Append], dict[str, int]]:
    """The completed appends, and how many bytes of each file, the log included, they are.

    A last line without an end is an append that was cut off; anything else that does not fit is damage.
    """
    path = folder / LOG
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    appends, rows, sizes = [], 0, dict.fromkeys((*DATA, LOG), 0)
    for number, line in enumerate(lines):
        content = _unsealed(line)
        if content is None or content["first"] != rows:
            raise ValueError(f"{path} is damaged: line {number + 1} does not fit its checksum or the line before")
        appends.append(Append(**content))
        rows += appends[-1].rows
        for name in DATA:
            sizes[name] += appends[-1].bytes[name]
        sizes[LOG] += len(line) + 1
    for name in DATA:
        found, wanted = os.path.getsize(folder / name) if (folder / name).is_file() else 0, sizes[name]
        if found < wanted or (name in row_bytes and wanted != rows * row_bytes[name]):
            raise ValueError(f"{folder / name} is damaged: {rows} rows are {wanted} bytes, it has {found}")
    return appends, sizes


def put(path: Path, at: int, content) -> None:
    """Write behind the first ``at`` bytes of a file, drop what else was there, and see it onto the disk."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with open(handle, "r+b") as file:
        file.truncate(at)
        file.seek(at)
        file.write(content)
        file.flush()
        os.fsync(handle)


class WriterLock:
    """The right to write into a folder, held until it is released or the process ends.

    Not inherited by a fork, so that worker processes that outlive a killed writer do not keep the folder locked.
    """

    def __init__(self, folder: Path):
        import fcntl

        self._folder, self._process = folder.resolve(), os.getpid()
        refusal = f"{folder} is being written by another process or FeatureStore; one writer at a time"
        if _writing.get(self._folder) == self._process:
            raise ValueError(refusal)
        self._file = open(folder / LOCK, "ab")  # noqa: SIM115  held open with the lock
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(refusal) from error
        _writing[self._folder] = self._process

    def held(self) -> bool:
        """Whether this process holds it, and not the one it was forked from."""
        return self._process == os.getpid()

    def release(self) -> None:
        if self.held():
            _writing.pop(self._folder, None)
        self._file.close()


def crc32_of(path: Path, start: int, size: int, block: int = 2**22) -> int:
    """Checksum of a part of a file, read block by block."""
    crc = 0
    with open(path, "rb") as file:
        file.seek(start)
        while size:
            read = file.read(min(block, size))
            if not read:
                raise ValueError(f"{path} is damaged: it ends {size} bytes too early")
            crc, size = zlib.crc32(read, crc), size - len(read)
    return crc
