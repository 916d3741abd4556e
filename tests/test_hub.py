"""Downloads against a stand-in for the hub on loopback: whole, resumed, refused, unreachable."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mistral_common
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from config.compose import compose_config
from config.errors import UsageError
from dataset.instruct import open_instruct_data, open_run_data
from dataset.text.conversation import Template
from dataset.text.hub import download
from dataset.text.loader import TextDataset
from dataset.text.tokenizer import Tokenizer

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()
REPOSITORY = Path(__file__).resolve().parents[1]


class StandIn(ThreadingHTTPServer):
    """Serves CONTENT at the hub's resolve addresses. `cut_after` breaks transfers off; `status` refuses them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
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


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def _state_hash(self) -> None:
        if self.server.stated_sha256 is not None:
            self.send_header("X-Linked-ETag", f'"{self.server.stated_sha256}"')

    def do_GET(self) -> None:
        stand_in = self.server
        wanted = self.headers.get("Range")
        stand_in.requests.append((self.path, wanted, self.headers.get("Authorization")))
        if stand_in.redirect_to is not None:
            self.send_response(302)
            self.send_header("Location", stand_in.redirect_to + self.path)
            self._state_hash()
            self.end_headers()
            return
        if stand_in.status != 200:
            self.send_error(stand_in.status)
            return
        begin = 0
        if wanted and self.headers.get("If-Range") == stand_in.etag:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(stand_in.content):
                self.send_error(416)
                return
        body = stand_in.content[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("ETag", stand_in.etag)
        self._state_hash()
        self.send_header("Content-Length", str(len(body)))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(stand_in.content) - 1}/{len(stand_in.content)}")
        self.end_headers()
        if stand_in.cut_after:
            body = body[: stand_in.cut_after.pop(0)]
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
        monkeypatch.setattr("time.sleep", lambda _: None)
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_only_once(stand_in: StandIn, tmp_path: Path) -> None:
    target = tmp_path / "new" / "data.jsonl"
    for _ in range(2):
        found = download("me/repo", "a/b.jsonl", target, "v2", "dataset", SHA256, len(CONTENT))
        assert found == target and target.read_bytes() == CONTENT
    assert [request[0] for request in stand_in.requests] == ["/datasets/me/repo/resolve/v2/a/b.jsonl"]
    assert names(target.parent) == ["data.jsonl"]


def test_a_broken_transfer_goes_on_where_it_stopped(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.cut_after = [300_000, 1_000]
    download("me/repo", "f", tmp_path / "f", expected_sha256=SHA256)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [request[1] for request in stand_in.requests] == [None, "bytes=300000-", "bytes=301000-"]


def test_another_start_resumes_and_a_changed_file_starts_over(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.cut_after = [300_000, 0, 0, 0]
    with pytest.raises(UsageError, match="is kept"):
        download("me/repo", "f", tmp_path / "f")
    assert not (tmp_path / "f").exists()
    stand_in.requests.clear()
    download("me/repo", "f", tmp_path / "f")
    assert stand_in.requests[0][1] == "bytes=300000-" and (tmp_path / "f").read_bytes() == CONTENT
    stand_in.cut_after = [300_000, 0, 0, 0]
    with pytest.raises(UsageError):
        download("me/repo", "f", tmp_path / "g")
    stand_in.etag, stand_in.content = '"v2"', CONTENT[::-1]
    download("me/repo", "f", tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == CONTENT[::-1]
    assert names(tmp_path) == ["f", "g"]


def test_a_part_longer_than_the_file_starts_over(stand_in: StandIn, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT + b"more")
    (tmp_path / "f.etag").write_text(stand_in.etag)
    download("me/repo", "f", tmp_path / "f", expected_sha256=SHA256)
    assert (tmp_path / "f").read_bytes() == CONTENT


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
    return open_instruct_data(config.dataset, tokenizer, Template())[0]


def test_openorca_is_fetched_at_its_revision_broken_off_and_resumed(stand_in: StandIn, tmp_path: Path) -> None:
    rows = [{"id": f"t0.{n}", "system_prompt": "", "question": f"Q{n}?", "response": f"A{n}."} for n in range(50)]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    stand_in.content = sink.getvalue().to_pybytes()
    stand_in.stated_sha256 = hashlib.sha256(stand_in.content).hexdigest()
    stand_in.cut_after = [1000, 0, 0, 0]
    with pytest.raises(UsageError, match="is kept"):
        open_openorca(tmp_path)
    assert len(open_openorca(tmp_path)) == 100
    revision = compose_config("cfg_pretrain_instruct", ["dataset=openorca"]).dataset.hub_revision
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
    assert list(tmp_path.glob("*.parquet*")) == []


def test_a_curriculum_fetches_each_source_from_its_own_repository(stand_in: StandIn, tmp_path: Path) -> None:
    """Both presets' sources, one after the other: the first is there, the second is refused."""
    stand_in.content = b"".join(b'{"prompt": "Q%d?", "answer": "A"}\n' % n for n in range(40))
    folders = [f"sources.{name}.data_dir={tmp_path / name}" for name in ("slimorca", "openorca")]
    config = compose_config("cfg_pretrain_instruct", ["experiment=slimorca_then_openorca", *folders])
    tokenizer = Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")
    with pytest.raises(UsageError, match=r"1M-GPT4-Augmented\.parquet: expected a complete parquet file"):
        open_run_data(config, tokenizer, Template())
    slimorca, openorca = config.sources["slimorca"], config.sources["openorca"]
    assert stand_in.requests[0][0].startswith(f"/datasets/Open-Orca/SlimOrca/resolve/{slimorca.hub_revision}/oo-labeled")
    assert stand_in.requests[1][0] == f"/datasets/Open-Orca/OpenOrca/resolve/{openorca.hub_revision}/1M-GPT4-Augmented.parquet"
    assert (tmp_path / "slimorca/SlimOrca.jsonl").read_bytes() == stand_in.content


def test_openorca_offline_is_told(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"1M-GPT4.*HF_HUB_OFFLINE"):
        open_openorca(tmp_path)
    assert stand_in.requests == []


def test_a_wrong_size_is_refused_before_the_transfer(stand_in: StandIn, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected 5 bytes"):
        download("me/repo", "f", tmp_path / "f", expected_size=5)
    assert not (tmp_path / "f").exists()


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


@pytest.mark.parametrize(
    ("environment", "advice"),
    [
        ({}, "check the network"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": ""}, "unset HF_ENDPOINT"),
    ],
)
def test_without_a_network_it_says_so_within_seconds(tmp_path: Path, environment: dict[str, str], advice: str) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        script = (
            "import sys; from config.errors import one_clear_message; from dataset.text.hub import download\n"
            "with one_clear_message(): download('me/repo', 'f', sys.argv[1])"
        )
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        inherited = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        start = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "f")],
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
