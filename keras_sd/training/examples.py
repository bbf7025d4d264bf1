"""Captioned pictures on disk, in the layouts people have, to a list of examples.

| layout | captions |
|---|---|
| `data.csv` with `image_path,caption` | the Keras Pokémon archive's |
| `metadata.csv` or `metadata.jsonl` with `file_name,text` | Hugging Face's ImageFolder |
| `NAME.txt` or `NAME.caption` beside `NAME.png`, one caption a line | kohya's |

Tables may lie in any folder; the paths in them are relative to it. A table takes precedence over text files. Several
captions of a picture are several rows, a list (in JSON, or in a cell), or several lines. A table's column
`conditioning_image` names what a ControlNet sees for each picture: its edges, depth, …
"""

import ast
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import shutil
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from keras_sd.images import read_image
from keras_sd.weights.hub import cache_folder, download, sha256_of

TABLES = ("data.csv", "metadata.csv", "metadata.jsonl")
IMAGE_COLUMNS = ("image_path", "file_name")
CAPTION_COLUMNS = ("caption", "captions", "text")
CONDITIONING_COLUMN = "conditioning_image"
CAPTION_SUFFIXES = (".txt", ".caption")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SMALLEST_SIDE = 8  # pixels of one latent position
LAYOUTS = "data.csv (image_path,caption), metadata.csv or metadata.jsonl (file_name,text), or NAME.txt beside NAME.png"


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture and what it shows.

    Attributes:
        name: its path in the data set, with `/`.
        image: what `keras_sd.images.read_image` takes, or a function without arguments that gives it.
        captions: strings, at least one.
        height, width: its size in pixels, EXIF orientation applied.
        prior: it is one of DreamBooth's prior-preservation pictures: what the model drew before (Ruiz et al., 2023,
            arXiv 2208.12242, section 3.2).
        conditioning: what a ControlNet sees for it, a path or the like; None where the data set does not say.
    """

    name: str
    image: str | os.PathLike | Callable
    captions: tuple[str, ...]
    height: int
    width: int
    prior: bool = False
    conditioning: str | os.PathLike | None = None

    def read(self):
        """The picture as a PIL image, mode RGB."""
        return read_image(self.image() if callable(self.image) else self.image, self.name)

    def read_conditioning(self):
        """What a ControlNet sees, as a PIL image, mode RGB."""
        return read_image(self.conditioning, f"conditioning image of {self.name}")


def read_examples(source, caption=None, prior=False):
    """Reads a set of captioned pictures. Every picture is decoded once, so that training meets no unreadable one.

    Args:
        source: a folder, a `.tar`, `.tar.gz`, `.tgz` or `.zip` archive, or a URL of one. An archive is unpacked once
            under `keras_sd.weights.hub.cache_folder()`.
        caption: caption of the pictures that have none, e.g. DreamBooth's "a photo of sks dog"; without it they are
            not used.
        prior: mark the examples as prior-preservation pictures.

    Returns:
        (examples, rejected): a list of `Example` in the order of the tables, or by name; and a list of (file, reason)
        of what cannot be used: a caption without picture, a picture without caption, a damaged or tiny one.

    Raises:
        FileNotFoundError, ConnectionError: there is no such folder, archive or URL.
        ValueError: the archive is damaged or writes outside its folder, a table is malformed or lacks a column, or no
            picture with a caption is left.
    """
    folder = _open_source(source)
    captions, conditioning, rejected = _read_captions(folder)
    if caption is not None:
        captions = {name: texts or (caption,) for name, texts in captions.items()}
    with ThreadPoolExecutor() as threads:
        checks = ((folder, *item, prior, conditioning.get(item[0])) for item in captions.items())
        checked = list(threads.map(lambda arguments: _check(*arguments), checks))
    examples = [one for one in checked if isinstance(one, Example)]
    rejected = rejected + [one for one in checked if not isinstance(one, Example)]
    if not examples:
        raise ValueError(_nothing_left(source, rejected))
    return examples, rejected


def _nothing_left(source, rejected):
    if not rejected:
        return f"{str(source)!r} holds no pictures with captions: it should have {LAYOUTS}."
    file, reason = rejected[0]
    count = f"its only one, {file}," if len(rejected) == 1 else f"of {len(rejected)} the first, {file},"
    return f"{str(source)!r} holds no picture that can be used: {count} {reason}."


def _check(folder, name, captions, prior, conditioning):
    """The `Example`, or (file, reason). `conditioning` is a path in the folder, "" for a missing one, or None."""
    path = pathlib.Path(folder, name)
    if not captions:
        return name, "has no caption"
    if not path.is_file():
        return name, "has a caption, but there is no such picture"
    try:
        image = read_image(path)
    except (ValueError, OSError) as error:
        return name, f"cannot be read: {str(error).removeprefix('image: ')}".rstrip(".")
    if min(image.size) < SMALLEST_SIDE:
        size = f"{image.width}×{image.height}"
        return name, f"is {size} pixels; a picture needs at least {SMALLEST_SIDE}×{SMALLEST_SIDE}"
    if conditioning is None:
        return Example(name, path, captions, image.height, image.width, prior)
    seen = pathlib.Path(folder, conditioning)
    if not conditioning:
        return name, f"has no {CONDITIONING_COLUMN}"
    try:
        read_image(seen)
    except (ValueError, OSError) as error:
        reason = str(error).removeprefix("image: ").rstrip(".")
        return name, f"cannot be used without its {CONDITIONING_COLUMN}: {reason}"
    return Example(name, path, captions, image.height, image.width, prior, seen)


# === Layouts ===


def _read_captions(folder):
    """({name: tuple of captions, maybe empty}, {name: conditioning image, maybe ""}, [(file, reason)])."""
    files = sorted(
        path.relative_to(folder)
        for path in pathlib.Path(folder).rglob("*")
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)
    )
    images = [path.as_posix() for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    captions, conditioning, rejected = {}, {}, []
    if tables := [path for path in files if path.name in TABLES]:
        for table in tables:
            rows = _read_jsonl(folder / table) if table.suffix == ".jsonl" else _read_csv(folder / table)
            for image, texts, seen in rows:
                name = _inside(folder, table.parent, image)
                if name is None:
                    rejected.append((image or table.as_posix(), "names no file inside the data set"))
                    continue
                captions[name] = tuple(dict.fromkeys(captions.get(name, ()) + texts))
                if seen is not None:
                    conditioning[name] = _inside(folder, table.parent, seen) or ""
    else:
        beside = {path.with_suffix("").as_posix(): path for path in files if path.suffix.lower() in CAPTION_SUFFIXES}
        for name in images:
            text = beside.get(name.rpartition(".")[0])
            captions[name] = () if text is None else _texts(_read_text(folder / text).splitlines())
        stems = {name.rpartition(".")[0] for name in images}
        rejected += [
            (path.as_posix(), "has captions, but there is no such picture")
            for stem, path in beside.items()
            if stem not in stems
        ]
    known = captions.keys() | set(conditioning.values())
    return captions | {name: () for name in images if name not in known}, conditioning, rejected


def _inside(folder, parent, name):
    """The name of a file, as a table in `parent` has it, relative to the data set's folder; None for one outside."""
    root = os.path.normpath(folder)
    path = pathlib.Path(os.path.normpath(folder / parent / name.replace("\\", "/")))  # as Windows writes paths
    return path.relative_to(root).as_posix() if name and path.is_relative_to(root) else None


