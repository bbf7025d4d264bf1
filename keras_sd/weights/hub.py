"""Downloads: models of the Hugging Face Hub in the diffusers layout, and single files from any address.

Downloads resume, are checked where a checksum is pinned, and each failure is one sentence that says what to do.
"""

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

COMPONENTS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
SMALL_FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "low_res_scheduler/scheduler_config.json",
    "tokenizer/*",
    *(f"{component}/config.json" for component in COMPONENTS),
]
# What there is to fetch of a repository: (component → stem of its weights' names, other files, the first one needed).
PIPELINE = COMPONENTS, SMALL_FILES
SINGLE_MODEL = {".": "diffusion_pytorch_model"}, ["config.json"]
SAFETY_CHECKER = {".": "model"}, ["config.json", "preprocessor_config.json"]
OWN_SAFETY_CHECKER = {"safety_checker": "model"}, ["safety_checker/config.json", "feature_extractor/*"]
_URI = re.compile(r"hf://(?P<repo>[^/@\s]+/[^/@\s]+)(/(?P<file>[^@\s]+))?(@(?P<revision>\S+))?")


def cache_folder():
    """Folder of downloaded files: `$KERAS_SD_HOME`, else `keras_sd` under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keras_sd"
    return Path(os.environ.get("KERAS_SD_HOME") or default)


# === The Hugging Face Hub ===


def download_hf(uri, sha256=None, layout=PIPELINE):
    """Fetch `hf://owner/name[@revision]`, a folder in the diffusers layout, or `hf://owner/name/file[@revision]`.

    Of a folder only what keras_sd reads is fetched, `.bin` weights only for a model without safetensors. Files come to
    huggingface_hub's own cache; what is there already is not fetched again, and serves offline.

    Args:
        uri: what to fetch; `revision` is a branch, tag or commit.
        sha256: dict path in the repository -> hexadecimal digest of the files to check; for a single file, a digest.
        layout: `PIPELINE`, one of the safety checkers', or `SINGLE_MODEL` for a repository that holds one network, as a
            ControlNet's does.

    Returns:
        Path of the folder or of the file.

    Raises:
        ValueError: `uri` is malformed, or a file's checksum is wrong (the file is then removed from the cache).
        ConnectionError: offline, and not all files are in the cache.
        PermissionError: a licence must be accepted, or the repository is private.
        FileNotFoundError: no such repository, revision or file, or the repository is not in the diffusers layout.
    """
    found = _URI.fullmatch(uri)
    if not found:
        raise ValueError(
            f"{uri!r} is no address on the Hugging Face Hub; write hf://owner/name or hf://owner/name@revision."
        )
    repo, file, revision = found["repo"], found["file"], found["revision"]
    with _one_sentence_errors(uri, repo, revision):
        if file:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(repo, file, revision=revision))
            pins = {path: sha256} if sha256 else {}
        else:
            path = _snapshot(uri, repo, revision, *layout)
            pins = {path / name: digest for name, digest in (sha256 or {}).items()}
    for pinned, digest in pins.items():
        if not pinned.is_file():
            raise FileNotFoundError(f"{uri} holds no {pinned.name}, for which a checksum is pinned.")
        actual = sha256_of(pinned)
        if actual != digest.lower():
            pinned.resolve().unlink()  # the cache's blob, which the file is a link to
            pinned.unlink(missing_ok=True)
            raise ValueError(_wrong_checksum(f"{pinned.name} of {uri}", actual, digest))
    return path


def _snapshot(uri, repo, revision, components, small_files):
    from huggingface_hub import snapshot_download

    def patterns(stems, suffix):
        endings = f"{suffix}", f"{suffix}.index.json", f"-*-of-*{suffix}"
        return [f"{name}/{stem}{end}".removeprefix("./") for name, stem in stems.items() for end in endings]

    def missing(folder):
        return [name for name, stem in components.items() if not [*(folder / name).glob(f"{stem}*")]]

    wanted = patterns(components, ".safetensors")
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=small_files + wanted))
    if without := missing(folder):
        stems = {name: "pytorch_model" if components[name] == "model" else components[name] for name in without}
        wanted = patterns(stems, ".bin")
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=small_files + wanted))
        without = [name for name in missing(folder) if not [*(folder / name).glob(f"{stems[name]}*.bin*")]]
    if without or not (folder / small_files[0]).is_file():
        lacking = f"{without[0]}/ weights".removeprefix("./ ") if without else small_files[0]
        raise FileNotFoundError(
            f"{uri} is not in the diffusers layout, or only part of it is in the cache: there are no {lacking}. "
            "For a single-file checkpoint write hf://owner/name/file."
        )
    return folder


@contextmanager
def _one_sentence_errors(uri, repo, revision):
    try:
        yield
    except Exception as error:
        sentence = _sentence(error, uri, f"https://huggingface.co/{repo}", repo, revision)
        if sentence is None:
            raise
        raise sentence from error


def _sentence(error, uri, page, repo, revision):
    """The error that says in one sentence what an error of huggingface_hub means; None where it is none of them."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    unreachable = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    # the client's HTTP library differs by its version
    unreachable_names = ("ConnectError", "ConnectTimeout", "ReadTimeout")
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{uri!r} is no address on the Hugging Face Hub; write hf://owner/name.")
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{uri} asks for its licence to be accepted: do so at {page}, then log in with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{uri}: {page} has no revision {revision!r}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"There is no {page}, or it is private: check the name, or log in with `hf auth login`."
        )
    if isinstance(error, unreachable) or type(error).__name__ in unreachable_names:
        return ConnectionError(
            f"{uri} is not in the cache and the Hugging Face Hub cannot be reached: go online, or fetch it elsewhere "
            f"with `hf download {repo} --local-dir FOLDER` and give that folder."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{uri}: {page} holds no such file.")
    if status in (401, 403):
        return PermissionError(
            f"{uri} may not be read ({status}): accept its licence at {page}, log in with `hf auth login`."
        )
    if isinstance(error, errors.HfHubHTTPError):
        return ConnectionError(f"{uri} could not be fetched (HTTP {status}): try again later.")
    return None


# === Any address ===


def download(url, path, sha256=None, attempts=5, timeout=30):
    """Fetch a file to `path`; nothing is done where it is there already and its checksum is right.

    A transfer that breaks off is taken up where it stopped, up to `attempts` times here and again in a later call.

    Args:
        url: an http or https address.
        path: file to write. What has arrived so far is beside it, as `<name>.part`.
        sha256: hexadecimal digest that the file must have.

    Returns:
        `path`, as a `Path`.

    Raises:
        ValueError: another kind of address, or the checksum is wrong (nothing of the file is kept).
        FileNotFoundError, PermissionError: the server does not have the file, or does not give it.
        ConnectionError: the server cannot be reached, or the transfer broke off too often.
    """
    path = Path(path)
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"{url!r} cannot be downloaded: its address must begin with https:// or http://.")
    if path.is_file() and (sha256 is None or sha256_of(path) == sha256.lower()):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(attempts):
        try:
            _transfer(url, part, timeout)
            break
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(f"{url} does not exist ({error.code}): check the address.") from None
            if error.code in (401, 403):
                raise PermissionError(
                    f"{url} may not be read ({error.code}): log in there and fetch it by hand."
                ) from None
            reason = error
        except (OSError, http.client.HTTPException) as error:
            if not isinstance(error, (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException)):
                raise  # a full disk is no reason to ask the server again
            reason = getattr(error, "reason", error)
        if attempt == attempts - 1:
            raise ConnectionError(
                f"{url} could not be fetched ({reason}): check the connection and try again; "
                "what has arrived is kept, and taken up there."
            )
        time.sleep(min(2**attempt * 0.25, 4))
    if sha256 is not None and (actual := sha256_of(part)) != sha256.lower():
        part.unlink()
        raise ValueError(_wrong_checksum(url, actual, sha256))
    os.replace(part, path)
    return path


def _transfer(url, part, timeout):
    """Append to `part` what it lacks."""
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "keras_sd", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after what we have: it is whole, or of another version
            whole = error.headers.get("Content-Range", "").rpartition("/")[2] == str(have)
            if whole:
                return
            part.unlink()
            raise ConnectionError("the file changed meanwhile") from error
        raise
    with response:
        if have and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server cannot resume and sends all of it
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with bar, open(part, "ab" if have else "wb") as file:
            while chunk := response.read(2**20):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"the transfer broke off at {part.stat().st_size} of {total} bytes")


def sha256_of(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong_checksum(what, actual, expected):
    return (
        f"{what} has the checksum {actual}, not {expected.lower()}: it was damaged on the way or is another file, "
        "and was removed; try again."
    )
