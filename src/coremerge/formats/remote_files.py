"""Files behind URLs (``s3://``, ``gs://``, ``https://``, ...), fetched by fsspec into a cache of this user.

A file is kept under a hash of its URL and of what its store tells of it (size, etag, time of change, ...): one that
has changed is fetched anew, one that has not is not. Where a store tells nothing of it, it is fetched each time.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from coremerge.errors import SourceError, UnsupportedError
from coremerge.formats.remote_cache import alone, cache, hash_of, partial_file, safe
from coremerge.formats.remote_errors import failed_status, told
from coremerge.formats.urls import HTTP, label, scheme_of
from coremerge.hashing import file_sha256

PATIENCE = 30.0
"""Seconds without a byte, over HTTP: its client would cut off whatever takes five minutes in all."""

SMALL = 1 << 20
"""Bytes of a file that no bar is drawn for."""

MOST_FILES = 2000
"""Of a base model: a folder with more is no model's."""

_TELLING = frozenset(
    ("etag", "md5", "md5hash", "contentmd5", "digest", "checksum", "generation", "versionid", "blobid", "lastmodified",
     "mtime", "modificationtime", "updated", "created")
)  # fmt: skip
_PLAIN = re.compile(r"[^\\/:\x00-\x1f\x7f]+")

About = Mapping[str, Any]
"""What a store says of a file."""


