"""Where an adapter is: a folder, a file, a URL, or a place on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Any

from coremerge.carried import TEMPLATE, TOKENIZER, kind_of
from coremerge.errors import SourceError
from coremerge.formats.beside import KNOWN, LARGEST, below, usable, wanted
from coremerge.formats.config import CONFIG_NAME
from coremerge.formats.foreign import PICKLES, no_config, no_weights, refuse_other
from coremerge.formats.sharded import INDEX, Folder, Here, is_part, whole
from coremerge.formats.urls import is_url, label, split, unwrapped

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^:@\s]+))?(?::(?P<subfolder>[^:@\s]+))?(?:@(?P<late>[^:@\s]+))?"
)


@dataclass(frozen=True)
class Location:
    """The files of one adapter.

    Attributes:
        source: as the person gave it.
        name: a short label: the last part of the path or id.
        config: the ``adapter_config.json``.
        weights: the files of its tensors: one, or shards.
        index: tensor name → shard, where an index says it.
        revision: the commit on the hub, where it came from there.
        beside: further files that go with it: name → file.
        notes: what is said of files there that are not read.
        warnings: what of it is lost.
    """

    source: str
    name: str
    config: Path
    weights: tuple[Path, ...]
    index: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    beside: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it is read from."""
        return self.config, *self.weights


@dataclass(frozen=True)
class HubId:
    """``org/name@revision:subfolder``, taken apart."""

    repo: str
    revision: str | None = None
    subfolder: str | None = None