def _read_csv(path):
    """[(image, tuple of captions, conditioning image)] of a table separated by commas, tabs or semicolons."""
    text = _read_text(path)
    header = text.partition("\n")[0]
    separator = max(",\t;", key=header.count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    rows = []
    try:
        image, caption = (_column(path, table.fieldnames or (), names) for names in (IMAGE_COLUMNS, CAPTION_COLUMNS))
        for row in table:
            if None in row:
                raise ValueError(
                    f"{str(path)!r}, line {table.line_num}, has more cells than the table has columns: "
                    f"a caption with a {separator!r} in it must stand in quotes."
                )
            rows.append(((row[image] or "").strip(), _texts(_cell(row[caption])), _conditioning(row)))
    except csv.Error as error:
        raise ValueError(f"{str(path)!r}, line {table.line_num}, is malformed ({error}).") from None
    return rows


def _read_jsonl(path):
    """[(image, tuple of captions, conditioning image)] of a file with one JSON object a line."""
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}, line {number}, is no JSON ({error}).") from None
        if not isinstance(row, dict):
            raise ValueError(f"{str(path)!r}, line {number}, is no JSON object but {line.strip()[:40]!r}.")
        # a null caption is a missing caption, a missing key another layout
        image, caption = (_column(path, row, names, number) for names in (IMAGE_COLUMNS, CAPTION_COLUMNS))
        rows.append((row[image] if isinstance(row[image], str) else "", _texts(row[caption]), _conditioning(row)))
    return rows