class RemoteFolder:
    """A folder behind a URL.

    Args:
        url: of the folder.

    Raises:
        SourceError: here and from all methods: it is not read, cannot be reached, or may not be read.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._scheme = scheme_of(url)
        self._seen: dict[str, About | None] = {}
        with told(self.url, self._scheme, cache()):
            address = self._scheme + self.url[len(self._scheme) :]
            fsspec: Any = importlib.import_module("fsspec.core")
            self._files, self._inside = fsspec.url_to_fs(address, **_settings(self._scheme))

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        if name not in self._seen:
            self._seen[name] = self._look(name)
        return self._seen[name] is not None

    def names(self) -> list[str] | None:
        """The files in it; None where its store has no list of them, or shows none."""
        if self._scheme in HTTP:
            return None
        try:
            with told(self.url, self._scheme, cache()):
                found: list[About] = self._files.ls(self._inside, detail=True)
        except SourceError:  # many may read what they may not list
            return None
        return sorted(str(about["name"]).rpartition("/")[2] for about in found if about.get("type") == "file")

    def fetch(self, *names: str) -> list[Path]:
        """Those files, each in a folder of its own in the cache, all as they were at one moment."""
        seen = {name: self._seen[name] if self.has(name) else None for name in names}
        found = {name: about for name, about in seen.items() if about}
        return self._fetch(found, None, lambda: {name: self._look(name) for name in found})

    def fetch_all(self, patterns: Sequence[str], without: Collection[str]) -> Path:
        """A folder of all files here and below that match a pattern; hidden ones, and folders ``without``, are left.

        Raises:
            UnsupportedError: a web server, which has no list of its files.
            SourceError: names that lead elsewhere; too many; a store that does not tell when they change.
        """
        if self._scheme in HTTP:
            raise UnsupportedError(
                "a web server has no list of the files of a model", file=self.url,
                remedy="Download it, or give it from a store: s3://, gs://, az://, hf:// or the like",
            )  # fmt: skip

        def listed() -> dict[str, About]:
            return {n: a for n, a in self._listed() if any(fnmatch(n, p) for p in patterns) and _is_of_it(n, without)}

        found = listed()
        self._check(found)
        folder = self._folder("", {name: _mark(about) for name, about in found.items()})
        self._fetch(found, folder, listed)
        return folder

    def _check(self, found: Mapping[str, About]) -> None:
        if not found or len(found) > MOST_FILES:
            what = f"{len(found)} files, more than a model has" if found else "no files of a model are there"
            raise SourceError(what, file=self.url, remedy="Give the folder of the base model itself")
        for name, about in found.items():
            if not all(map(_PLAIN.fullmatch, name.split("/"))):
                raise SourceError("not the name of a file", file=self.url, value=name, remedy="Do not trust this model")
            if _mark(about) is None:
                what = "its store does not tell when it changes"
                raise SourceError(what, file=f"{self.url}/{name}", remedy="Download the model")

    def _fetch(
        self, found: Mapping[str, About], folder: Path | None, again: Callable[[], Mapping[str, About | None]]
    ) -> list[Path]:
        places, fetched = [], False
        for name, about in found.items():
            with told(f"{self.url}/{name}", self._scheme, cache()):
                place, new = self._kept(name, about, folder)
            places.append(place)
            fetched |= new
        if fetched:
            self._check_still(found, again())
        return places

    def _check_still(self, before: Mapping[str, About | None], now: Mapping[str, About | None]) -> None:
        for name in {**before, **now}:
            if _mark(before.get(name)) != _mark(now.get(name)):
                remedy = "Wait until nothing writes to it, and run the command again"
                raise SourceError("changed while it was fetched", file=f"{self.url}/{name}", remedy=remedy)

    def _kept(self, name: str, about: About, folder: Path | None) -> tuple[Path, bool]:
        """Where a file is in the cache, and whether it was fetched just now."""
        mark, local = _mark(about), name if folder else safe(name)
        place = (folder or self._folder(name, mark)) / local
        if mark and _is_whole(place, about):
            return place, False
        with alone(place), partial_file() as partial:
            if mark and _is_whole(place, about):  # another process was there first
                return place, False
            self._download(name, about, partial)
            if mark is None:  # the same content is the same file
                place = self._folder(name, file_sha256(partial)) / local
            if not _is_whole(place, about):
                place.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(place)
        return place, True

    def _download(self, name: str, about: About, partial: Path) -> None:
        fsspec: Any = importlib.import_module("fsspec.callbacks")
        bars: Any = importlib.import_module("huggingface_hub.utils")
        size = about.get("size")

        def watch(_: object, done: int, **__: object) -> None:
            if size is not None and done > size:
                raise self._wrong(name, f"more than the {size} bytes that its store tells of")
            bar.update(done - bar.n)

        small = size is not None and size < SMALL
        with bars.tqdm(total=size, unit="B", unit_scale=True, desc=safe(name), disable=small) as bar:
            self._files.get_file(self._path(name), str(partial), callback=fsspec.Callback(hooks={"watch": watch}))
        if size not in (None, partial.stat().st_size):
            raise self._wrong(name, f"cut short: {partial.stat().st_size} of {size} bytes came")

    def _wrong(self, name: str, what: str) -> SourceError:
        return SourceError(what, file=f"{self.url}/{name}", remedy="Run the command again")

    def _folder(self, name: str, mark: object) -> Path:
        """In the cache: a part for people, on which nothing depends, and a hash."""
        return cache() / f"{safe(label(self.url))}-{hash_of(self.url, name, mark)}"

    def _path(self, name: str) -> str:
        return f"{self._inside.rstrip('/')}/{name}"

    def _look(self, name: str) -> About | None:
        url = f"{self.url}/{name}"
        with told(url, self._scheme, cache()):
            self._files.invalidate_cache()
            try:
                found: About = self._files.info(self._path(name))
            except FileNotFoundError as error:
                if self._scheme in HTTP and error.__cause__ and failed_status(error.__cause__) not in (404, 410):
                    raise error.__cause__ from None  # there every failure is told as this one
                return None
        if found.get("mimetype") == "text/html":
            raise SourceError(
                "a web page answers, not the file", file=url,
                remedy="Give the address of the files themselves ('raw', 'resolve'), not of a page that shows them",
            )  # fmt: skip
        return found if found.get("type") == "file" else None

    def _listed(self) -> Iterator[tuple[str, About]]:
        """All files here and below."""
        with told(self.url, self._scheme, cache()):
            self._files.invalidate_cache()
            found: Mapping[str, About] = self._files.find(self._inside, detail=True)
        for path, about in sorted(found.items()):
            yield path.removeprefix(self._path("")), about


def _settings(scheme: str) -> dict[str, Any]:
    """Of HTTP: patience, and what the environment says of proxies and logins; fsspec's own settings go before."""
    if scheme not in HTTP:
        return {}
    aiohttp: Any = importlib.import_module("aiohttp")
    said: Any = importlib.import_module("fsspec.config").conf.get(scheme, {})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True, **said.get("client_kwargs", {})}}


def _mark(about: About | None) -> str | None:
    """What tells the file's content from other content; None where nothing does."""
    if about is None:
        return None
    told = {key: str(about[key]) for key in about if re.sub("[-_]", "", key.lower()) in _TELLING and about[key]}
    return json.dumps([about.get("size"), told], sort_keys=True) if told else None


def _is_of_it(name: str, without: Collection[str]) -> bool:
    parts = name.split("/")
    return parts[0] not in without and not any(part.startswith(".") for part in parts)


def _is_whole(place: Path, about: About) -> bool:
    return place.is_file() and about.get("size") in (None, place.stat().st_size)
