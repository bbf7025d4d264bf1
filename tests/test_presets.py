"""Names of models: which there are, where they come from, what is said when one cannot be had."""

import re

import pytest

from keras_sd.presets import PRESETS, locate
from keras_sd.weights import hub


def test_the_promised_presets_are_pinned():
    assert [*PRESETS] == ["emoji", *(f"sd-v1-{i}" for i in range(1, 6)), "sd-v2-1-base", "sd-v2-1"]
    for name, preset in PRESETS.items():
        if name != "emoji":
            assert preset.sha256 or re.search(r"@[0-9a-f]{40}$", preset.source), name


def test_downloads_go_through_the_hub_with_their_pin(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(hub, "download_hf", lambda uri, sha256=None: asked.append((uri, sha256)) or tmp_path)
    assert locate("sd-v1-1") == tmp_path and locate("hf://someone/something") == tmp_path
    assert asked[0] == (PRESETS["sd-v1-1"].source, PRESETS["sd-v1-1"].sha256)
    assert asked[1] == ("hf://someone/something", None)


def test_paths_and_unknown_names(tmp_path):
    assert locate(tmp_path) == tmp_path
    with pytest.raises(ValueError, match=r"'sd-v1-6'.*Did you mean 'sd-v1-\d'.*hf://owner/name"):
        locate("sd-v1-6")


def test_offline_is_said(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="sd|hf://"):
        locate("sd-v1-5")
