"""Built-in presets: names → a folder of the package, or a pinned download."""

import dataclasses
import difflib
import pathlib

FOLDER = pathlib.Path(__file__).parent / "presets"
RAIL, RAIL_PLUS = "CreativeML OpenRAIL-M", "CreativeML OpenRAIL++-M"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Where a model comes from.

    Attributes:
        source: a folder of the package, or `hf://owner/name[/file]@revision`; a revision is a commit, so that the name
            stands for the same files for ever.
        size: default height and width of its pictures in pixels.
        licence: licence of the weights.
        sha256: digest of a single file.
    """

    source: str
    size: str
    licence: str
    sha256: str | None = None


def _original(version, sha256):
    """A checkpoint of 2022 in CompVis' own repository."""
    return Preset(f"hf://CompVis/stable-diffusion-v-{version}-original/sd-v{version}.ckpt", "512×512", RAIL, sha256)


PRESETS = {
    "emoji": Preset(str(FOLDER / "emoji"), "64×64", "Apache-2.0"),
    "sd-v1-1": _original("1-1", "86cd1d3ccb044d7ba8db743d717c9bac603c4043508ad2571383f954390f3cea"),
    "sd-v1-2": _original("1-2", "3b87d30facd5bafca1cbed71cfb86648aad75d1c264663c0cc78c7aea8daec0d"),
    "sd-v1-3": _original("1-3", "2cff93af4dcc07c3e03110205988ff98481e86539c51a8098d4f2236e41f7f2f"),
    "sd-v1-4": Preset("hf://CompVis/stable-diffusion-v1-4@133a221b8aa7292a167afc5127cb63fb5005638b", "512×512", RAIL),
    "sd-v1-5": Preset(
        "hf://stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14", "512×512", RAIL
    ),
    "sd-v2-1-base": Preset(
        "hf://stabilityai/stable-diffusion-2-1-base@5ede9e4bf3e3fd1cb0ef2f7a3fff13ee514fdf06", "512×512", RAIL_PLUS
    ),
    "sd-v2-1": Preset(
        "hf://stabilityai/stable-diffusion-2-1@5cae40e6a2745ae2b01ad92ae5043f95f23644d6", "768×768", RAIL_PLUS
    ),
}

# CLIP's published vocabulary, for checkpoints that carry no tokenizer.
VOCABULARY = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def locate(preset):
    """The path of a preset, downloaded where it must be.

    Args:
        preset: a built-in name, a path, or `hf://owner/name[/file][@revision]`.

    Raises:
        ValueError: there is no preset and no path of that name, or a download's checksum is wrong.
        ConnectionError, PermissionError, FileNotFoundError: it cannot be fetched; the message says what to do.
    """
    name = str(preset)
    source = PRESETS[name].source if name in PRESETS else name
    if source.startswith("hf://"):
        from keras_sd.weights.hub import download_hf

        return download_hf(source, PRESETS[name].sha256 if name in PRESETS else None)
    if pathlib.Path(source).exists():
        return pathlib.Path(source)
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"No preset or path {name!r}.{hint} Presets: {', '.join(PRESETS)}; or give a path or hf://owner/name."
    )


def locate_model(source):
    """The path of a single model: a path as it is, `hf://owner/name[/file][@revision]` downloaded."""
    if not str(source).startswith("hf://"):
        return pathlib.Path(source)
    from keras_sd.weights.hub import SINGLE_MODEL, download_hf

    return download_hf(str(source), layout=SINGLE_MODEL)


def locate_safety_checker(preset, source):
    """The folder of a safety checker, downloaded where it must be.

    Args:
        preset: of the model, as in `locate`.
        source: True for the preset's own, or a path or `hf://owner/name` of another one.

    Raises:
        FileNotFoundError: the preset has none.
    """
    from keras_sd.weights.hub import OWN_SAFETY_CHECKER, SAFETY_CHECKER, download_hf

    if source is not True:
        is_remote = str(source).startswith("hf://")
        return download_hf(str(source), layout=SAFETY_CHECKER) if is_remote else pathlib.Path(source)
    path = PRESETS[str(preset)].source if str(preset) in PRESETS else str(preset)
    if path.startswith("hf://") and not path.partition("@")[0].endswith((".ckpt", ".safetensors")):
        path = download_hf(path, layout=OWN_SAFETY_CHECKER)
    folder = pathlib.Path(path) / "safety_checker"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(preset)!r} has no safety checker of its own; give safety_checker the folder of one, "
            "or 'hf://CompVis/stable-diffusion-safety-checker'."
        )
    return folder


def clip_vocabulary():
    """The path of CLIP's vocabulary, downloaded once."""
    from keras_sd.weights.hub import cache_folder, download

    path = cache_folder() / "bpe_simple_vocab_16e6.txt.gz"
    download(VOCABULARY, path, VOCABULARY_SHA256)
    return path
