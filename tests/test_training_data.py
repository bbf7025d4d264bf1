"""Data for fine-tuning: layouts, bad files, buckets, batches, augmentation, the latent cache and the TFDS data set."""

import errno
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

import keras_sd.training.latent_cache as latent_cache
from keras_sd import StableDiffusion
from keras_sd.training.batches import Pictures, batches, draw_epoch, steps_per_epoch
from keras_sd.training.buckets import choose_buckets, make_buckets
from keras_sd.training.examples import read_examples
from keras_sd.training.latent_cache import build_latent_cache


def picture(i, height=64, width=64):
    """A picture that is another one for each i; no two columns are alike."""
    random = np.random.default_rng(i)
    ramp = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    return Image.fromarray((ramp + random.integers(0, 75, 3)).astype("uint8"))


def write_set(folder, count=6, sizes=((64, 64),), table="data.csv"):
    """`count` pictures and data.csv; those of odd number have two captions."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        picture(i, *sizes[i % len(sizes)]).save(folder / "images" / f"{i}.png")
        rows += [f"images/{i}.png,drawing {i}"] + ([f'images/{i}.png,"apple, {i}"'] if i % 2 else [])
    (folder / table).write_text("\n".join(["image_path,caption", *rows]))
    return folder


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.from_preset("emoji")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_SD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def arrays(dataset):
    return [{name: np.asarray(value) for name, value in batch.items()} for batch in dataset]


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# === Layouts ===


def captions(source, **kwargs):
    examples, rejected = read_examples(source, **kwargs)
    return {one.name: one.captions for one in examples}, dict(rejected)


def test_data_csv_with_several_rows_a_picture(tmp_path):
    found, rejected = captions(write_set(tmp_path / "set", 2))
    assert found == {"images/0.png": ("drawing 0",), "images/1.png": ("drawing 1", "apple, 1")} and not rejected


@pytest.mark.parametrize(
    "name, text",
    [
        ("metadata.csv", 'file_name,text\na.png,one\nb/c.png,"[""two"", ""three""]"\n'),
        ("metadata.csv", "\ufefftext\tfile_name\r\none\ta.png\r\n\"['two', 'three']\"\tb\\c.png\r\n"),
        ("data.csv", ";image_path; caption\n0;a.png;one\n1;b/c.png;two\n2;b/c.png;three\n3;b/c.png;two\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "one", "id": 3}\n\n{"file_name": "b/c.png", "text": ["two", " three "]}',
        ),
    ],
)
def test_tables(tmp_path, name, text):
    (tmp_path / "b").mkdir()
    for file in ("a.png", "b/c.png"):
        picture(0).save(tmp_path / file)
    (tmp_path / name).write_bytes(text.encode())
    assert captions(tmp_path) == ({"a.png": ("one",), "b/c.png": ("two", "three")}, {})


def test_tables_in_folders_are_relative_to_them(tmp_path):
    for part in ("train", "more"):
        (tmp_path / part).mkdir()
        picture(0).save(tmp_path / part / "a.png")
        (tmp_path / part / "metadata.csv").write_text(f"file_name,text\na.png,{part}\n")
    assert captions(tmp_path)[0] == {"more/a.png": ("more",), "train/a.png": ("train",)}


def test_text_files_beside_pictures(tmp_path):
    (tmp_path / "10_cat").mkdir()
    for file in ("10_cat/a.png", "b.jpg", "c.png", "._b.jpg"):
        picture(0).save(tmp_path / file)
    (tmp_path / "10_cat" / "a.txt").write_text("a cat\n\nthe cat\n")
    (tmp_path / "b.caption").write_text("ein Bär")
    (tmp_path / "d.txt").write_text("nobody")
    found, rejected = captions(tmp_path)
    assert found == {"10_cat/a.png": ("a cat", "the cat"), "b.jpg": ("ein Bär",)}
    assert rejected == {"c.png": "has no caption", "d.txt": "has captions, but there is no such picture"}
    assert captions(tmp_path, caption="a sks cat")[0]["c.png"] == ("a sks cat",)


@pytest.mark.parametrize("kind", ["tar.gz", "tgz", "tar", "zip", "file"])
def test_archives(tmp_path, home, kind):
    folder = write_set(tmp_path / "pokemon_dataset", 3)
    path = tmp_path / f"set.{'tar.gz' if kind == 'file' else kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(tmp_path))
    else:
        with tarfile.open(path, "w" if kind == "tar" else "w:gz") as archive:
            archive.add(folder, folder.name)
    source = path.as_uri() if kind == "file" else path
    examples, rejected = read_examples(source)
    assert [one.name for one in examples] == [f"pokemon_dataset/images/{i}.png" for i in range(3)] and not rejected
    written = [path.stat().st_mtime_ns for path in home.rglob("*.png")]
    assert [one.captions for one in read_examples(source)[0]] == [one.captions for one in examples]
    assert [path.stat().st_mtime_ns for path in home.rglob("*.png")] == written  # unpacked once
    assert not [path for path in (home / "datasets").iterdir() if path.name.startswith(".")]


def test_url(tmp_path, home):
    import http.server
    import threading

    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.add(write_set(tmp_path / "set", 2), "set")
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=tmp_path)  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/set.tar.gz"
        assert len(read_examples(url)[0]) == 2
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_examples(url + ".gone")
        server.shutdown()
    assert len(read_examples(url)[0]) == 2  # now from the cache


def test_archives_cannot_write_outside(tmp_path, home):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../evil.txt"), io.BytesIO())
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        link = tarfile.TarInfo("inside")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("../evil.txt", "")
    for name in ("a.tar", "b.tar", "c.zip"):
        with pytest.raises(ValueError, match=f"{name}' is not unpacked"):
            read_examples(tmp_path / name)
    assert not list(home.rglob("evil.txt")) and not list((home / "datasets").iterdir())


def test_damaged_archives(tmp_path, home):
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.add(write_set(tmp_path / "set", 6), "set")
    whole = (tmp_path / "set.tar.gz").read_bytes()
    (tmp_path / "short.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.zip").write_text("no archive")
    for name, message in (("short.tar.gz", "damaged archive"), ("text.zip", "neither a folder nor a .tar")):
        with pytest.raises(ValueError, match=message):
            read_examples(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no folder or archive of pictures at '.*gone'"):
        read_examples(tmp_path / "gone")
    assert not list((home / "datasets").iterdir())


# === Bad data ===


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path):
    folder = write_set(tmp_path / "set", 3)
    picture(7, 1, 1).save(folder / "images" / "dot.png")
    good = (folder / "images" / "0.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "images" / "text.png").write_text("no picture")
    (folder / "images" / "empty.png").write_bytes(b"")
    picture(0).save(folder / "images" / "lonely.png")
    names = ("dot", "cut", "text", "empty", "gone")
    rows = "".join(f"\nimages/{name}.png,a {name}" for name in names)
    with open(folder / "data.csv", "a") as file:
        file.write(rows + "\nimages/2.png,\n../set.png,outside\n/etc/passwd,outside\n,nothing\n")
    found, rejected = captions(folder)
    assert set(found) == {f"images/{i}.png" for i in range(3)}
    assert rejected["images/dot.png"] == "is 1×1 pixels; a picture needs at least 8×8"
    for name in ("cut", "text", "empty"):
        assert rejected[f"images/{name}.png"].startswith("cannot be read: ")
    assert rejected["images/gone.png"] == "has a caption, but there is no such picture"
    assert rejected["images/lonely.png"] == "has no caption"
    for outside in ("../set.png", "/etc/passwd", "data.csv"):
        assert rejected[outside] == "names no file inside the data set"


def test_phone_pictures_with_previews_are_pictures(tmp_path):
    picture(0, 40, 48).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture(1, 16, 16)])
    frames = [picture(0), picture(1)]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    examples, rejected = read_examples(tmp_path, caption="holidays")
    assert [(one.name, one.height, one.width) for one in examples] == [("a.jpg", 40, 48)]
    assert rejected[0][0] == "b.gif" and "is an animation of 2 pictures" in rejected[0][1]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("data.csv", "image_path,title\na.png,one", r"data.csv' has no column 'caption' or .*it has 'image_path', 'ti"),
        ("data.csv", "path,caption\na.png,one", "has no column 'image_path' or 'file_name'"),
        ("data.csv", "", "has no column 'image_path' or 'file_name'; it has none"),
        ("data.csv", "image_path,caption\na.png,one, two", "line 2, has more cells than the table has columns"),
        ("data.csv", 'image_path,caption\na.png,"one', "is malformed"),
        ("data.csv", b"image_path,caption\na.png,\xff", "is not encoded in UTF-8"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{oops', "line 2, is no JSON"),
        ("metadata.jsonl", "[1]", "line 1, is no JSON object"),
        ("metadata.jsonl", '{"file_name": "a.png"}', "line 1, has no column 'caption' or 'captions' or 'text'"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": null}', r"its only one, a.png, has no caption"),
        ("data.csv", "image_path,caption\n", "its only one, a.png, has no caption"),
        ("data.csv", "image_path,caption\nb.png,x", "of 2 the first, b.png, has a caption, but there is no such pict"),
    ],
)
def test_bad_tables_are_one_sentence(tmp_path, name, text, message):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_examples(tmp_path)
    assert "\n" not in str(error.value)


def test_empty_set(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures with captions: it should have data.csv"):
        read_examples(tmp_path)


# === Buckets ===


def test_buckets_have_about_equal_area():
    for height, width, step in ((512, 512, 64), (768, 768, 64), (64, 64, 8), (512, 768, 64), (256, 256, 64)):
        buckets = make_buckets(height, width)
        assert (height, width) in buckets and len(set(buckets)) == len(buckets)
        assert {(w, h) for h, w in buckets} == set(buckets)
        for h, w in buckets:
            assert h % step == w % step == 0 and 0.74 * height * width < h * w <= height * width
    assert (384, 640) in make_buckets(512, 512) and (512, 768) in make_buckets(512, 768)
    with pytest.raises(ValueError, match="width must be a positive multiple of 8; got 60"):
        make_buckets(64, 60)


def test_nearest_bucket():
    buckets = make_buckets(512, 512)
    sizes = [(100, 100), (600, 1000), (1000, 600), (10, 4000), (512, 512)]
    assert choose_buckets(sizes, buckets).tolist() == [[512, 512], [384, 640], [640, 384], [256, 1024], [512, 512]]


# === Batches ===


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """11 examples of three shapes."""
    return read_examples(write_set(tmp_path_factory.mktemp("mixed") / "set", 11, ((80, 90), (50, 100), (130, 60))))[0]


def test_batches_are_the_pictures(mixed, sd):
    pictures = Pictures(mixed, sd.tokenizer, 64, 64)
    found = arrays(batches(pictures, 4, seed=3))
    assert len(found) == steps_per_epoch(pictures, 4) == 3
    draws = draw_epoch(pictures, 4, 3, 0)
    for step, batch in enumerate(found):
        assert batch["image"].shape == (4, 64, 64, 3) and batch["image"].dtype == "float32"
        assert batch["tokens"].shape == (4, 77) and batch["tokens"].dtype == "int32"
        for row in range(4):
            example = mixed[draws["example"][step, row]]
            np.testing.assert_allclose(
                batch["image"][row], pictures.picture(draws["example"][step, row]) / 127.5 - 1, atol=1e-6
            )
            caption = example.captions[draws["caption"][step, row]]
            np.testing.assert_array_equal(batch["tokens"][row], sd.tokenizer(caption)[0])


def test_batches_resume_at_any_step(mixed, sd):
    pictures = Pictures(mixed, sd.tokenizer, 64, 64, bucketed=True, flip=True, random_crop=True)
    dataset = batches(pictures, 3, seed=5, epochs=3)
    whole = arrays(dataset)
    assert len(dataset) == len(whole) == 3 * steps_per_epoch(pictures, 3)
    assert_equal(arrays(dataset), whole)
    for start in (1, 4, 8, len(whole)):
        assert_equal(arrays(batches(pictures, 3, seed=5, epochs=3, start_step=start)), whole[start:])
    other = arrays(batches(pictures, 3, seed=6, epochs=3))
    assert any(a["tokens"].tolist() != b["tokens"].tolist() for a, b in zip(whole, other))


def test_another_process_draws_the_same(mixed, sd):
    pictures = Pictures(mixed, None, 64, 64, bucketed=True, flip=True)
    program = (
        "import json, sys; from keras_sd.training.batches import Pictures, draw_epoch\n"
        "from keras_sd.training.examples import read_examples\n"
        "pictures = Pictures(read_examples(sys.argv[1])[0], None, 64, 64, bucketed=True, flip=True)\n"
        "print(json.dumps({k: v.tolist() for k, v in draw_epoch(pictures, 4, 9, 2).items()}))"
    )
    folder = pathlib.Path(mixed[0].image).parents[1]
    result = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, check=True)
    expected = {name: values.tolist() for name, values in draw_epoch(pictures, 4, 9, 2).items()}
    assert json.loads(result.stdout) == expected


def test_every_picture_is_seen_and_a_batch_has_one_bucket(mixed):
    pictures = Pictures(mixed, None, 64, 64, bucketed=True)
    counts = np.bincount(pictures.buckets[1])
    assert len(counts) == 3
    for repeats, size in ((1, 4), (2, 4), (1, 1), (3, 16)):
        draws = draw_epoch(pictures, size, 0, 0, repeats)["example"]
        assert len(draws) == sum(-(-counts * repeats // size)) == steps_per_epoch(pictures, size, repeats)
        assert np.bincount(draws.ravel(), minlength=11).min() >= repeats
        assert all(len({*pictures.buckets[1][row]}) == 1 for row in draws)
    first, second = (draw_epoch(pictures, 4, 0, epoch)["example"].tolist() for epoch in (0, 1))
    assert first != second


def test_bucketed_pictures_have_their_size(mixed, sd):
    pictures = Pictures(mixed, sd.tokenizer, 64, 64, bucketed=True)
    shapes = {batch["image"].shape[1:3] for batch in arrays(batches(pictures, 2))}
    assert shapes == {tuple(size) for size in pictures.sizes} and len(shapes) == 3


def test_captions_are_chosen_per_epoch(mixed):
    pictures = Pictures(mixed, None, 64, 64)
    seen = {i: set() for i in range(11)}
    for epoch in range(12):
        draws = draw_epoch(pictures, 11, 0, epoch)
        for example, caption in zip(draws["example"].ravel(), draws["caption"].ravel()):
            seen[example].add(caption)
    assert all(seen[i] == ({0, 1} if i % 2 else {0}) for i in range(11))


@pytest.mark.parametrize("bucketed", [False, True])
def test_two_workers_see_what_one_sees(mixed, sd, bucketed):
    pictures = Pictures(mixed, sd.tokenizer, 64, 64, bucketed=bucketed, flip=True)
    whole = arrays(batches(pictures, 4, seed=1, epochs=2))
    parts = [arrays(batches(pictures, 2, seed=1, epochs=2, num_shards=2, shard_index=i)) for i in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts)]
    assert_equal(joined, whole)


def test_prior_preservation_pairs_each_picture_of_the_subject(tmp_path, sd):
    subject = read_examples(write_set(tmp_path / "subject", 3))[0]
    prior = read_examples(write_set(tmp_path / "prior", 8), prior=True)[0]
    pictures = Pictures(subject + prior, sd.tokenizer, 64, 64)
    assert steps_per_epoch(pictures, 2) == 3 and steps_per_epoch(pictures, 2, num_shards=2) == 2
    for batch in batches(pictures, 4, epochs=2):
        assert np.asarray(batch["prior"]).tolist() == [False, True] * 2
    draws = np.concatenate([draw_epoch(pictures, 4, 0, epoch)["example"] for epoch in range(4)])
    assert {*draws[:, ::2].ravel()} == {0, 1, 2} and {*draws[:, 1::2].ravel()} == {*range(3, 11)}
    for wrong, message in (
        (lambda: Pictures(prior, None, 64, 64), "All examples are prior-preservation"),
        (lambda: Pictures(subject + prior, None, 64, 64, bucketed=True), "are not bucketed"),
        (lambda: batches(pictures, 3), "batch_size must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_bad_arguments_of_batches(mixed):
    pictures = Pictures(mixed, None, 64, 64)
    for arguments, message in (
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"start_step": 4}, "start_step must be at most 3"),
        ({"num_shards": 2, "shard_index": 2}, "shard_index must be below num_shards = 2; got 2"),
        ({"repeats": 0}, "repeats must be"),
    ):
        with pytest.raises(ValueError, match=message):
            batches(pictures, **{"batch_size": 4, **arguments})
    with pytest.raises(ValueError, match="examples is empty"):
        Pictures([], None, 64, 64)
    with pytest.raises(ValueError, match="height must be a positive multiple of 8; got 20"):
        Pictures(mixed, None, 20, 64)


# === Augmentation ===


def test_flip_and_crop_are_exact(mixed, sd):
    pictures = Pictures(mixed, sd.tokenizer, 64, 64, bucketed=True, flip=True, random_crop=True)
    draws = draw_epoch(pictures, 3, 2, 0)
    turned = []
    for step, batch in enumerate(arrays(batches(pictures, 3, seed=2))):
        for row, found in enumerate(batch["image"]):
            i, place = draws["example"][step, row], draws["place"][step, row]
            scaled, (height, width) = pictures.picture(i), pictures.sizes[i]
            top, left = (int(np.float32(p) * (a - b + 1)) for p, a, b in zip(place, scaled.shape, (height, width)))
            expected = scaled[top : top + height, left : left + width]
            turned.append(draws["turn"][step, row])
            expected = expected[:, ::-1] if turned[-1] else expected
            np.testing.assert_allclose(found, expected / 127.5 - 1, atol=1e-6)
    assert {*turned} == {True, False}


# === Latent cache ===


@pytest.fixture(scope="module")
def cached(mixed, sd, tmp_path_factory):
    """(pictures, folder, cache)"""
    pictures = Pictures(mixed, sd.tokenizer, 64, 64, bucketed=True, flip=True)
    folder = tmp_path_factory.mktemp("cache")
    return pictures, folder, build_latent_cache(folder, pictures, sd, items_per_file=8, batch_size=3)


def test_cached_batches_are_the_encoded_ones(cached, sd):
    pictures, _, cache = cached
    plain, encoded = (arrays(batches(source, 3, seed=4, epochs=2)) for source in (pictures, cache))
    moments = sd.image_encoder.moments
    assert len(plain) == len(encoded)
    for one, other in zip(plain, encoded):
        mean, log_variance = (np.asarray(x) for x in moments.predict_on_batch(one["image"]))
        scale = sd.image_encoder.scaling_factor
        context = np.asarray(sd.text_encoder.predict_on_batch({"tokens": one["tokens"]}))
        expected = {"mean": scale * mean, "std": scale * np.exp(log_variance / 2), "context": context}
        assert other.keys() == expected.keys()
        for name in expected:
            assert other[name].dtype == "float32"
            np.testing.assert_allclose(other[name], expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.unconditional_context, sd.encode_text(""), atol=1e-5)


def test_cached_batches_resume_and_shard(cached):
    cache = cached[2]
    whole = arrays(batches(cache, 4, seed=4, epochs=2))
    assert_equal(arrays(batches(cache, 4, seed=4, epochs=2, start_step=3)), whole[3:])
    parts = [arrays(batches(cache, 2, seed=4, epochs=2, num_shards=2, shard_index=i)) for i in range(2)]
    assert_equal([{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts)], whole)


def writes(monkeypatch):
    """Names of the files that are written from here on."""
    written, write = [], latent_cache._write
    monkeypatch.setattr(
        latent_cache, "_write", lambda file, *args: (written.append(file.path.name), write(file, *args))
    )
    return written


def test_cache_is_kept_and_invalidated_file_by_file(mixed, sd, tmp_path, monkeypatch):
    import dataclasses
    import shutil

    folder = tmp_path / "set"
    shutil.copytree(pathlib.Path(mixed[0].image).parents[1], folder)
    written = writes(monkeypatch)

    def build(model=sd, **kwargs):
        written.clear()
        pictures = Pictures(read_examples(folder)[0], sd.tokenizer, **{"height": 64, "width": 64, **kwargs})
        build_latent_cache(tmp_path / "cache", pictures, model, items_per_file=4)
        assert len(list((tmp_path / "cache").iterdir())) == 3 * (2 if kwargs.get("flip") else 1) + 5
        return sorted(name.rpartition("-")[0] for name in written)

    moments, contexts = [f"moments-{i:05d}" for i in range(3)], [f"contexts-{i:05d}" for i in range(5)]
    assert build() == contexts + moments
    assert build() == []
    os.utime(folder / "images" / "0.png")
    assert build() == []  # the content counts
    picture(99, 80, 90).save(folder / "images" / "5.png")
    assert build() == moments[1:2]
    table = (folder / "data.csv").read_text()
    (folder / "data.csv").write_text(table.replace("drawing 10", "apple 10"))
    assert build() == contexts[-1:]
    assert build(height=56) == moments
    assert build(height=56, flip=True) == [f"moments-{i:05d}" for i in range(6)]
    build()

    other = StableDiffusion.from_preset("emoji")
    variable = other.text_encoder.trainable_variables[-1]
    variable.assign_add(np.full(variable.shape, 1e-3, "float32"))
    assert build(other) == contexts
    assert dataclasses.replace(mixed[0], prior=True) != mixed[0]


def test_cache_of_latents_alone_gives_tokens(cached, sd, tmp_path):
    cache = build_latent_cache(tmp_path, cached[0], sd, contexts=False)
    assert cache.unconditional_context is None
    plain, encoded = (arrays(batches(source, 3, seed=4)) for source in (cached[0], cache))
    for one, other in zip(plain, encoded):
        assert set(other) == {"mean", "std", "tokens"}
        np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_cut_off_file_is_computed_again(cached, sd, tmp_path):
    import shutil

    pictures, folder, cache = cached
    shutil.copytree(folder, tmp_path / "cache")
    broken = sorted((tmp_path / "cache").iterdir())[1]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-5])
    build_latent_cache(tmp_path / "cache", pictures, sd, items_per_file=8, batch_size=3)
    assert broken.read_bytes() == whole


def test_full_disk_keeps_what_is_complete(cached, sd, tmp_path, monkeypatch):
    import tensorflow as tf

    pictures, folder, _ = cached
    real = tf.io.TFRecordWriter

    class Full(real):
        def write(self, record):
            if "moments-00001" in self.path:
                raise tf.errors.ResourceExhaustedError(None, None, "somewhere; No space left on device")
            super().write(record)

        def __init__(self, path):
            super().__init__(path)
            self.path = path

    monkeypatch.setattr(tf.io, "TFRecordWriter", Full)
    with pytest.raises(OSError, match=r"Cannot write '.*moments-00001.*: .*No space left on device") as error:
        build_latent_cache(tmp_path, pictures, sd, items_per_file=8, batch_size=3)
    assert error.value.errno == errno.ENOSPC
    (complete,) = tmp_path.iterdir()
    assert complete.read_bytes() == (folder / complete.name).read_bytes()


def test_killed_build_goes_on(cached, sd, tmp_path, monkeypatch):
    pictures, folder, _ = cached
    source = pathlib.Path(pictures.examples[0].image).parents[1]
    program = (
        "import os, signal, sys; import keras_sd.training.latent_cache as cache\n"
        "from keras_sd import StableDiffusion; from keras_sd.training.batches import Pictures\n"
        "from keras_sd.training.examples import read_examples\n"
        "sd = StableDiffusion.from_preset('emoji')\n"
        "pictures = Pictures(read_examples(sys.argv[1])[0], sd.tokenizer, 64, 64, bucketed=True, flip=True)\n"
        "to_record, count = cache._to_record, iter(range(11))\n"
        "def killed(row):\n"
        "    if next(count, None) is None: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return to_record(row)\n"
        "cache._to_record = killed\n"
        "cache.build_latent_cache(sys.argv[2], pictures, sd, items_per_file=8, batch_size=3)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, source, tmp_path], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in left if not name.startswith(".")] == [left[-1]] and "moments-00000" in left[-1]
    os.utime(tmp_path / left[0], (0, 0))  # of a run long ago
    written = writes(monkeypatch)
    build_latent_cache(tmp_path, pictures, sd, items_per_file=8, batch_size=3)
    assert left[-1] not in written
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_cache_refuses_random_cuts(mixed, sd, tmp_path):
    with pytest.raises(ValueError, match="random_crop must be False"):
        build_latent_cache(tmp_path, Pictures(mixed, sd.tokenizer, 64, 64, random_crop=True), sd)


# === TensorFlow Datasets ===


@pytest.fixture
def odd_examples(tmp_path):
    """Of kinds that TensorFlow would decode otherwise, or not at all."""
    folder = tmp_path / "odd"
    folder.mkdir()
    upside = Image.Exif()
    upside[0x0112] = 6
    picture(0, 40, 72).save(folder / "turned.jpg", exif=upside)
    picture(1, 40, 72).save(folder / "plain.jpg")
    picture(2).convert("L").save(folder / "grey.png")
    Image.fromarray(np.full((32, 32, 4), (200, 0, 0, 99), "uint8")).save(folder / "transparent.png")
    picture(3).save(folder / "picture.webp", lossless=True)
    for file in list(folder.iterdir()):
        file.with_suffix(".txt").write_text(f"a {file.stem}\nthe {file.stem}")
    return read_examples(folder)[0]


def test_tfds_data_set_has_the_examples(odd_examples, tmp_path):
    from keras_sd.training.dataset import CaptionedImages

    builder = CaptionedImages(odd_examples, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    stored = {one.name: one for one in builder.examples()}
    assert stored.keys() == {one.name for one in odd_examples} and len(stored) == 5
    rows = {row["name"].decode(): row for row in builder.as_data_source("train")}
    for example in odd_examples:
        other = stored[example.name]
        assert (other.captions, other.height, other.width) == (example.captions, example.height, example.width)
        np.testing.assert_array_equal(np.asarray(other.read()), np.asarray(example.read()))
        np.testing.assert_array_equal(rows[example.name]["image"], np.asarray(example.read()))


def test_tfds_data_set_of_a_folder_as_tfrecord(tmp_path):
    from keras_sd.training.dataset import CaptionedImages

    folder = write_set(tmp_path / "set", 3)
    builder = CaptionedImages(folder, data_dir=tmp_path / "tfds", file_format="tfrecord")
    builder.download_and_prepare()
    rows = {row["name"].numpy().decode(): row for row in builder.as_dataset(split="train")}
    for i in range(3):
        np.testing.assert_array_equal(rows[f"images/{i}.png"]["image"], np.asarray(picture(i)))
    assert rows["images/1.png"]["captions"].numpy().tolist() == [b"drawing 1", b"apple, 1"]
    same = CaptionedImages(folder, data_dir=tmp_path / "tfds", file_format="tfrecord")
    assert same.info.splits["train"].num_examples == 3  # there already
    picture(9).save(folder / "images" / "1.png")
    assert CaptionedImages(folder, data_dir=tmp_path / "tfds").builder_config.name != builder.builder_config.name


def test_stored_examples_train_and_cache(tmp_path, sd):
    from keras_sd.training.dataset import CaptionedImages

    examples = read_examples(write_set(tmp_path / "set", 4))[0]
    builder = CaptionedImages(examples, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    pictures = Pictures(builder.examples(), sd.tokenizer, 64, 64)
    assert len(arrays(batches(pictures, 2))) == 2
    cache = build_latent_cache(tmp_path / "cache", pictures, sd)
    again = Pictures(builder.examples(), sd.tokenizer, 64, 64)
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    build_latent_cache(tmp_path / "cache", again, sd)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == names and len(names) == 2
    assert arrays(batches(cache, 2))[0]["mean"].shape == (2, 8, 8, 4)


beam = pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is an extra")


@beam
def test_beam_writes_the_same_cache(cached, sd, tmp_path):
    from apache_beam.options.pipeline_options import PipelineOptions

    pictures, folder, cache = cached
    options = PipelineOptions(["--runner=DirectRunner"])
    made = build_latent_cache(tmp_path, pictures, sd, items_per_file=8, batch_size=3, beam_options=options)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    for one, other in zip(arrays(batches(made, 3)), arrays(batches(cache, 3))):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-5)


@beam
def test_beam_writes_the_tfds_data_set(mixed, tmp_path):
    import tensorflow_datasets as tfds
    from apache_beam.options.pipeline_options import PipelineOptions

    from keras_sd.training.dataset import CaptionedImages

    builder = CaptionedImages(mixed, beam=True, data_dir=tmp_path)
    config = tfds.download.DownloadConfig(beam_options=PipelineOptions(["--runner=DirectRunner"]))
    builder.download_and_prepare(download_config=config)
    assert {one.name for one in builder.examples()} == {one.name for one in mixed}


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Apache Beam is there")
def test_without_beam_the_error_names_it(cached, sd, tmp_path):
    with pytest.raises(ImportError, match="pip install apache-beam"):
        build_latent_cache(tmp_path, cached[0], sd, beam_options=object())
