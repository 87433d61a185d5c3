"""A Hub on loopback: the endpoints that huggingface_hub pushes to and loads from, with nothing but the standard library."""

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from card_rules import problems_of


LFS_ENDINGS = (".safetensors", ".bin", ".pt")


@dataclass
class Repo:
    """A repository: what every commit holds, and which commit every branch, tag or pull request is at."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str = "main", message: str = "", deleted: tuple = ()) -> str:
        """Adds files on top of a branch, and returns the new commit."""
        before = self.commits.get(self.refs.get(ref, ""), {})
        kept = {path: content for path, content in before.items() if path not in deleted}
        sha = secrets.token_hex(20)
        self.commits[sha], self.refs[ref] = {**kept, **files}, sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a hash stands for."""
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


class Refusal(Exception):
    """An answer that is an error, told by the header that huggingface_hub goes by."""

    def __init__(self, status: int, code: str):
        self.status, self.code = status, code


class Hub:
    """
    A Hub that runs while its `with` block does.

    Args:
        tokens (`dict[str, str]`): user names by token. Users may write to the namespace of their own name.
        members (`set[str]`): users that may write to the namespace `org`, too.
    """

    def __init__(self, tokens: dict[str, str], members: set[str]):
        self.tokens, self.members = tokens, members
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def upload(self, repo_id: str, folder: str | Path, ref: str = "main", **kwargs) -> str:
        """Commits a folder to a repository, which is made where needed, and returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(**kwargs))
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return repo.commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, ref)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        repo = self.repos[repo_id]
        return repo.commits[repo.find(revision)]

    def open_repo(self, repo_id: str, user: str | None, content: bool = False) -> Repo:
        """The repository, if the user may see it; or its content, which those of gated ones are asked for."""
        repo = self.repos.get(repo_id)
        allowed = repo is not None and self.may_write(repo_id, user)
        if repo is None or (repo.private and not allowed):
            raise Refusal(404 if user else 401, "RepoNotFound")
        if content and repo.gated and not allowed:
            raise Refusal(403 if user else 401, "GatedRepo")
        return repo

    def may_write(self, repo_id: str, user: str | None) -> bool:
        """Whether the user is the owner of a repository, or among them."""
        namespace = repo_id.removeprefix("datasets/").split("/")[0]
        return user is not None and (namespace == user or (namespace == "org" and user in self.members))


# datasets are kept under `datasets/`, as in their addresses
NAME = r"(?P<repo>(?:datasets/)?[\w.-]+(?:/[\w.-]+)?)"
ROUTES = [
    ("POST", r"/api/repos/create", "create_repo"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/models/{NAME}/branch/(?P<name>[^/]+)", "create_branch"),
    ("POST", rf"/api/models/{NAME}/tag/(?P<revision>[^/]+)", "create_tag"),
    ("GET", rf"/api/models/{NAME}/refs", "refs"),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"/api/models/{NAME}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("HEAD|GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = self.hub.tokens.get(token)
        self.hub.requests.append((self.command, url.path, self.user))
        for methods, pattern, name in ROUTES:
            path = url.path.replace("/api/datasets/", "/api/models/datasets/", 1)
            if self.command in methods.split("|") and (match := re.fullmatch(pattern, path)):
                groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                try:
                    return getattr(self, name)(**groups)
                except Refusal as refusal:
                    return self.answer(b"{}", refusal.status, {"X-Error-Code": refusal.code})
        self.answer({"error": f"no such endpoint: {self.command} {url.path}"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def answer(self, content: bytes | dict | list, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def find(self, repo: str, revision: str, content: bool = False) -> tuple[Repo, str]:
        found = self.hub.open_repo(repo, self.user, content)
        sha = found.find(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound")
        return found, sha

    def writable(self, repo: str) -> Repo:
        found = self.hub.open_repo(repo, self.user)
        if not self.hub.may_write(repo, self.user):
            raise Refusal(403, "Forbidden")
        return found

    # ---- reading ----

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "Unauthorized")
        self.answer({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def info(self, repo: str, revision: str | None) -> None:
        found, sha = self.find(repo, revision or "main")
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        self.answer({"_id": repo, "id": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str, path: str | None) -> None:
        found, sha = self.find(repo, revision)
        inside = {p: c for p, c in found.commits[sha].items() if path is None or p.startswith(f"{path}/")}
        self.answer([{"type": "file", "path": p, "size": len(c), "oid": _etag(p, c)} for p, c in inside.items()])

    def refs(self, repo: str) -> None:
        refs = self.hub.open_repo(repo, self.user).refs
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs.items()]
        self.answer({"branches": listed, "converts": [], "tags": []})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found, sha = self.find(repo, revision, content=True)
        content = found.commits[sha].get(path)
        if content is None:
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        self.answer(content, headers={"ETag": f'"{_etag(path, content)}"', "X-Repo-Commit": sha})

    # ---- writing ----

    def create_repo(self) -> None:
        fields = json.loads(self.body)
        repo_id = f"{fields.get('organization') or self.user}/{fields['name']}"
        if not self.hub.may_write(repo_id, self.user):
            raise Refusal(403 if self.user else 401, "Forbidden")
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.repos[repo_id] = Repo(private=fields.get("visibility") == "private")
            self.hub.repos[repo_id].commit({".gitattributes": b""}, message="initial commit")
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        self.answer(url, 409 if exists else 200)

    def delete_repo(self) -> None:
        fields = json.loads(self.body)
        repo_id = f"{fields.get('organization') or self.user}/{fields['name']}"
        self.writable(repo_id)
        del self.hub.repos[repo_id]
        self.answer({})

    def validate_yaml(self) -> None:
        fields = json.loads(self.body)
        errors, warnings = problems_of(fields["content"]) if fields["repoType"] == "model" else ([], [])
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        self.answer(answer, 400 if errors else 200)

    def create_branch(self, repo: str, name: str) -> None:
        found = self.writable(repo)
        if name in found.refs:
            return self.answer({"error": "exists"}, 409)
        found.refs[name] = self.find(repo, json.loads(self.body or b"{}").get("startingPoint") or "main")[1]
        self.answer({})

    def create_tag(self, repo: str, revision: str) -> None:
        self.writable(repo).refs[json.loads(self.body)["tag"]] = self.find(repo, revision)[1]
        self.answer({})

    def preupload(self, repo: str, revision: str) -> None:
        self.writable(repo)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_ENDINGS) else "regular" for path in paths}
        self.answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]})

    def lfs_batch(self, repo: str) -> None:
        self.writable(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}
            known = wanted["oid"] in self.hub.large_files
            objects.append({**wanted, **({} if known else {"actions": {"upload": upload}})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "BadHash")
        self.hub.large_files[oid] = self.body
        self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        found, _ = self.writable(repo), self.find(repo, revision)
        files, deleted, message = {}, [], ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            else:
                deleted.append(value["path"])
        ref, request = revision, None
        if self.query.get("create_pr") == ["1"]:
            request = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
            ref = f"refs/pr/{request}"
            found.refs[ref] = found.find(revision)
        sha = found.commit(files, ref, message, tuple(deleted))
        url = f"{self.hub.endpoint}/{repo}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        self.answer({**answer, **({"pullRequestUrl": f"{url}/discussions/{request}"} if request else {})})


def _etag(path: str, content: bytes) -> str:
    """What tells contents apart: their SHA-256 for large files, git's own hash for others."""
    if path.endswith(LFS_ENDINGS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
