"""Many prompts on Ray's workers: the pictures that `text_to_image` draws, none of them twice."""

import json

import numpy as np
import pytest
from PIL import Image

from keras_sd import StableDiffusion, batch
from keras_sd.png import read_parameters

ROWS = [{"prompt": f"a {x}", "negative_prompt": "", "seed": i} for i, x in enumerate(("pear", "dog", "cup"))]
ROWS[1] |= {"negative_prompt": "red", "seed": 40}


def test_pictures_of_all_rows(tiny, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, object_store_memory=10**8, include_dashboard=False, ignore_reinit_error=True)
    try:
        options = {"num_steps": 2, "height": 32, "width": 32}
        model = {"cache_interval": 2}
        paths = batch.draw_batch(ROWS, tmp_path, str(tiny), model=model, workers=1, batch_size=2, **options)
        assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
        sd = StableDiffusion.from_preset(tiny, **model)
        for row, path in zip(ROWS, paths):
            (expected,) = sd.text_to_image(
                row["prompt"], negative_prompt=row["negative_prompt"], seed=row["seed"], progress=False, **options
            )
            assert np.abs(np.asarray(Image.open(path)).astype(int) - expected).max() <= 1
            assert read_parameters(path)["Seed"] == str(row["seed"])
        before = [path.stat().st_mtime_ns for path in paths]
        paths[1].unlink()
        batch.draw_batch(ROWS, tmp_path, str(tiny), batch_size=2, **options)
        after = [path.stat().st_mtime_ns for path in paths]
        assert after[0] == before[0] and after[1] > before[1] and after[2] == before[2]
        with pytest.raises(ray.exceptions.RayError, match="num_steps"):
            batch.draw_batch(ROWS, tmp_path / "other", str(tiny), num_steps=0)
    finally:
        ray.shutdown()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(batch, "draw_batch", lambda *args, **options: drawn.update(options, args=args) or [])
    (tmp_path / "a.txt").write_text("a pear")
    words = f"{tmp_path / 'a.txt'} --out {tmp_path} --preset x --dtype bfloat16 --workers 2 --steps 3"
    assert batch.main(words.split()) == 0 and "0 pictures in" in capsys.readouterr().out
    assert drawn["args"][1:] == (str(tmp_path), "x") and drawn["args"][0][0]["prompt"] == "a pear"
    assert drawn["model"] == {"dtype": "bfloat16"}
    assert (drawn["workers"], drawn["num_steps"]) == (2, 3)


def test_files_of_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("a pear\n\na dog\na cup\n")
    (tmp_path / "a.csv").write_text("prompt,negative_prompt,seed\na pear,,\na dog,red,40\na cup,,2\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert batch.read_prompts(tmp_path / "a.csv") == batch.read_prompts(tmp_path / "a.jsonl") == ROWS
    assert [row["prompt"] for row in batch.read_prompts(tmp_path / "a.txt")] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a pear", "Row 1 of .* is no JSON object"),
        ("[1]", "Row 1 of .* is no JSON object"),
        ('{"promt": "a"}', "Row 1 of .* has the field 'promt'; it takes prompt, negative_prompt, seed"),
        ('{"prompt": "a"}\n{"seed": 1}', "Row 2 of .* has no prompt"),
        ('{"prompt": "a", "seed": "x"}', "Row 1 of .* has the seed 'x'; it must be an integer"),
    ],
)
def test_bad_rows(text, words, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        batch.read_prompts(tmp_path / "a.jsonl")
    assert batch.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path)]) == 1
    assert "Error: Row" in capsys.readouterr().err
