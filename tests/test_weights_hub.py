import hashlib
import http.server
import json
import threading
import types

import pytest

from keras_sd.weights import hub

DATA = bytes(range(256)) * 20_000
DIGEST = hashlib.sha256(DATA).hexdigest()


# === Any address ===


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves DATA; the server's `plan` says how the next requests go wrong."""

    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        plan = server.plan.pop(0) if server.plan else "well"
        if self.path == "/none":
            return self.send_error(404)
        if self.path == "/closed":
            return self.send_error(403)
        if plan == "busy":
            return self.send_error(503)
        start = 0
        if self.headers.get("Range") and plan != "no ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(DATA):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(DATA)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        body = DATA[start:]
        self.wfile.write(body[: len(body) // 2] if plan == "break" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.plan = [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_download(server, tmp_path):
    path = hub.download(f"{server.url}/file", tmp_path / "new" / "file.gz", DIGEST.upper())
    assert path.read_bytes() == DATA and [p.name for p in path.parent.iterdir()] == ["file.gz"]
    hub.download(f"{server.url}/file", path, DIGEST)
    hub.download(f"{server.url}/file", path)
    assert server.requests == [None]  # what is there is not fetched again
    path.write_bytes(b"damaged")
    assert hub.download(f"{server.url}/file", path, DIGEST).read_bytes() == DATA


def test_resumes(server, tmp_path):
    server.plan = ["break", "busy", "break", "well"]
    path = hub.download(f"{server.url}/file", tmp_path / "file", DIGEST)
    assert path.read_bytes() == DATA
    half = len(DATA) // 2
    assert server.requests == [None, f"bytes={half}-", f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_resumes_in_a_later_call(server, tmp_path):
    server.plan = ["break"]
    with pytest.raises(ConnectionError, match=r"broke off at 2560000 of 5120000 bytes.*taken up there"):
        hub.download(f"{server.url}/file", tmp_path / "file", DIGEST, attempts=1)
    assert [p.name for p in tmp_path.iterdir()] == ["file.part"]
    assert hub.download(f"{server.url}/file", tmp_path / "file", DIGEST).read_bytes() == DATA
    (tmp_path / "file").rename(tmp_path / "file.part")  # all of it had arrived
    assert hub.download(f"{server.url}/file", tmp_path / "file", DIGEST).read_bytes() == DATA


def test_server_without_ranges(server, tmp_path):
    server.plan = ["break", "no ranges"]
    assert hub.download(f"{server.url}/file", tmp_path / "file").read_bytes() == DATA


def test_a_longer_part_of_another_version_is_dropped(server, tmp_path):
    (tmp_path / "file.part").write_bytes(DATA + b"more")
    assert hub.download(f"{server.url}/file", tmp_path / "file", DIGEST).read_bytes() == DATA


def test_wrong_checksum(server, tmp_path):
    with pytest.raises(ValueError, match=f"has the checksum {DIGEST}, not {'0' * 64}.*was removed"):
        hub.download(f"{server.url}/file", tmp_path / "file", "0" * 64)
    assert not [*tmp_path.iterdir()]


def test_refusals(server, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/none does not exist \(404\)"):
        hub.download(f"{server.url}/none", tmp_path / "file")
    with pytest.raises(PermissionError, match=r"/closed may not be read \(403\)"):
        hub.download(f"{server.url}/closed", tmp_path / "file")
    with pytest.raises(ValueError, match="must begin with https://"):
        hub.download("file:///etc/passwd", tmp_path / "file")
    server.plan = ["busy"] * 5
    with pytest.raises(ConnectionError, match="503.*check the connection and try again"):
        hub.download(f"{server.url}/file", tmp_path / "file")
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="could not be fetched .*refused"):
        hub.download(f"{server.url}/file", tmp_path / "file")
    assert not [*tmp_path.iterdir()]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_SD_HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path
    monkeypatch.delenv("KERAS_SD_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / "keras_sd"


# === The Hugging Face Hub ===


@pytest.fixture
def hugging(monkeypatch, tmp_path):
    """huggingface_hub over a pretended repository: `files` are what it holds; what was asked for is in `calls`."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "model_index.json",
        "README.md",
        "v1-5-pruned.ckpt",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "safety_checker/model.safetensors",
        *(f"{name}/config.json" for name in hub.COMPONENTS),
        *(f"{name}/{stem}.safetensors" for name, stem in hub.COMPONENTS.items()),
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
    ]
    hugging = types.SimpleNamespace(errors=errors, folder=tmp_path / "snapshot", calls=[], error=None, files=files)

    def fetch(names):
        for name in names:
            (hugging.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (hugging.folder / name).write_text(name)

    def snapshot_download(repo, revision=None, allow_patterns=None):
        hugging.calls.append((repo, revision))
        if hugging.error:
            raise hugging.error
        hugging.folder.mkdir(exist_ok=True)
        fetch(filter_repo_objects(hugging.files, allow_patterns=allow_patterns))
        return str(hugging.folder)

    def hf_hub_download(repo, file, revision=None):
        hugging.calls.append((repo, file, revision))
        if hugging.error:
            raise hugging.error
        fetch([file])
        return str(hugging.folder / file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return hugging


def fetched(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_folder(hugging):
    folder = hub.download_hf("hf://owner/name@v1.0")
    assert hugging.calls == [("owner/name", "v1.0")]
    unwanted = {"README.md", "v1-5-pruned.ckpt", "safety_checker/model.safetensors"}
    assert fetched(folder) == {
        f for f in hugging.files if f not in unwanted and not f.endswith(".bin") and "16" not in f
    } - {"unet/diffusion_pytorch_model.non_ema.safetensors"}


def test_bin_only_where_there_is_no_safetensors(hugging):
    hugging.files = [name for name in hugging.files if name != "text_encoder/model.safetensors"]
    folder = hub.download_hf("hf://owner/name")
    weights = {name for name in fetched(folder) if "model" in name.split("/")[-1]} - {"model_index.json"}
    assert weights == {
        "text_encoder/pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_not_the_diffusers_layout(hugging):
    hugging.files = ["README.md", "v1-5-pruned.ckpt"]
    with pytest.raises(
        FileNotFoundError, match=r"hf://owner/name is not in the diffusers layout.*text_encoder/ weights"
    ):
        hub.download_hf("hf://owner/name")
    assert hub.download_hf("hf://owner/name/v1-5-pruned.ckpt@main").name == "v1-5-pruned.ckpt"
    assert hugging.calls[-1] == ("owner/name", "v1-5-pruned.ckpt", "main")


def test_checksums(hugging):
    name = "unet/diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(name.encode()).hexdigest()
    folder = hub.download_hf("hf://owner/name", {name: digest})
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors of hf://owner/name has the checksum"):
        hub.download_hf("hf://owner/name", {name: "0" * 64})
    assert not (folder / name).exists()
    with pytest.raises(FileNotFoundError, match=r"holds no x\.bin"):
        hub.download_hf("hf://owner/name", {"unet/x.bin": digest})
    with pytest.raises(ValueError, match="has the checksum"):
        hub.download_hf("hf://owner/name/v1-5-pruned.ckpt", "0" * 64)


@pytest.mark.parametrize(
    "uri", ["owner/name", "hf://name", "hf://", "hf://owner/na me", "https://huggingface.co/owner/name"]
)
def test_malformed(hugging, uri):
    with pytest.raises(ValueError, match="no address on the Hugging Face Hub; write hf://owner/name"):
        hub.download_hf(uri)
    assert not hugging.calls


@pytest.mark.parametrize("uri", ["hf://owner/name@v9", "hf://owner/name/file.ckpt@v9"])
@pytest.mark.parametrize(
    "name, status, kind, message",
    [
        (
            "GatedRepoError",
            403,
            PermissionError,
            "licence to be accepted: do so at https://huggingface.co/owner/name, then",
        ),
        (
            "RepositoryNotFoundError",
            401,
            FileNotFoundError,
            "There is no https://huggingface.co/owner/name, or it is private",
        ),
        ("RevisionNotFoundError", 404, FileNotFoundError, "has no revision 'v9'"),
        ("RemoteEntryNotFoundError", 404, FileNotFoundError, "holds no such file"),
        ("HfHubHTTPError", 401, PermissionError, r"may not be read \(401\).*`hf auth login`"),
        ("HfHubHTTPError", 403, PermissionError, r"may not be read \(403\).*`hf auth login`"),
        ("HfHubHTTPError", 500, ConnectionError, r"could not be fetched \(HTTP 500\)"),
        ("OfflineModeIsEnabled", None, ConnectionError, "cannot be reached: go online, or fetch it elsewhere"),
        ("LocalEntryNotFoundError", None, ConnectionError, "cannot be reached: go online"),
        ("ConnectError", None, ConnectionError, "cannot be reached: go online"),
    ],
)
def test_errors_of_the_hub(hugging, uri, name, status, kind, message):
    response = type("Response", (), {"status_code": status, "headers": {}, "request": None})()
    cls = getattr(hugging.errors, name, None) or type(name, (Exception,), {})
    hugging.error = cls("several\nlines\nof advice", response=response) if status else cls("several\nlines")
    with pytest.raises(kind, match=message) as caught:
        hub.download_hf(uri)
    assert "\n" not in str(caught.value)


def test_the_real_client_offline(monkeypatch, tmp_path):
    """With huggingface_hub itself, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for uri in ("hf://owner/name", "hf://owner/name/file.ckpt"):
        with pytest.raises(ConnectionError, match="cannot be reached: go online"):
            hub.download_hf(uri)
    with pytest.raises(ValueError, match="no address on the Hugging Face Hub"):
        hub.download_hf("hf://owner/..name--")
    commit = "0" * 40
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for name in ("model_index.json", *(f"{name}/{stem}.safetensors" for name, stem in hub.COMPONENTS.items())):
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({}))
    assert hub.download_hf("hf://owner/name") == folder / "snapshots" / commit
