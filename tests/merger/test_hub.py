"""Uploading, against a server on this machine that stands in for the Hugging Face Hub."""
from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from merger import MergeError, hub

from tests.merger.merging import PROGRAM, Run, Sample, listing, run_program, unchecked, untouched

TOKEN = "hf_ThisTokenIsASecretOfTheTests"


class Hub(ThreadingHTTPServer):
    """Answers what huggingface_hub asks when it uploads a folder, and keeps what it is sent."""
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.broken: str | None = None  # a part of the paths that are answered with 500
        self.ignored: str | None = None  # a file that it takes and leaves out, as one that a .gitignore names

    @property
    def repository(self) -> dict[str, bytes]:
        """The files of user/merged."""
        return self.repositories.get("user/merged", {})

    @property
    def sent(self) -> list[str]:
        """The blobs that were sent, each as often as it was."""
        return [request for request in self.requests if request.startswith("PUT /blobs/")]


class Handler(BaseHTTPRequestHandler):
    """One request to the stand-in."""
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlparse(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        if self.server.broken and self.server.broken in path:
            return self.send(500, {"error": "the stand-in is told to fail"})
        if not path.startswith("/blobs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid credentials in Authorization header"})
        code, content = self.reply(path, body)
        self.send(code, content)

    def reply(self, path: str, body: bytes) -> tuple[int, Any]:
        server = self.server
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "user", "auth": {"type": "access_token"}}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            server.created.append(wanted)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in server.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{server.url}/{name}"}
            server.repositories[name] = {}
            if is_private(wanted):
                server.private.add(name)
            return 200, {"url": f"{server.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/blobs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/blobs/")
            server.blobs[path.removeprefix("/blobs/")] = body
            return 200, {}
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(/.*)?", path)
        if found is None or found[1] not in server.repositories:
            return 404, {"error": "Repository not found"}
        return self.reply_of(found[1], found[2] or "", body)

    def reply_of(self, name: str, request: str, body: bytes) -> tuple[int, Any]:
        """Answer what is asked of the repository `name`."""
        server, repository = self.server, self.server.repositories[name]
        if request == "/preupload/main":
            return 200, {"files": [{
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": file["path"] == server.ignored
            } for file in json.loads(body)["files"]]}  # yapf: disable
        if request == "/info/lfs/objects/batch":
            return 200, {"transfer": "basic", "objects": [self.lfs(**entry) for entry in json.loads(body)["objects"]]}
        if request == "/commit/main":
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    repository[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    repository[value["path"]] = server.blobs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del repository[value["path"]]
            return 200, {"commitUrl": f"{server.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        if request == "/tree/main":
            return 200, [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                         for path, data in repository.items()]  # yapf: disable
        if request in ("", "/revision/main"):
            return 200, {"id": name, "modelId": name, "private": name in server.private, "tags": [], "siblings": [],
                         "downloads": 0, "sha": "0" * 40}  # yapf: disable
        return 404, {"error": f"the stand-in knows no {request}"}

    def lfs(self, oid: str, size: int, **_: Any) -> dict[str, Any]:
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in self.server.blobs:
            entry["actions"] = {"upload": {"href": f"{self.server.url}/blobs/{oid}", "header": {}}}
        return entry

    def send(self, code: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def is_private(created: dict[str, Any]) -> bool:
    """Return True if a private repository is asked for, as huggingface_hub 2 or an earlier one writes it."""
    return created.get("visibility") == "private" or created.get("private") is True


@pytest.fixture
def server() -> Iterator[Hub]:
    standing_in = Hub()
    thread = threading.Thread(target=standing_in.serve_forever, daemon=True)
    thread.start()
    yield standing_in
    standing_in.shutdown()
    thread.join()


def upload(server: Hub,
           home: Path,
           *args: str | Path,
           token: str = TOKEN,
           program: Any = None,
           to: str = "user/merged") -> Run:
    """Run the merger with an upload to `server`; the configuration check is skipped, to be quick."""
    return run_program(*args, "--hf-upload-path", to, program=program or unchecked(), env={
        "HF_ENDPOINT": server.url, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"})  # yapf: disable


@pytest.mark.parametrize("private", [False, True], ids=["public", "private"])
def test_the_merged_folder_is_uploaded(private: bool, server: Hub, samples: dict[str, Sample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = upload(server, tmp_path / "home", "--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", out,
                 "--max-shard-size", "200KB", "--json", *(["--private"] if private else []))
    assert run.record()["uploaded"] == f"{server.url}/user/merged"
    (created, ) = server.created
    assert (created["organization"], created["name"]) == ("user", "merged")
    assert is_private(created) is private
    local = {name: data for name, data in listing(out).items() if not name.startswith(".")}
    assert {**server.repository, "merge.json": local["merge.json"]} == local
    assert len([name for name in local if name.endswith(".safetensors")]) > 1
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "merge.json", "README.md"} <= set(local)


def test_the_model_card_tells_the_facts_of_the_merge(server: Hub, samples: dict[str, Sample], tmp_path: Path) -> None:
    run = upload(server, tmp_path / "home", "--local-dir", samples["HSDP, 2 x 2 ranks"].actor, "--save-dir",
                 tmp_path / "out", "--json")
    card = server.repository["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for fact in (f"{run.record()['parameters']:,}", "bfloat16", "ddp 2, fsdp 2"):
        assert fact in card


@pytest.mark.parametrize(("base_model", "named"), [
    ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B"),
    ("/data/models/Qwen2.5-3B", None),
    ("~/models", None),
    ("models/here", None),
    ("./a", None),
    ("a/b/c", None),
    ("a/b\nlicense: mit", None),
    ("a/b: c", None),
    ("a/b.", None),
    ("gpt2", None),
    ("", None),
    (None, None),
], ids=repr)  # yapf: disable
def test_the_card_names_a_base_model_of_the_hub_and_no_folder(base_model: str | None, named: str | None, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/here").mkdir(parents=True)
    record = {"base_model": base_model, "meshes": [], "tensors": 1, "parameters": 1, "dtype": "keep", "world_size": 1,
              "nan": 0, "inf": 0, "sources": [], "model_check": ""}  # yapf: disable
    head = yaml.safe_load(hub.model_card(record).split("---")[1])
    assert head == {"library_name": "transformers", **({"base_model": named} if named else {})}
    assert hub.public_record(record)["base_model"] == named


def test_what_transformers_said_of_the_config_s_folder_is_published_without_it() -> None:
    said = "not made: ValueError: The repository /home/me/x/huggingface contains custom code, see https://hf.co/docs"
    published = hub.public_record({"sources": [], "model_check": said})["model_check"]
    assert published == said.replace("/home/me/x/", "")


def test_the_uploaded_record_names_no_folder_of_this_machine(server: Hub, tmp_path: Path) -> None:
    import torch
    actor = tmp_path / "private/actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface/config.json").write_text(json.dumps({"_name_or_path": str(tmp_path / "private/base")}))
    torch.save({"a": torch.ones(3)}, actor / "model_world_size_1_rank_0.pt")
    out = tmp_path / "out"
    assert upload(server, tmp_path / "home", "--local-dir", actor, "--save-dir", out).code == 0
    kept = json.loads((out / "merge.json").read_text())
    assert (kept["base_model"], kept["sources"][0]["folder"]) == (str(tmp_path / "private/base"), str(actor))
    (kept["sources"][0]["folder"], kept["base_model"]) = ("actor", None)
    assert json.loads(server.repository["merge.json"]) == kept
    assert not any(str(tmp_path).encode() in server.repository[name] for name in ("merge.json", "README.md"))


def test_the_token_is_nowhere_to_be_seen(server: Hub, samples: dict[str, Sample], tmp_path: Path) -> None:
    spy = unchecked("print(sys.argv, file=sys.stderr)")
    run = upload(server, tmp_path / "home", "--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir",
                 tmp_path / "out", program=spy)  # yapf: disable
    assert run.code == 0 and "--hf-upload-path" in run.err
    assert TOKEN not in run.out + run.err
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    assert not any(TOKEN.encode() in data for data in server.repository.values())


def test_a_wrong_token_is_refused_before_anything_is_merged(server: Hub, samples: dict[str, Sample],
                                                            tmp_path: Path) -> None:
    with untouched(tmp_path):
        run = upload(server,
                     tmp_path / "home",
                     "--local-dir",
                     samples["FSDP1, 4 ranks"].actor,
                     "--save-dir",
                     tmp_path / "out",
                     token="hf_wrong")
    assert server.url in run.refusal and "HF_TOKEN" in run.refusal and "hf_wrong" not in run.refusal
    assert server.created == []


def test_no_token_is_refused(server: Hub, samples: dict[str, Sample], tmp_path: Path) -> None:
    with untouched(tmp_path):
        run = upload(server,
                     tmp_path / "home",
                     "--local-dir",
                     samples["FSDP1, 4 ranks"].actor,
                     "--save-dir",
                     tmp_path / "out",
                     token="")
    assert "needs a token" in run.refusal and server.requests == []


@pytest.mark.parametrize("broken", ["/commit/main", "/preupload/main", "/repos/create"])
def test_an_upload_that_broke_off_goes_on_without_merging_again(broken: str, server: Hub, samples: dict[str, Sample],
                                                                tmp_path: Path) -> None:
    out, quick = tmp_path / "out", unchecked("import time; time.sleep = lambda seconds: None")  # retries wait
    args = ["--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", out, "--json"]
    server.broken = broken
    failed = upload(server, tmp_path / "home", *args, program=quick)
    refusal = failed.err.splitlines()[-1]  # the lines before are huggingface_hub's, of what it tried again
    assert failed.code == 2 and failed.out == "" and "Traceback" not in failed.err
    assert "the upload to user/merged failed" in refusal and str(out) in refusal and "again" in refusal
    merged = listing(out)
    assert "model.safetensors" in merged and server.repository == {}
    server.broken = None
    run = upload(server, tmp_path / "home", *args, program=quick)
    assert run.code == 0 and json.loads(run.out)["uploaded"]
    assert "holds this merge already" in run.err
    assert {name: data for name, data in listing(out).items() if name in merged} == merged
    assert server.repository["model.safetensors"] == merged["model.safetensors"]


def test_what_the_hub_has_of_an_upload_that_broke_off_is_not_sent_again(server: Hub, samples: dict[str, Sample],
                                                                        tmp_path: Path) -> None:
    args = ["--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out", "--max-shard-size", "200KB"]
    server.broken = "/commit/main"
    quick = unchecked("import time; time.sleep = lambda seconds: None")
    assert upload(server, tmp_path / "home", *args, program=quick).code == 2
    sent = server.sent
    assert len(sent) > 1 and server.repository == {}
    server.broken = None
    assert upload(server, tmp_path / "home", *args).code == 0
    assert server.sent == sent
    assert len([name for name in server.repository if name.endswith(".safetensors")]) == len(sent)


def test_weights_of_an_earlier_upload_go_and_other_files_stay(server: Hub, samples: dict[str, Sample],
                                                              tmp_path: Path) -> None:
    args = ["--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir"]
    kept = {"notes.txt": b"mine", "sub/model.safetensors": b"mine", ".gitattributes": b"mine"}
    gone = {"pytorch_model.bin": b"old", "adapter_model.safetensors": b"old", "adapter_config.json": b"{}"}
    server.repositories["user/merged"] = {**kept, **gone}
    for out, size in (tmp_path / "one", "5GB"), (tmp_path / "many", "200KB"), (tmp_path / "fewer", "400KB"):
        assert upload(server, tmp_path / "home", *args, out, "--max-shard-size", size).code == 0
        local = {name: data for name, data in listing(out).items() if not name.startswith(".")}
        assert server.repository == {**local, **kept, "merge.json": server.repository["merge.json"]}


def test_an_uploaded_folder_goes_to_another_repository_or_one_made_again(server: Hub, samples: dict[str, Sample],
                                                                         tmp_path: Path) -> None:
    args = ["--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out", "--json"]
    run = upload(server, tmp_path / "home", *args)
    assert run.record()["uploaded"] == f"{server.url}/user/merged"
    whole = server.repositories.pop("user/merged")
    for to in ("user/other", "user/merged"):
        run = upload(server, tmp_path / "home", *args, to=to)
        assert run.record()["uploaded"] == f"{server.url}/{to}"
        assert server.repositories[to] == whole


def test_an_upload_that_lacks_a_file_is_none(server: Hub, samples: dict[str, Sample], tmp_path: Path) -> None:
    server.ignored = "tokenizer.json"
    run = upload(server, tmp_path / "home", "--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir",
                 tmp_path / "out")  # yapf: disable
    assert "user/merged lacks tokenizer.json" in run.refusal and ".gitignore" in run.refusal
    assert "merge.json" not in server.repository


def test_a_public_repository_is_refused_as_a_private_one(server: Hub, samples: dict[str, Sample],
                                                         tmp_path: Path) -> None:
    server.repositories["user/merged"] = {}
    args = ["--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out", "--private"]
    with untouched(tmp_path):
        run = upload(server, tmp_path / "home", *args)
    assert "--private" in run.refusal and "user/merged is public" in run.refusal and "settings" in run.refusal
    assert server.created == [] and server.repository == {}
    server.private.add("user/merged")
    assert upload(server, tmp_path / "home", *args).code == 0
    assert "model.safetensors" in server.repository


def test_a_hub_that_does_not_tell_what_is_private_is_one_line(server: Hub, samples: dict[str, Sample],
                                                              tmp_path: Path) -> None:
    server.broken = "/api/models/user/merged"
    run = upload(server, tmp_path / "home", "--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir",
                 tmp_path / "out", "--private")  # yapf: disable
    assert "user/merged" in run.refusal and "500" in run.refusal and server.created == []


def test_another_merge_s_output_is_not_uploaded_as_this_one(server: Hub, samples: dict[str, Sample],
                                                            tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_program("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", out, program=unchecked()).code == 0
    for args in (["--dtype", "float16"], ["--local-dir", samples["FSDP2, 4 ranks"].actor]):
        source = [] if "--local-dir" in args else ["--local-dir", samples["FSDP1, 4 ranks"].actor]
        run = upload(server, tmp_path / "home", *source, *args, "--save-dir", out)
        assert "--force" in run.refusal and server.repository == {}


def test_a_merge_is_uploaded_later_with_a_card_and_compared_if_wished(server: Hub, spoil: Callable[..., Sample],
                                                                      tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    sample, out, home = spoil("FSDP1, 4 ranks"), tmp_path / "out", tmp_path / "home"
    monkeypatch.chdir(sample.actor.parent)
    assert run_program("--local-dir", sample.actor.name, "--save-dir", out, program=unchecked()).code == 0
    # by another name, it is the same checkpoint
    run = upload(server, home, "--local-dir", sample.actor, "--save-dir", out, "--verify", "--json")
    assert run.record()["verified"] and "holds this merge already" in run.err
    assert server.repository["README.md"] == (out / "README.md").read_bytes()
    assert f"{run.record()['parameters']:,}" in server.repository["README.md"].decode()
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    server.repository.clear()
    run = upload(server, home, "--local-dir", sample.actor, "--save-dir", out, "--verify")
    assert run.code == 2 and "differs from rank" in run.err and server.repository == {}


@pytest.mark.parametrize("lost", ["a file", "a byte", "the index"])
def test_a_merge_that_lost_something_is_not_uploaded(lost: str, server: Hub, samples: dict[str, Sample],
                                                     tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", out, "--max-shard-size", "100KB"]
    assert run_program(*args, program=unchecked()).code == 0
    first = min(out.glob("model-*.safetensors"))
    if lost == "a byte":
        first.write_bytes(first.read_bytes()[:-1])
    else:
        (first if lost == "a file" else out / "model.safetensors.index.json").unlink()
    assert "--force" in upload(server, tmp_path / "home", *args).refusal and server.repository == {}


def test_ctrl_c_during_the_upload_says_that_the_merge_is_complete(server: Hub, samples: dict[str, Sample],
                                                                  tmp_path: Path) -> None:
    stop = unchecked("from merger import hub\ndef upload(*_): raise KeyboardInterrupt\nhub.upload = upload")
    run = upload(server, tmp_path / "home", "--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir",
                 tmp_path / "out", program=stop)  # yapf: disable
    assert run.code == 130 and (tmp_path / "out/model.safetensors").is_file()
    assert run.err == (f"merge: interrupted; {tmp_path / 'out'} is complete; run the same command again to go on with "
                       "the upload\n")


@pytest.mark.parametrize("name", ["merged", "user/", "/merged", "a/b/c", "a/b c", "\u00e4/b", "a/b--c"])
def test_a_name_that_is_no_repository_s_is_refused(name: str) -> None:
    with pytest.raises(MergeError, match="user/name"):
        hub.log_in(name)


def test_a_hub_that_cannot_be_reached_is_one_line(samples: dict[str, Sample], tmp_path: Path) -> None:
    run = run_program("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out", "--hf-upload-path",
                      "user/merged", program=(PROGRAM, ), env={
                          "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
                          "NO_PROXY": "127.0.0.1"})  # yapf: disable
    assert "http://127.0.0.1:9" in run.refusal and TOKEN not in run.refusal
    assert not (tmp_path / "out").exists()