def locate(
    source: str | Path,
    *,
    allow_pickle: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Location:
    """Find an adapter's files; a local path that exists wins over a hub id. Those behind a URL are fetched.

    Raises:
        SourceError: nothing there, several adapters there, or only a pickle that was not asked for.
    """
    if isinstance(source, str) and is_url(source):
        return _at_url(source, allow_pickle)
    path = local_path(source)
    if path and path.is_dir():
        return in_folder(path, str(source), allow_pickle=allow_pickle)
    if path:
        return _beside(path, str(source), allow_pickle=allow_pickle)
    hub = None if isinstance(source, Path) else parse_hub_id(source, revision)
    if hub is None:
        raise SourceError(
            "no such file or folder",
            file=source,
            remedy="Give an adapter's folder, its adapter_model.safetensors, the URL of either, or a hub id:"
            " org/name[@revision][:folder]"
            + (" (a URL is given as text: a Path makes one slash of two)" if _was_url(source) else ""),
        )
    return _on_hub(hub, str(source), allow_pickle, cache_dir, token)


def local_path(source: str | Path) -> Path | None:
    """The existing file or folder that ``source`` names, if any; a URL names none, but for ``file:///...``."""
    if is_url(source):
        return None
    try:
        path = Path(unwrapped(source)).expanduser()
        return path if str(source) and (path.is_dir() or path.is_file()) else None
    except (OSError, RuntimeError, ValueError):
        return None  # a name no file system takes, or ~ of a user that does not exist


def in_full(source: str | Path) -> str:
    """``source`` as it can be said in another folder: a path that exists from the root on, anything else as it is."""
    path = local_path(source)
    return str(source) if path is None else str(path.absolute())


def parse_hub_id(text: str, revision: str | None = None) -> HubId | None:
    """``org/name``, ``org/name@revision``, ``org/name:subfolder`` or both; None for anything else.

    Example:
        >>> parse_hub_id("org/name@v1:math")
        HubId(repo='org/name', revision='v1', subfolder='math')
    """
    match = _HUB_ID.fullmatch(text)
    if not match or ".." in text or (match["revision"] and match["late"]):
        return None
    subfolder = (match["subfolder"] or "").strip("/") or None
    return HubId(match["repo"], match["revision"] or match["late"] or revision, subfolder)


def in_folder(folder: Path, source: str, *, allow_pickle: bool = False) -> Location:
    """The adapter in ``folder``, under PEFT's file names.

    Raises:
        SourceError: the folder does not hold exactly one adapter.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise no_config(folder)
    name = _standard_name(Here(folder), _names_in(folder))
    if name is None:
        raise no_weights(folder, WEIGHTS_NAME, allow_pickle=allow_pickle)
    return _located(folder, name, source, _label(folder), allow_pickle)


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError:  # a folder that may be entered and not listed
        return []


def _standard_name(folder: Folder, names: Iterable[str]) -> str | None:
    """What PEFT or transformers call an adapter's tensors: one file, or the index or the first one of several."""
    for name in (WEIGHTS_NAME, WEIGHTS_NAME + INDEX):
        if folder.has(name):
            return name
    shards = (name for name in names if name.startswith("adapter_model-") and is_part(name))
    if (shard := min(shards, key=lambda name: (not name.endswith(".safetensors"), name), default=None)) is not None:
        return shard
    return next((name for name in (PICKLE_NAME, PICKLE_NAME + INDEX) if folder.has(name)), None)


def _located(folder: Path, name: str, source: str, label: str, allow_pickle: bool) -> Location:
    """The adapter whose tensors are in ``name``, or in that and others."""
    names, index = whole(Here(folder), name) if is_part(name) else ([name], {})
    for one in names:
        _refuse_pickle(folder / one, allow_pickle)
    weights = tuple(folder / one for one in names)
    location = Location(source, label, folder / CONFIG_NAME, weights, index)
    kept, notes = wanted(_names_in(folder), names)
    return _with_others(location, {one: folder / one for one in kept}, [*notes, *below(folder)])


def _with_others(location: Location, others: Mapping[str, Path], notes: Iterable[str] = ()) -> Location:
    beside, said, warnings = usable(others)
    return replace(location, beside=beside, notes=(*notes, *said), warnings=tuple(warnings))


def _beside(path: Path, source: str, *, allow_pickle: bool) -> Location:
    folder = path.parent
    if path.name == CONFIG_NAME:
        return in_folder(folder, source, allow_pickle=allow_pickle)
    if not is_part(path.name):
        refuse_other(path)
    if not (folder / CONFIG_NAME).is_file():
        raise SourceError(
            f"no {CONFIG_NAME} beside this file, so its scale is not known",
            file=path,
            key=CONFIG_NAME,
            remedy="Put PEFT's adapter_config.json into the same folder",
        )
    return _located(folder, path.name, source, _label_of(_label(folder), path.name), allow_pickle)


def _label_of(folder: str, name: str) -> str:
    """The folder's, of an adapter whose tensors have their usual name."""
    return folder if name in (WEIGHTS_NAME, PICKLE_NAME) or is_part(name) else Path(name).stem


def _refuse_pickle(path: str | Path, allowed: bool) -> None:
    if not allowed and Path(path).suffix != ".safetensors":
        raise SourceError(
            "this is a pickle, which can run code when it is read",
            file=path,
            remedy="If you trust it, pass allow_pickle (torch's weights_only reader), or save it as safetensors",
        )


def _label(folder: Path) -> str:
    return folder.name or folder.resolve().name or "adapter"


def _was_url(source: str | Path) -> bool:
    return isinstance(source, Path) and is_url(str(source).replace(":/", "://", 1))


def _at_url(url: str, allow_pickle: bool) -> Location:
    folder, last = split(url.rstrip("/"))
    if Path(last).suffix not in (".safetensors", *PICKLES) and not last.endswith(INDEX) and last != CONFIG_NAME:
        folder, last = url, CONFIG_NAME
    from coremerge.formats.remote_files import RemoteFolder

    remote = RemoteFolder(folder)
    if not remote.has(CONFIG_NAME):
        raise SourceError(
            f"no {CONFIG_NAME} there", file=url, key=CONFIG_NAME,
            remedy="Check the spelling, and give the folder that PEFT's save_pretrained wrote",
        )  # fmt: skip
    listed = remote.names()
    name = last if last != CONFIG_NAME and remote.has(last) else None
    name = name or (_standard_name(remote, listed or ()) if last == CONFIG_NAME else None)
    if name is None:
        named = WEIGHTS_NAME if last == CONFIG_NAME else last
        raise SourceError(f"no {named} there", file=url, key=named, remedy="Save the adapter there again")
    names, index = whole(remote, name) if is_part(name) else ([name], {})
    for one in names:
        if Path(one).suffix != ".safetensors":
            _refuse_pickle(url, allow_pickle)
    kept, notes = wanted(listed or (), names)
    if listed is None:
        notes = ["its store lists no files: a tokenizer or a head beside it is not looked for"]
    config, *fetched = remote.fetch(CONFIG_NAME, *names, *kept)
    weights, others = fetched[: len(names)], dict(zip(kept, fetched[len(names) :], strict=True))
    location = Location(url, _label_of(label(folder), name), config, tuple(weights), index)
    return _with_others(location, others, notes)


def _on_hub(
    hub: HubId, source: str, allow_pickle: bool, cache_dir: str | Path | None, token: str | bool | None
) -> Location:
    prefix = f"{hub.subfolder}/" if hub.subfolder else ""
    pickles = [PICKLE_NAME, PICKLE_NAME + INDEX, "adapter_model-*-of-*.bin"] if allow_pickle else []
    names = [CONFIG_NAME, WEIGHTS_NAME, WEIGHTS_NAME + INDEX, "adapter_model-*-of-*.safetensors", *pickles]
    names += [*TOKENIZER, *TEMPLATE, *KNOWN]
    patterns = [prefix + name for name in names] + [f"{prefix}*/{CONFIG_NAME}"]
    snapshot = download(hub, source, patterns, cache_dir, token)
    folder = snapshot / hub.subfolder if hub.subfolder else snapshot
    if not folder.is_dir():
        raise SourceError("the repository has no such folder", file=source, key=hub.subfolder)
    try:
        found = in_folder(folder, source, allow_pickle=allow_pickle)
    except SourceError as error:
        what, remedy = error.what, error.remedy
        listed = _listed(replace(hub, revision=snapshot.name), prefix, token) if WEIGHTS_NAME in what else {}
        if others := [name for name in listed if kind_of(name) == "weights"]:
            what = f"{what}, but {', '.join(others[:8])}"
            if PICKLE_NAME not in others:
                remedy = "If one of these is the adapter, download the repository and name that file"
        if error.what.startswith(f"no {CONFIG_NAME} here"):
            remedy = f"Name one of them: {hub.repo}:{prefix}<folder>"
        raise SourceError(what, file=source, key=error.key, remedy=remedy) from None
    name = (hub.subfolder or hub.repo).rsplit("/", 1)[-1]
    more, warnings = _more_on_hub(replace(hub, revision=snapshot.name), found, prefix, token)
    if more:
        download(replace(hub, revision=snapshot.name), source, [prefix + one for one in more], cache_dir, token)
        found = in_folder(folder, source, allow_pickle=allow_pickle)
    return replace(found, name=name, revision=snapshot.name, warnings=(*found.warnings, *warnings))


def _more_on_hub(hub: HubId, found: Location, prefix: str, token: str | bool | None) -> tuple[list[str], list[str]]:
    """What goes with the adapter there and was not asked for by its name, and what is said of what is too large."""
    sizes = _listed(hub, prefix, token)
    kept, _ = wanted(sizes, [file.name for file in found.weights])
    there = {file.name for file in found.config.parent.iterdir()}
    missing = {name: sizes[name] for name in kept if name not in there}
    large = {name: size for name, size in missing.items() if size is None or size > LARGEST}
    said = [f"{name} on the hub is not carried over: it is larger than a head or a table" for name in large]
    return [name for name in missing if name not in large], said


def _listed(hub: HubId, prefix: str, token: str | bool | None) -> dict[str, int | None]:
    """File name → bytes of what lies beside the adapter; empty where the hub is out of reach: nothing depends on it."""
    import huggingface_hub

    try:
        told = huggingface_hub.HfApi().model_info(
            hub.repo, revision=hub.revision, files_metadata=True, token=token, timeout=10.0
        )
        listed = {file.rfilename: file.size for file in told.siblings or ()}
    except Exception:  # of whatever layer of the client
        return {}
    inside = {name.removeprefix(prefix): size for name, size in listed.items() if name.startswith(prefix)}
    return {name: size for name, size in inside.items() if not set(name) & set("/*?[")}


def download(
    hub: HubId, source: str | Path, patterns: list[str], cache_dir: str | Path | None, token: str | bool | None
) -> Path:
    """The snapshot folder with the files that match ``patterns``, from the cache where it can be.

    Raises:
        SourceError: not found, not allowed, or offline and not cached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    _lose_patience()
    try:
        folder = huggingface_hub.snapshot_download(
            hub.repo, revision=hub.revision, allow_patterns=patterns, cache_dir=cache_dir, token=token
        )
    except errors.GatedRepoError:
        raise SourceError("this repository is gated", file=source, remedy="Ask for access, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            "no such file or folder here, and no such repository on the hub (or it is private)",
            file=source,
            remedy="Check the spelling; for a private repository set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(
            "the repository has no such revision", file=source, key="revision", value=hub.revision or "main",
            remedy="Name one that its page on the hub lists",
        ) from None  # fmt: skip
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _unexpected(source, error.__cause__) from None
        raise SourceError(
            "no such file or folder here, and the hub cannot be reached (or is switched off) and has not cached it",
            file=source,
            remedy="Check the spelling, go online (unset HF_HUB_OFFLINE), or give a local folder",
        ) from None
    except errors.HFValidationError as error:
        raise SourceError(f"not a hub id: {error}", file=source) from None
    except Exception as error:
        # the client raises whatever its layers met: errors of its own, of httpx or requests, of json
        raise _unexpected(source, error) from None
    return Path(folder)


def _lose_patience() -> None:
    """Bound every wait of the hub's client for an answer: it has some for ever, and others of six minutes."""
    from huggingface_hub import constants, get_session

    longest = max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)

    def bounded(request: Any) -> None:
        waits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {kind: min(wait or longest, longest) for kind, wait in waits.items()}

    session: Any = get_session()
    hooks = getattr(session, "event_hooks", {})  # of httpx; the older client, of requests, has none
    if hooks and not any(hook.__qualname__ == bounded.__qualname__ for hook in hooks["request"]):
        session.event_hooks = {**hooks, "request": [*hooks["request"], bounded]}


def _unexpected(source: str | Path, error: BaseException) -> SourceError:
    first = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG, EACCES, EPERM, EROFS):
        remedy = "Free some space, or set HF_HOME to another folder"
        return SourceError(f"cannot be kept in the hub's cache: {first}", file=source, remedy=remedy)
    if isinstance(error, ValueError) and not hasattr(error, "response"):
        remedy = "Check HF_ENDPOINT, and whether a proxy or a login page answers in its place"
        return SourceError(f"something other than the hub answers: {first}", file=source, remedy=remedy)
    status = getattr(getattr(error, "response", None), "status_code", None)
    remedy = "Set HF_TOKEN to a token that may read it" if status in (401, 403) else "Try again"
    return SourceError(f"the hub did not answer as expected: {first}", file=source, remedy=remedy)
