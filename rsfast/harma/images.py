"""Where the images are: a folder, or a zip that every process opens for itself."""

import io
import os
import zipfile
from pathlib import Path

from PIL import Image


class BrokenImageError(ValueError):
    """An image that is missing or does not decode; ``name`` and ``reason`` say which and why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it survives pickling on its way out of a worker
        self.name, self.reason = name, reason

    def __str__(self):
        return f"{self.name}: {self.reason}"


class ImageStore:
    """Images by name from a folder or from inside a zip.

    Safe to hand to worker processes: a zip's handle is opened again wherever the process differs from the one that
    opened it, because a handle shared through a fork shares its position too.

    Args:
        root: Folder or zip. Where all entries of a zip lie in one top folder, names may leave it out.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        ValueError: ``root`` is a file, but no zip.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        self._handle, self._process = None, None
        if self.root.is_dir():
            self._entries = None
            return
        if not self.root.exists():
            raise FileNotFoundError(f"images: there is no folder or zip at {self.root}")
        if not zipfile.is_zipfile(self.root):
            raise ValueError(f"images must be a folder or a zip, {self.root} is neither")
        with zipfile.ZipFile(self.root) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
        tops = {name.split("/", 1)[0] for name in names}
        short = {name.split("/", 1)[1]: name for name in names if "/" in name} if len(tops) == 1 else {}
        self._entries = short | {name: name for name in names}

    def __getstate__(self):
        return self.__dict__ | {"_handle": None, "_process": None}

    def __contains__(self, name: str) -> bool:
        # os.path.isfile says no, where Path.is_file raises, to a name that is too long or holds a zero byte
        return os.path.isfile(self.root / name) if self._entries is None else _zip_name(name) in self._entries

    def names(self) -> list[str]:
        """Of all files, sorted; those of a zip as they stand in it, those of a folder with ``/`` between folders."""
        if self._entries is not None:
            return sorted(set(self._entries.values()))
        names = []
        for folder, _, files in os.walk(self.root, followlinks=True):
            inside = Path(folder).relative_to(self.root)
            names += [file if inside == Path() else f"{inside.as_posix()}/{file}" for file in files]
        return sorted(names)

    def read(self, name: str) -> bytes:
        """The bytes of a file that is there."""
        with self._stream(name) as file:
            return file.read()

    def size(self, name: str) -> tuple[int, int]:
        """Width and height of an image, of which no more than the head is decoded.

        Raises:
            BrokenImageError: It is missing, or no image.
        """
        if name not in self:
            raise BrokenImageError(name, f"not in {self.root}")
        try:
            with self._stream(name) as file, Image.open(file) as image:
                return image.size
        except Exception as error:  # as in open
            raise BrokenImageError(name, f"{type(error).__name__}: {error}") from error

    def open(self, name: str) -> Image.Image:
        """The decoded image in RGB.

        Raises:
            BrokenImageError: It is missing, does not decode, or holds more than 8 bits a channel.
        """
        if name not in self:
            raise BrokenImageError(name, f"not in {self.root}")
        try:
            if self._entries is None:
                with Image.open(self.root / name) as image:
                    return rgb(image)
            with Image.open(io.BytesIO(self.read(name))) as image:
                return rgb(image)
        except Exception as error:  # decoders raise nearly anything on damaged bytes, SyntaxError included
            raise BrokenImageError(name, f"{type(error).__name__}: {error}") from error

    def _stream(self, name: str):
        if self._entries is None:
            return open(self.root / name, "rb")
        return self._archive().open(self._entries[_zip_name(name)])

    def _archive(self) -> zipfile.ZipFile:
        if self._process != os.getpid():
            self._handle, self._process = zipfile.ZipFile(self.root), os.getpid()
        return self._handle


def _zip_name(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; refuses more than 8 bits a channel."""
    if image.mode.startswith(("I", "F")):  # converting these clips nearly everything to white
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel; convert the image to 8 bits first")
    return image.convert("RGB")


def decoded(image: Image.Image, name: str) -> Image.Image:
    """:func:`rgb` of an image that is no file's name; what goes wrong is a :class:`BrokenImageError` of ``name``."""
    try:
        return rgb(image)
    except (ValueError, OSError, SyntaxError) as error:  # a file that PIL opened and reads only now
        raise BrokenImageError(name, f"{type(error).__name__}: {error}") from error
