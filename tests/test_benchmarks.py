"""The arithmetic and the tables of the benchmarks; nothing is timed here."""

import json

import pytest

from benchmarks import inference, optimisations, paired, quality, results, startup
from keras_sd.training import emoji_pictures


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paired, "FOLDER", tmp_path)
    return tmp_path


def test_ratios_are_of_runs_of_one_round():
    rounds = [{"a": {"t": [1, 2, 9]}, "b": {"t": 4}}, {"a": {"t": 3}}, {"a": {"t": 3}, "b": {"error": "no"}}]
    rounds.append({"a": {"t": 1}, "b": {"t": 4}})
    assert paired.ratios(rounds, "a", "b", "t") == [0.5, 0.25]
    assert paired.spread([0.5, 0.25, 0.3]) == "0.30 (0.25 … 0.50)"
    assert paired.spread([]) == "–"
    assert paired.best(rounds, ("a", "b", "c"), "t") == "a"
    assert paired.best(rounds, ("c",), "t") is None
    assert paired.best([*rounds, {"d": {"t": 0.1}}], ("a", "b", "d"), "t") == "a"  # one lucky round


def test_rounds_are_resumed_and_failures_not_repeated(folder):
    calls = []

    def run(name):
        calls.append(name)
        return {"error": "broken"} if name == "b" else {"t": len(calls)}

    assert len(paired.in_turn("x", "case", ("a", "b"), 2, run)) == 2
    assert calls == ["a", "b", "a"]
    rounds = paired.in_turn("x", "case", ("a", "b"), 3, run)
    assert calls == ["a", "b", "a", "a"] and [one["a"]["t"] for one in rounds] == [1, 3, 4]
    assert len(paired.in_turn("x", "case", ("a",), 1, run, fresh=True)) == 1
    kept = json.loads((folder / "x.json").read_text())
    assert kept["cases"] == {"case": [{"a": {"t": 5}}]} and kept["machine"]["cores"] >= 1


def test_a_run_that_fails_is_its_last_words():
    assert paired.measure("json.tool", "--no-such-flag")["error"].startswith("python -m json.tool: error:")


def test_ours_and_theirs_alternate():
    assert inference.alternated("ab", "xyz") == ["a", "x", "b", "y", "z"]
    assert not set(inference.peers("emoji")) & set(inference.KERAS_CV)


def test_the_first_steps_do_not_count():
    def draw(tick):
        for _ in range(4):
            tick()

    assert len(paired.timed(draw)["seconds"]) == 2 + 3


def test_an_optimisation_is_taken_away_by_name():
    optimisations.put("benchmarks.startup", "Stopwatch.unused", 7)
    assert startup.Stopwatch.unused == 7
    del startup.Stopwatch.unused


def test_the_report_shows_what_was_measured(folder, monkeypatch):
    def one(seconds):
        return {"seconds": [seconds], "end_to_end": 5 * seconds, "peak_memory": 1e9 * seconds}

    ours = {"tensorflow_bfloat16": one(1.2), "openvino_bfloat16": one(0.5), "tensorflow_float32": one(4)}
    theirs = {
        "diffusers_bfloat16": one(1),
        "diffusers_float32": one(5),
        "diffusers_bfloat16_compiled": {"error": "no g++"},
    }
    paired.save("inference", {"cases": {"512": [{**ours, **theirs}]}, "machine": paired.machine()})
    paired.save("optimisations", {"cases": {"pieces": [{"with": one(1), "without": one(2)}]}})
    point = {"5": {"evaluations": 5, "score": 0.95, "distance": 3.25}, "8": {"evaluations": 8, "score": 1.0}}
    paired.save("quality", {"count": 20, "samplers": {"ddim": point}})
    paired.save(
        "approximations",
        {"cases": {"emoji": {"cache_interval=2": {"psnr": [40, 30], "emoji_right": 1, "time": [0.7]}}}},
    )
    near = {
        "emoji_right": {"bfloat16": 1, "int8": 0.95},
        "psnr_to_bfloat16": {"int8": [40, 50, 45], "float32": [51], "winograd": [50]},
    }
    sizes = {"bfloat16": 1.72e9, "int8": 0.87e9}
    pair = {"int8": one(1.0), "bfloat16": one(1.25)}
    paired.save("int8", {"cases": {"512": [pair]}, "quality": near, "unet_bytes": sizes})
    paired.save("gpu", {"cases": {"512": [{"jax": {**one(1), "device": "NVIDIA X1"}, "diffusers": one(2)}]}})
    page = results.report()
    assert "## On a GPU: NVIDIA X1" in page and "| One picture, diffusers | 0.50 (0.50 … 0.50) | – |" in page
    assert (
        "| a step at 512×512, best against best | openvino bfloat16 / diffusers bfloat16 | 0.50 (0.50 … 0.50) |" in page
    )
    assert "| the same, float32 | tensorflow float32 / diffusers float32 | 0.80 (0.80 … 0.80) |" in page
    assert "diffusers bfloat16 compiled did not run: no g++" in page
    assert "| step | 0.50 (0.50 … 0.50) | 0.50 (0.50 … 0.50) |" in page
    assert "| `ddim` | 3.2, 95% | 100% | – | – | – | – |" in page
    assert "| `cache_interval=2` | 35.0 (30.0) | 100% | 0.70 (0.70 … 0.70) | – |" in page
    assert "| half the steps | – | – | – | – |" in page
    assert "| U-Net's file, GB | 1.72 | 0.87 |" in page and "| emoji right | 100% | 95% |" in page
    assert "| a step at 512×512, ratio | 1 | 0.80 (0.80 … 0.80) |" in page
    assert "median PSNR to the bfloat16 picture, dB |  | 45.0 |" in page
    assert "KerasCV" not in page.split("## What limits it")[0] and "768" not in page
    results.plot(folder / "speed.png")
    quality.plot({"ddim": point}, folder / "quality.png")
    assert all((folder / name).stat().st_size > 5000 for name in ("speed.png", "quality.png"))


def test_a_missing_font_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji_pictures, "FONT", str(tmp_path / "none.ttf"))
    emoji_pictures.glyph.cache_clear()
    with pytest.raises(FileNotFoundError, match="No font at .*none.ttf; .* fonts-noto-color-emoji"):
        emoji_pictures.render("🚀", (0, 0, 0))
