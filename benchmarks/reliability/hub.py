"""A hub on this machine, for the real client: it serves one repository, and errs in one way at a time."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO, COMMIT = "org/faulty", "c" * 40
Fault = Callable[["Answer", str, bytes], bool]
"""Answers a request for a file's bytes (else empty) in its own way; False: it is left to be answered well."""


class Answer(BaseHTTPRequestHandler):
    """To one request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].partition(f"/resolve/{COMMIT}/")[2]
        self.hub.asked.append(f"{self.command} {self.path}")
        body = self.hub.files.get(name, b"")
        if not (self.hub.fault and self.hub.fault(self, name, body)):
            self._well(name, body)

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def _well(self, name: str, body: bytes) -> None:
        files = self.hub.files
        if name in files:
            self.file(body)
        elif name or REPO not in self.path:
            code = "EntryNotFound" if name else "RepoNotFound"
            self.status(404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
        elif "/tree/" in self.path:
            listed = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            self.json(listed)
        else:
            self.json(
                {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": n, "size": len(b)} for n, b in files.items()]}
            )

    def json(self, data: object) -> None:
        self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def status(self, code: int, headers: dict[str, str] | None = None) -> bool:
        self.send(code, b"", headers or {})
        return True

    def file(self, body: bytes, length: int | None = None) -> bool:
        """The rest of ``body`` that was asked for; with another length than announced, it is cut off."""
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        self.send(206 if begin else 200, body[begin:], headers, None if length is None else max(0, length - begin))
        return True

    def send(self, code: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:length])
        self.close_connection = length is not None

    def reset(self) -> bool:
        """No answer: the connection breaks off."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.wfile = self.rfile = open("/dev/null", "r+b")  # noqa: SIM115, PTH123
        return True

    def stall(self, seconds: float = 60) -> bool:
        """No answer for a long time, and none afterwards."""
        self.hub.closing.wait(seconds)
        return self.reset()

    def log_message(self, *_: object) -> None:
        pass


class Hub:
    """Serves ``files`` (name → bytes) as :data:`REPO` while it is open.

    Attributes:
        fault: how it errs; None: not at all.
        asked: what was asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
        self.fault: Fault | None = None
        self.asked: list[str] = []
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (Answer,), {"hub": self}))
        self._server.daemon_threads = True

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which the client asks here, without much patience."""
        host, port = self._server.server_address[:2]
        patience = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_XET": "1"}
        return {"HF_ENDPOINT": f"http://{host!s}:{port}", "NO_PROXY": "*", "HF_HUB_OFFLINE": "0", **patience}

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


def always(code: int, **headers: str) -> Fault:
    """This status, whatever is asked."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer, name, body: answer.status(code, named)


def on_bytes(act: Callable[[Answer, bytes], bool]) -> Fault:
    """Only where the weights themselves are asked for."""
    return lambda answer, name, body: name.endswith(".safetensors") and answer.command == "GET" and act(answer, body)


def _elsewhere(answer: Answer, name: str, body: bytes) -> bool:
    return answer.status(302, {"Location": answer.path})


def _portal(answer: Answer, name: str, body: bytes) -> bool:
    answer.send(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
    return True


FAULTS: dict[str, tuple[Fault, str]] = {
    "401": (always(401), "HF_TOKEN"),
    "401, a gated repository": (always(401, X_Error_Code="GatedRepo"), "gated"),
    "403": (always(403), "403"),
    "404": (always(404, X_Error_Code="RepoNotFound"), "no such repository"),
    "404, of the revision": (always(404, X_Error_Code="RevisionNotFound"), "revision"),
    "429": (always(429), "429"),
    "500": (always(500), "500"),
    "500 for the weights": (on_bytes(lambda answer, _: answer.status(500)), "500"),
    "a body cut short": (on_bytes(lambda answer, body: answer.file(body, len(body) // 2)), ""),
    "a shorter body than announced": (on_bytes(lambda answer, body: answer.file(body[: len(body) // 2])), ""),
    "another body of that size": (on_bytes(lambda answer, body: answer.file(b"\x01" * len(body))), ""),
    "reset": (lambda answer, name, body: answer.reset(), ""),
    "reset in the weights": (on_bytes(lambda answer, _: answer.reset()), ""),
    "no answer": (lambda answer, name, body: answer.stall(), ""),
    "no answer to HEAD": (lambda answer, name, body: answer.command == "HEAD" and answer.stall(), ""),
    "no answer for the list of files": (lambda answer, name, body: "/tree/" in answer.path and answer.stall(), ""),
    "no answer for the weights": (on_bytes(lambda answer, _: answer.stall()), ""),
    "a redirect to itself": (_elsewhere, ""),
    "a login page": (_portal, ""),
}
"""How the hub errs, and what the message must say."""