def _conditioning(row):
    """What a row names for a ControlNet to see: "" where the cell is empty, None where there is none."""
    value = row.get(CONDITIONING_COLUMN, None)
    return None if CONDITIONING_COLUMN not in row else value.strip() if isinstance(value, str) else ""


def _column(path, columns, names, line=None):
    found = next((name for name in names if name in columns), None)
    if found is None:
        where = f"{str(path)!r}" if line is None else f"{str(path)!r}, line {line},"
        raise ValueError(
            f"{where} has no column {' or '.join(map(repr, names))}; it has {', '.join(map(repr, columns)) or 'none'}."
        )
    return found


def _cell(text):
    """A cell's text; or the list that is written in it, in JSON or as Python writes it."""
    if text and text.lstrip().startswith("["):
        try:
            values = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            return values
    return text


def _texts(values):
    values = [values] if isinstance(values, str) else values if isinstance(values, list) else []
    texts = (value.strip() for value in values if isinstance(value, str))
    return tuple(dict.fromkeys(text for text in texts if text))


def _read_text(path):
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not encoded in UTF-8 ({error.reason} at byte {error.start}).") from None


# === Sources ===


def _open_source(source):
    """The folder of a source; an archive is unpacked into one named after its content."""
    text = str(source)
    if text.startswith(("http://", "https://")):
        name = pathlib.PurePosixPath(urllib.parse.urlsplit(text).path).name
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = download(text, cache_folder() / "datasets" / f"{key}-{name}")
    elif text.startswith("file://"):
        path = pathlib.Path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path))
    else:
        path = pathlib.Path(source).expanduser()
    path = path.absolute()
    if path.is_dir():
        return path
    if not path.exists():
        raise FileNotFoundError(f"There is no folder or archive of pictures at {str(source)!r}.")
    folder = cache_folder() / "datasets" / sha256_of(path)[:32]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _unpack(path, temporary)
            os.rename(temporary, folder)
        except OSError as error:
            if not folder.is_dir():  # another process may have been faster
                raise type(error)(error.errno, f"Cannot unpack {str(path)!r}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack(path, folder):
    try:
        if tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")  # refuses whatever would land outside
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if os.path.isabs(name) or ".." in pathlib.PurePath(name.replace("\\", "/")).parts:
                        raise ValueError(f"{str(path)!r} is not unpacked: its {name!r} would land outside its folder.")
                archive.extractall(folder)
        else:
            raise ValueError(f"{str(path)!r} is neither a folder nor a .tar, .tar.gz, .tgz or .zip archive.")
    except tarfile.FilterError as error:
        raise ValueError(f"{str(path)!r} is not unpacked: {error}.") from None
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is a damaged archive ({error}).") from None
    except RuntimeError as error:  # a password is needed
        raise ValueError(f"{str(path)!r} cannot be unpacked ({error}).") from None
