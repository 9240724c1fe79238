"""A stand-in for the Hugging Face hub on loopback: what its client asks to list, commit to and read repositories."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

LARGE = 500  # bytes from which on a file is kept beside git, by its sha256
TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What the stand-in holds.

    Attributes:
        repos: files by key, by repository: `datasets/me/cache`, `models/me/net`.
        large: contents by sha256.
        asked: method, path and token of every request.
        url: of the API; large files are redirected to another name of this host.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""

    @property
    def elsewhere(self) -> str:
        return self.url.replace("127.0.0.1", "localhost")

    def sha(self, repo: str) -> str:
        """The commit of a repository: it changes with any of its files."""
        files = self.repos[repo]
        return hashlib.sha1(b"".join(key.encode() + files[key] for key in sorted(files))).hexdigest()

    def info(self, repo: str) -> dict:
        siblings = []
        for key, data in self.repos[repo].items():
            entry = {
                "rfilename": key,
                "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            if len(data) >= LARGE:
                entry |= {
                    "blobId": "of a pointer",
                    "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 1},
                }
            siblings.append(entry)
        return {"id": repo.partition("/")[2], "sha": self.sha(repo), "private": True, "siblings": siblings, "tags": []}

    def commit(self, repo: str, body: bytes) -> dict:
        for line in body.decode().splitlines():
            said = json.loads(line)
            value = said["value"]
            if said["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif said["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.large[value["oid"]]
            elif said["key"] == "deletedFile":
                del self.repos[repo][value["path"]]
        return {"commitUrl": f"{self.url}/{repo}/commit/{self.sha(repo)}", "commitOid": self.sha(repo)}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self._noted()
            if found := re.fullmatch(r"/api/((?:datasets|models)/[^/]+/[^/]+)(?:/revision/[^/]+)?", path):
                self._json(hub.info(found[1]) if found[1] in hub.repos else None)
            elif found := re.fullmatch(r"/api/((?:datasets|models)/[^/]+/[^/]+)/tree/[^/]+", path):
                files = hub.info(found[1])["siblings"]
                self._json(
                    [{"type": "file", "path": f["rfilename"], "size": f["size"], "oid": f["blobId"]} for f in files]
                )
            elif found := re.fullmatch(r"/large/(\w+)", path):
                self._file(hub.large[found[1]], sha256(hub.large[found[1]]))
            elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
                self._resolve(f"{found[1] or 'models/'}{found[2]}", found[3], found[4])
            else:
                self._json(None)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path, body = self._noted(), self._body()
            if path == "/api/repos/create":
                said = json.loads(body)
                hub.repos.setdefault(f"{said['type']}s/{said['organization']}/{said['name']}", {})
                self._json({"url": f"{hub.url}/{said['type']}s/{said['organization']}/{said['name']}"})
            elif path == "/api/validate-yaml":
                self._json({"warnings": [], "errors": []})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                modes = {file["path"]: "lfs" if file["size"] >= LARGE else "regular" for file in files}
                answers = [{"path": key, "shouldIgnore": False, "uploadMode": mode} for key, mode in modes.items()]
                self._json({"files": answers})
            elif path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                self._json({"objects": [
                    {"oid": o["oid"], "size": o["size"],
                     "actions": {"upload": {"href": f"{hub.elsewhere}/large/{o['oid']}"}}} for o in objects
                ]})  # fmt: skip
            elif found := re.fullmatch(r"/api/((?:datasets|models)/[^/]+/[^/]+)/commit/[^/]+", path):
                self._json(hub.commit(found[1], body))
            else:
                self._json(None)

        def do_PUT(self) -> None:
            path = self._noted()
            hub.large[path.rpartition("/")[2]] = self._body()
            self._json({})

        def _noted(self) -> str:
            path = self.path.partition("?")[0].replace("%2F", "/")
            hub.asked.append((self.command, path, (self.headers.get("Authorization") or "").removeprefix("Bearer ")))
            return path

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _json(self, value: object) -> None:
            status, value = (404, {"error": "Repository not found"}) if value is None else (200, value)
            code = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
            self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **code})

        def _resolve(self, repo: str, sha: str, key: str) -> None:
            if repo not in hub.repos or hub.sha(repo) != sha or key not in hub.repos[repo]:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            elif len(data := hub.repos[repo][key]) >= LARGE:
                hub.large[sha256(data)] = data
                about = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"', "X-Repo-Commit": sha}
                self._send(302, b"", {"Location": f"{hub.elsewhere}/large/{sha256(data)}", **about})
            else:
                self._file(data, hashlib.sha1(data).hexdigest(), {"X-Repo-Commit": sha})

        def _file(self, data: bytes, tag: str, more: dict[str, str] | None = None) -> None:
            headers = {"ETag": f'"{tag}"', "Accept-Ranges": "bytes", **(more or {})}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
                start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                self._send(206, data[start:stop], headers)
            else:
                self._send(200, data, headers)

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
