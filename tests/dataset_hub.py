"""A hub of data sets: a server that speaks what the library asks of it, over folders here."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
import huggingface_hub
import pytest


class Hub:
    """commits: of each name, what its revisions stand for. asked: paths of the requests. listed: files that it says to
    have, and has not.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.commits, self.asked, self.listed = root, {}, [], []

    def publish(self, name: str, files: dict, revision: str = "main") -> str:
        """Rows, or text, of each file, as a new commit of that revision."""
        commit = hashlib.sha1(f"{name} {revision} {len(self.asked)} {files}".encode()).hexdigest()
        for file, content in files.items():
            path = self.root / name / commit / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.endswith(".parquet"):
                datasets.Dataset.from_list(content).to_parquet(path)
            else:
                lines = "".join(json.dumps(row) + "\n" for row in content) if isinstance(content, list) else content
                path.write_text(lines)
        self.commits.setdefault(name, {})[revision] = commit
        return commit

    def folder(self, name: str, revision: str) -> Path | None:
        commit = self.commits.get(name, {}).get(revision, revision)
        found = self.root / name / commit
        return found if found.is_dir() else None


@contextmanager
def of_datasets(root: Path) -> Iterator[Hub]:
    """It is the library's hub, with caches below `root`, while the context is open."""
    hub = Hub(root / "published")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(self.path)
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "datasets"] and len(parts) > 5:  # .../revision/REVISION or .../tree/COMMIT
                name, revision = "/".join(parts[2:4]), "/".join(parts[5:])
            elif parts[0] == "datasets" and len(parts) > 5:  # .../resolve/COMMIT/FILE
                name, revision = "/".join(parts[1:3]), parts[4]
            else:
                return self.send(404, b"")
            folder = hub.folder(name, revision)
            if folder is None:
                return self.send(404, b"{}", "RevisionNotFound" if name in hub.commits else "RepoNotFound")
            files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()] + hub.listed
            if parts[4] == "revision":
                told = {"id": name, "sha": folder.name, "siblings": [{"rfilename": file} for file in files]}
                return self.send(200, json.dumps(told).encode())
            if parts[4] == "tree":
                listing = [{"type": "file", "path": file, "oid": "0" * 40, "size": 1} for file in files]
                return self.send(200, json.dumps(listing).encode())
            file = folder / "/".join(parts[5:])
            return self.send(200, file.read_bytes(), commit=folder.name) if file.is_file() else self.send(404, b"")

        do_HEAD = do_GET

        def send(self, status: int, content: bytes, code: str = "", commit: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "downloaded"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "read")
        yield hub
        server.shutdown()
