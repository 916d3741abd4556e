"""Downloads against a stand-in for the hub on loopback: whole, resumed, refused, unreachable."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import mistral_common
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from config.compose import compose_config
from config.errors import UsageError
from dataset.instruct import Source, open_run_data
from dataset.text.conversation import Template
from dataset.text.hub import download, split_files
from dataset.text.loader import TextDataset
from dataset.text.tokenizer import Tokenizer

CONTENT = bytes(range(256)) * 4096
BROKEN = [0] * 6  # as often as a transfer is tried again
SHA256 = hashlib.sha256(CONTENT).hexdigest()
REPOSITORY = Path(__file__).resolve().parents[1]


class StandIn(ThreadingHTTPServer):
    """Serves CONTENT at the hub's resolve addresses, and what `files` names; `files` also as a data set repository.

    `cut_after` breaks transfers off; `status` refuses them.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.files: dict[str, bytes] = {}
        self.etag = '"v1"'
        self.cut_after: list[int] = []
        self.status = 200
        self.redirect_to: str | None = None
        self.stated_sha256: str | None = None
        self.requests: list[tuple[str, str | None, str | None]] = []

    def handle_error(self, *_: object) -> None:
        pass  # a client that refuses what is offered hangs up early

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


COMMIT = "c" * 40


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        stand_in = self.server
        wanted = self.headers.get("Range")
        if self.command == "GET" and "/resolve/" in self.path:
            stand_in.requests.append((self.path, wanted, self.headers.get("Authorization")))
        if stand_in.redirect_to is not None:
            self.send_response(302)
            self.send_header("Location", stand_in.redirect_to + self.path)
            self._state(stand_in.content)
            self.end_headers()
        elif stand_in.status != 200:
            self.send_error(stand_in.status)
        elif self.path.startswith("/api/"):
            self._api(self.path.partition("?")[0].split("/"))
        elif stand_in.files and (name := self.path.split("/", 6)[-1]) not in stand_in.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._file(stand_in.files[name] if stand_in.files else stand_in.content, wanted)

    def _state(self, content: bytes) -> None:
        self.send_header("ETag", self.server.etag)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(content)))
        if self.server.stated_sha256 is not None:
            self.send_header("X-Linked-ETag", f'"{self.server.stated_sha256}"')

    def _file(self, content: bytes, wanted: str | None) -> None:
        begin = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if begin else 200)
        self._state(content)
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            body = content[begin:]
            self.wfile.write(body[: self.server.cut_after.pop(0)] if self.server.cut_after else body)

    def _api(self, parts: list[str]) -> None:
        """What `datasets` asks of a repository: /api/datasets/OWNER/NAME/revision/R and .../tree/R/FOLDER."""
        files = self.server.files
        answer: Any = {"id": "own/set", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        if len(parts) > 5 and parts[5] == "tree":
            folder = "/".join([*parts[7:], ""]).lstrip("/")
            below = [name for name in files if name.startswith(folder)]
            folders = {folder + name[len(folder) :].split("/")[0] for name in below if "/" in name[len(folder) :]}
            answer = [{"type": "directory", "path": name, "oid": "d", "size": 0} for name in sorted(folders)]
            answer += [
                {"type": "file", "path": name, "oid": "f", "size": len(files[name])}
                for name in below
                if "/" not in name[len(folder) :]
            ]
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def serve() -> Iterator[StandIn]:
    stand_in = StandIn()
    thread = threading.Thread(target=stand_in.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()
    thread.join()


storage = pytest.fixture(serve, name="storage")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for server in serve():
        # What HF_ENDPOINT sets when the library is imported; the last test here sets the variable itself.
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what has arrived is written a chunk at a time
        monkeypatch.setattr("time.sleep", lambda _: None)
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_file_arrives_whole_and_only_once(stand_in: StandIn, tmp_path: Path) -> None:
    target = tmp_path / "new" / "data.jsonl"
    for _ in range(2):
        found = download("me/repo", "a/b.jsonl", target, "v2", "dataset", SHA256)
        assert found == target and target.read_bytes() == CONTENT
    assert [request[0] for request in stand_in.requests] == ["/datasets/me/repo/resolve/v2/a/b.jsonl"]
    assert names(target.parent) == ["data.jsonl"]


def test_a_broken_transfer_goes_on_where_it_stopped(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.cut_after = [300_000, 1_000]
    download("me/repo", "f", tmp_path / "f", expected_sha256=SHA256)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [request[1] for request in stand_in.requests] == [None, "bytes=300000-", "bytes=301000-"]


def test_another_start_resumes_and_a_changed_file_starts_over(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.cut_after = [300_000, *BROKEN]
    with pytest.raises(UsageError, match="is kept"):
        download("me/repo", "f", tmp_path / "f")
    assert not (tmp_path / "f").exists()
    stand_in.requests.clear()
    download("me/repo", "f", tmp_path / "f")
    assert stand_in.requests[0][1] == "bytes=300000-" and (tmp_path / "f").read_bytes() == CONTENT
    stand_in.cut_after = [300_000, *BROKEN]
    with pytest.raises(UsageError):
        download("me/repo", "f", tmp_path / "g")
    stand_in.etag, stand_in.content = '"v2"', CONTENT[::-1]
    download("me/repo", "f", tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == CONTENT[::-1]
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["f", "g"]


def test_two_at_once_fetch_it_once(stand_in: StandIn, tmp_path: Path) -> None:
    threads = [threading.Thread(target=download, args=("me/repo", "f", tmp_path / "f")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stand_in.requests) == 1 and (tmp_path / "f").read_bytes() == CONTENT
    assert names(tmp_path) == ["f"]


def test_a_wrong_checksum_is_refused_and_deleted(stand_in: StandIn, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"expected sha256 {'0' * 64}, found {SHA256}"):
        download("me/repo", "f", tmp_path / "f", expected_sha256="0" * 64)
    assert names(tmp_path) == []


@pytest.mark.parametrize("behind_a_redirect", [False, True])
def test_the_hash_that_the_hub_states_is_checked(
    stand_in: StandIn, storage: StandIn, tmp_path: Path, behind_a_redirect: bool
) -> None:
    stand_in.redirect_to = storage.endpoint if behind_a_redirect else None
    stand_in.stated_sha256 = "0" * 64
    with pytest.raises(UsageError, match=f"expected sha256 {'0' * 64}, found {SHA256}"):
        download("me/repo", "f", tmp_path / "f")
    assert names(tmp_path) == []
    stand_in.stated_sha256 = SHA256
    assert download("me/repo", "f", tmp_path / "f").read_bytes() == CONTENT
    stand_in.stated_sha256 = "no hash"
    assert download("me/repo", "f", tmp_path / "g", expected_sha256=SHA256).read_bytes() == CONTENT


def open_openorca(folder: Path) -> TextDataset:
    config = compose_config("cfg_pretrain_instruct", ["dataset=openorca", f"dataset.data_dir={folder}", "dataset.test_ratio=0"])
    tokenizer = Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")
    return Source(config.dataset).open_splits(tokenizer, Template())[0]


def test_openorca_is_fetched_at_its_revision_broken_off_and_resumed(stand_in: StandIn, tmp_path: Path) -> None:
    rows = [{"id": f"t0.{n}", "system_prompt": "", "question": f"Q{n}?", "response": f"A{n}."} for n in range(50)]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    stand_in.content = sink.getvalue().to_pybytes()
    stand_in.stated_sha256 = hashlib.sha256(stand_in.content).hexdigest()
    stand_in.cut_after = [1000, *BROKEN]
    with pytest.raises(UsageError, match="is kept"):
        open_openorca(tmp_path)
    assert len(open_openorca(tmp_path)) == 100
    revision = compose_config("cfg_pretrain_instruct", ["dataset=openorca"]).dataset.revision
    address = f"/datasets/Open-Orca/OpenOrca/resolve/{revision}"
    assert stand_in.requests[0][:2] == (f"{address}/1M-GPT4-Augmented.parquet", None)
    assert stand_in.requests[-2][:2] == (f"{address}/1M-GPT4-Augmented.parquet", "bytes=1000-")
    assert stand_in.requests[-1][:2] == (f"{address}/3_5M-GPT3_5-Augmented.parquet", None)
    stand_in.requests.clear()
    assert len(open_openorca(tmp_path)) == 100 and stand_in.requests == []


@pytest.mark.parametrize(("status", "advice"), [(401, "HF_TOKEN"), (404, "check repository")])
def test_openorca_that_is_refused_is_told(stand_in: StandIn, tmp_path: Path, status: int, advice: str) -> None:
    stand_in.status = status
    with pytest.raises(UsageError, match=rf"1M-GPT4.*{advice}.*put the file at"):
        open_openorca(tmp_path)


def test_openorca_with_another_checksum_is_refused(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.stated_sha256 = "0" * 64
    with pytest.raises(UsageError, match=rf"1M-GPT4.*expected sha256 {'0' * 64}, found {SHA256}"):
        open_openorca(tmp_path)
    assert names(tmp_path) == []


def test_a_curriculum_fetches_each_source_from_its_own_repository(stand_in: StandIn, tmp_path: Path) -> None:
    """Both presets' sources, one after the other: the first is there, the second is refused."""
    stand_in.content = b"".join(b'{"prompt": "Q%d?", "answer": "A"}\n' % n for n in range(40))
    folders = [f"sources.{name}.data_dir={tmp_path / name}" for name in ("slimorca", "openorca")]
    config = compose_config("cfg_pretrain_instruct", ["experiment=slimorca_then_openorca", *folders])
    tokenizer = Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")
    with pytest.raises(UsageError, match=r"1M-GPT4-Augmented\.parquet: expected a complete parquet file"):
        open_run_data(config, tokenizer, Template())
    slimorca, openorca = config.sources["slimorca"], config.sources["openorca"]
    assert stand_in.requests[0][0].startswith(f"/datasets/Open-Orca/SlimOrca/resolve/{slimorca.revision}/oo-labeled")
    assert stand_in.requests[1][0] == f"/datasets/Open-Orca/OpenOrca/resolve/{openorca.revision}/1M-GPT4-Augmented.parquet"
    assert (tmp_path / "slimorca/SlimOrca.jsonl").read_bytes() == stand_in.content


def test_openorca_offline_is_told(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"1M-GPT4.*HF_HUB_OFFLINE"):
        open_openorca(tmp_path)
    assert stand_in.requests == []


@pytest.mark.parametrize(("status", "advice"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "check repository"), (503, "later")])
def test_a_refusal_says_what_to_do(stand_in: StandIn, tmp_path: Path, status: int, advice: str) -> None:
    stand_in.status = status
    with pytest.raises(UsageError, match=f"{advice}.*HTTP {status}"):
        download("me/repo", "f", tmp_path / "f")
    assert names(tmp_path) == []


def test_the_token_goes_to_the_hub_and_not_to_the_storage_behind_it(
    stand_in: StandIn, storage: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    stand_in.redirect_to = storage.endpoint
    download("me/repo", "f", tmp_path / "f", expected_sha256=SHA256)
    assert stand_in.requests[0][2] == "Bearer hf_secret"
    assert storage.requests[0][2] is None


def test_a_name_that_is_no_repository_is_told(stand_in: StandIn, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="check repository"):
        download("a/b/c", "f", tmp_path / "f")


def test_a_place_that_can_not_be_written_is_told(stand_in: StandIn, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written"):
        download("me/repo", "f", tmp_path / "file" / "f")


OPEN_HUB = """
import json, sys
from config.compose import compose_config
from config.errors import UsageError
from dataset.instruct import open_run_data
from dataset.text.conversation import Template
from dataset.text.tokenizer import Tokenizer
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1000
for overrides in json.loads(sys.argv[1]):
    config = compose_config("cfg_pretrain_instruct", ["dataset=hub", *overrides])
    try:
        data = open_run_data(config, Tokenizer(sys.argv[2]), Template())
        print(json.dumps([len(data.train), len(data.test), data.train.row(0)]))
    except UsageError as error:
        print(json.dumps(str(error)))
"""


def open_hub(stand_in: StandIn, *runs: list[str], **environment: str) -> list[Any]:
    """Rows of both splits and the first row, or the error, of each run with these settings, in a process of its own."""
    model = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    inherited = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    result = subprocess.run(
        [sys.executable, "-c", OPEN_HUB, json.dumps(runs), str(model)],
        env={**inherited, "HF_ENDPOINT": stand_in.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "5", **environment},
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_data_set_of_the_hub_by_name(stand_in: StandIn, tmp_path: Path) -> None:
    """Its splits, read as they stand, broken in the middle and resumed; offline what was fetched; what isn't there is told."""
    rows = [{"prompt": f"Q{n}?", "response": "2020-01-01", "tags": None if n % 2 else [{"n": n}]} for n in range(60)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    stand_in.files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "data/train.jsonl": lines.encode(),
        "data/test.jsonl": b'{"prompt": "Why?", "response": "007"}\n',
    }
    common = ["dataset.repo=own/set", f"dataset.cache_dir={tmp_path}"]
    hashed, own, no_split, no_config = (
        common,
        [*common, "dataset.validation_split=test"],
        [*common, "dataset.split=dev"],
        [*common, "dataset.config=small"],
    )
    stand_in.cut_after = [10**6, 1000]  # the page first
    found = open_hub(stand_in, hashed, own, no_split, no_config)
    assert found[0][0] + found[0][1] == 60 and found[0][2]["response"] == "2020-01-01"
    assert found[1][:2] == [60, 1]
    assert "no split 'dev'" in found[2] and "test, train" in found[2]
    assert "small" in found[3] and "default" in found[3]
    address = f"/datasets/own/set/resolve/{COMMIT}/data/train.jsonl"
    assert [request[1] for request in stand_in.requests if request[0] == address] == [None, "bytes=1000-"]
    stand_in.status = 500
    assert open_hub(stand_in, hashed, own, HF_HUB_OFFLINE="1") == found[:2]


def test_a_note_of_what_was_found_that_was_cut_off_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = SimpleNamespace(config=SimpleNamespace(data_files={"train": []}))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    (tmp_path / "hub").mkdir()
    for _ in range(2):
        assert split_files("own/set", None, "train", "main", tmp_path) == []
        [note] = (tmp_path / "hub").iterdir()
        assert note.read_text() == "[]"
        note.write_text("")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"set.py": b"import datasets\n"}, "scripts are no longer supported"),
        ({"data/train.xml": b"{"}, "error occurred while generating"),
        ({"data/train.tar": b"{"}, "truncated header"),
        ({"data/train.h5": b"{"}, "h5py"),
        ({"README.md": b"nothing else"}, "doesn't contain any data files"),
    ],
)
def test_a_data_set_that_datasets_can_not_read_is_told(
    stand_in: StandIn, tmp_path: Path, files: dict[str, bytes], found: str
) -> None:
    stand_in.files = files
    [error] = open_hub(stand_in, ["dataset.repo=own/set", f"dataset.cache_dir={tmp_path}"], HF_HOME=str(tmp_path))
    assert "own/set" in error and found in error and "by hand" in error


def test_a_private_data_set_is_told(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.status = 401
    [error] = open_hub(stand_in, ["dataset.repo=own/set", f"dataset.cache_dir={tmp_path}"])
    assert "own/set" in error and "HF_TOKEN" in error


def test_the_door_shows_the_error_and_not_each_request(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.status = 401
    inherited = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    result = subprocess.run(
        [sys.executable, "pretrain_instruct.py", "dataset=hub", "dataset.repo=own/set", f"dataset.cache_dir={tmp_path}"],
        env={
            **inherited,
            "HF_ENDPOINT": stand_in.endpoint,
            "HF_HUB_OFFLINE": "0",
            "LLAMA_TOKENIZER": str(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"),
        },
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "HF_TOKEN" in result.stderr
    assert "HTTP Request" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("call", "environment", "advice"),
    [
        ("download('me/repo', 'f', folder / 'f')", {}, "check names, network and proxy"),
        ("download('me/repo', 'f', folder / 'f')", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it"),
        ("split_files('me/repo', None, 'train', 'main', folder)", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it"),
    ],
)
def test_without_a_network_it_says_so_within_seconds(tmp_path: Path, call: str, environment: dict[str, str], advice: str) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        script = (
            "import pathlib, sys; from config.errors import one_clear_message; from dataset.text.hub import download, split_files\n"
            f"folder = pathlib.Path(sys.argv[1])\nwith one_clear_message(): {call}"
        )
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        inherited = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        start = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            env={**inherited, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", **environment},
            cwd=REPOSITORY,
            check=False,
            capture_output=True,
            text=True,
        )
    assert result.returncode == 2
    assert advice in result.stderr and "Traceback" not in result.stderr
    assert time.monotonic() - start < 20
    assert names(tmp_path) == []
