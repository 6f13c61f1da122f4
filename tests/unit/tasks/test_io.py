"""`mmhop/1` on disk: what is written is what is read, and what is broken is named."""

import dataclasses
import errno
import json
import os
import sys

import pytest
from made import comparable, picture, sample

from mmroute.errors import ConfigError, InputError, MissingExtra
from mmroute.tasks import _io, _parquet, _pictures
from mmroute.tasks._pictures import open_image
from mmroute.tasks._rows import SCHEMA


@pytest.fixture
def samples():
    text_only = sample(7, images=[], prompt_images=[], hops=[], split="val", group="")
    return [*(sample(i) for i in range(3)), text_only]


@pytest.fixture
def folder(tmp_path, samples):
    _io.write(samples, tmp_path / "data", "jsonl")
    return tmp_path / "data"


def _lines(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def _rewrite(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_what_is_written_is_read_back(tmp_path, samples, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    assert _io.write(iter(samples), tmp_path / "data", format) == 4
    assert [comparable(s) for s in _io.read(tmp_path / "data")] == [comparable(s) for s in samples]


def test_parquet_to_jsonl_to_parquet_gives_the_same_bytes(tmp_path, samples):
    pytest.importorskip("pyarrow")
    _io.write(samples, tmp_path / "a", "parquet")
    _io.write(_io.read(tmp_path / "a"), tmp_path / "b", "jsonl")
    _io.write(_io.read(tmp_path / "b"), tmp_path / "c", "parquet")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["test-00000-of-00001.parquet", "val-00000-of-00001.parquet"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_every_struct_has_the_same_keys_and_nothing_is_null(folder, tmp_path, samples, format):
    if format == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        _io.write(samples, tmp_path / "p", "parquet")
        rows = [r for f in sorted((tmp_path / "p").glob("*.parquet")) for r in pq.read_table(f).to_pylist()]
    else:
        rows = _lines(folder)

    def check(value):
        assert value is not None
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner)

    for row in rows:
        check(row)
        assert row.keys() == rows[0].keys()
        assert row["difficulty"].keys() == rows[0]["difficulty"].keys()
        assert all(hop.keys() == rows[0]["hops"][0].keys() for hop in row["hops"])
        assert isinstance(json.loads(row["meta"]), dict)


def test_datasets_loads_both_formats_with_pictures(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    items = [sample(i) for i in range(3)]
    for format, builder in (("parquet", "parquet"), ("jsonl", "imagefolder")):
        _io.write(items, tmp_path / format, format)
        loaded = datasets.load_dataset(builder, data_dir=str(tmp_path / format), cache_dir=str(tmp_path / "cache"))
        (rows,) = loaded.values()
        assert isinstance(rows.features["images"].feature, datasets.Image)
        assert [r["id"] for r in rows] == [s.id for s in items]
        assert rows[1]["images"][1].tobytes() == items[1].images[1].tobytes()
        assert rows[2]["hops"][0]["relevant"] == [9, 10]
    # An imagefolder has the one split train for `datasets`; the name of a shard carries its own.
    assert loaded.keys() == {"train"}
    by_name = datasets.load_dataset(str(tmp_path / "parquet"), cache_dir=str(tmp_path / "cache"))
    assert {k: len(v) for k, v in by_name.items()} == {"test": 3}


def test_the_arrow_metadata_is_what_datasets_itself_would_write(tmp_path):
    datasets = pytest.importorskip("datasets")
    pq = pytest.importorskip("pyarrow.parquet")
    _io.write([sample()], tmp_path / "data", "parquet")
    schema = pq.read_schema(tmp_path / "data" / "test-00000-of-00001.parquet")
    features = datasets.Features.from_arrow_schema(schema)
    assert features.arrow_schema.equals(schema, check_metadata=False)
    assert features["hops"].feature["boxes"] == datasets.List(datasets.List(datasets.Value("float32")))
    assert features["images"] == datasets.List(datasets.Image())


def test_shards_and_row_groups_stay_small(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(_parquet, "SHARD_BYTES", 1000)
    monkeypatch.setattr(_parquet, "GROUP_ROWS", 2)
    items = [sample(i) for i in range(11)]
    _io.write(items, tmp_path / "data", "parquet")
    files = sorted((tmp_path / "data").iterdir())
    assert len(files) > 2
    assert files[-1].name == f"test-{len(files) - 1:05d}-of-{len(files):05d}.parquet"
    groups = [pq.ParquetFile(f).metadata for f in files]
    assert all(g.row_group(i).num_rows <= 2 for g in groups for i in range(g.num_row_groups))
    assert [s.id for s in _io.read(tmp_path / "data")] == [s.id for s in items]
    files[1].unlink()
    with pytest.raises(InputError, match=f"shard {files[1].name} is missing"):
        list(_io.read(tmp_path / "data"))


def test_jsonl_images_are_opened_only_when_asked_for(folder):
    first = next(_io.read(folder))
    assert first.images[0] == folder.resolve() / "images" / "000000_0.png"
    assert open_image(first.images[0]).tobytes() == picture(0).tobytes()


def test_equal_samples_give_equal_bytes_whatever_the_order_of_their_keys(tmp_path):
    one = sample(meta={"a": 1, "b": {"c": 2, "d": 3}})
    two = sample(meta={"b": {"d": 3, "c": 2}, "a": 1})
    for name, item in (("one", one), ("two", two)):
        _io.write([item], tmp_path / name, "jsonl")
    assert (tmp_path / "one/metadata.jsonl").read_bytes() == (tmp_path / "two/metadata.jsonl").read_bytes()


def test_a_png_file_keeps_its_bytes(folder, tmp_path):
    path = folder / "images" / "000000_0.png"
    _io.write(_io.read(folder), tmp_path / "copy", "jsonl")
    assert (tmp_path / "copy" / "images" / "000000_0.png").read_bytes() == path.read_bytes()


# ---------------------------------------------------------------------- what can go wrong


def _broken(folder, change):
    rows = _lines(folder)
    change(rows[1])
    _rewrite(folder, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("answer"), "metadata.jsonl:2: no field 'answer'"),
        (lambda r: r["hops"][0].pop("image"), "metadata.jsonl:2: no field 'hops\\[0\\].image'"),
        (lambda r: r.update(extra=1), "metadata.jsonl:2: unknown field 'extra'"),
        (lambda r: r.update(answer_index="1"), "metadata.jsonl:2: answer_index: int32 is expected, given '1'"),
        (lambda r: r.update(answer_index=True), "answer_index: int32 is expected, given True"),
        (lambda r: r["hops"][1].update(boxes=[[0, "x"]]), "hops\\[1\\].boxes\\[0\\]\\[1\\]: float32 is expected"),
        (lambda r: r.update(hops={}), "metadata.jsonl:2: hops: a list is expected"),
        (lambda r: r.update(difficulty=None), "difficulty: a mapping is expected"),
        (lambda r: r.update(schema="mmhop/9"), "metadata.jsonl:2: schema is 'mmhop/9', this version reads 'mmhop/1'"),
        (lambda r: r.update(meta="{"), "metadata.jsonl:2: meta is not JSON"),
        (lambda r: r.update(prompt_images=[2]), "prompt_images is 2, but the row has 2 images"),
        (lambda r: r["hops"][0].update(image=5), "hops\\[0\\].image is 5, but the row has 2 images"),
        (lambda r: r.update(file_names="x.png"), "metadata.jsonl:2: file_names: a list of paths is expected"),
        (lambda r: r.update(file_names=["../x.png"]), "image path '../x.png' leaves the folder"),
        (lambda r: r.update(file_names=["images/../../x.png"]), "leaves the folder"),
        (lambda r: r.update(file_names=["/etc/hosts"]), "image path '/etc/hosts' leaves the folder"),
        (lambda r: r.update(file_names=["images/gone.png"]), "metadata.jsonl:2: image 'images/gone.png' is missing"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(folder, change, message):
    _broken(folder, change)
    with pytest.raises(InputError, match=message):
        list(_io.read(folder))


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    picture(1).save(tmp_path / "secret.png")
    target = folder / "images" / "000001_0.png"
    target.unlink()
    target.symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match="leaves the folder"):
        list(_io.read(folder))


@pytest.mark.parametrize("line", [b'{"schema": "mmhop/1"', b"[1]", b"\xff\xfe", b""])
def test_a_line_that_is_no_json_object_is_named(folder, line):
    path = folder / "metadata.jsonl"
    first, *rest = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, *rest]) + b"\n")
    reader = _io.read(folder)
    next(reader)
    with pytest.raises(InputError, match=r"metadata.jsonl:2: "):
        next(reader)


def test_a_picture_that_is_none_is_named(folder, tmp_path):
    (folder / "images" / "000001_1.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"000001_1.png: not a readable image"):
        _io.write(_io.read(folder), tmp_path / "copy", "jsonl")
    assert not (tmp_path / "copy").exists()


def test_folders_that_are_not_ours_say_so(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        _io.read(tmp_path / "gone")
    with pytest.raises(InputError, match=r"has neither metadata.jsonl, .*parquet nor specs.jsonl"):
        _io.read(tmp_path)


def test_a_broken_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"x.parquet: not a readable Parquet file"):
        list(_io.read(tmp_path))


def test_a_foreign_parquet_file_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x.parquet:0: "):
        list(_io.read(tmp_path))


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"parquet or jsonl .*given 'csv'"):
        _io.write([sample()], tmp_path / "data", "csv")


def test_a_directory_that_holds_something_is_left_alone(folder, samples):
    before = (folder / "metadata.jsonl").read_bytes()
    with pytest.raises(InputError, match="is not empty"):
        _io.write(samples, folder, "jsonl")
    with pytest.raises(InputError, match="is a file"):
        _io.write(samples, folder / "metadata.jsonl", "jsonl")
    assert (folder / "metadata.jsonl").read_bytes() == before


def test_an_empty_directory_may_be_filled_and_no_samples_leave_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    _io.write([sample()], tmp_path / "empty", "jsonl")
    with pytest.raises(InputError, match="no samples"):
        _io.write([], tmp_path / "none", "jsonl")
    assert os.listdir(tmp_path) == ["empty"]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    real, calls = _pictures.png_bytes, []

    def full(image):
        calls.append(image)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(image)

    monkeypatch.setattr(_io if format == "jsonl" else _parquet, "png_bytes", full)
    with pytest.raises(InputError, match="the disk is full; nothing was kept"):
        _io.write((sample(i) for i in range(5)), tmp_path / "data", format)
    assert os.listdir(tmp_path) == []


def test_a_parquet_file_that_cannot_be_closed_does_not_hide_the_full_disk(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    class FullDisk:
        def __init__(self, *args):
            pass

        def write_table(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            raise pa.ArrowInvalid("Operation on closed file")

    monkeypatch.setattr(pq, "ParquetWriter", FullDisk)
    with pytest.raises(InputError, match="the disk is full; nothing was kept"):
        _io.write([sample()], tmp_path / "data", "parquet")
    assert os.listdir(tmp_path) == []


def test_an_interrupted_run_leaves_nothing_in_place(tmp_path):
    def stopped():
        yield sample()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _io.write(stopped(), tmp_path / "data", "jsonl")
    assert os.listdir(tmp_path) == []


def test_a_difficulty_the_schema_does_not_know_is_refused(tmp_path):
    with pytest.raises(InputError, match="difficulty has no field colour"):
        _io.write([sample(difficulty={"level": "easy", "colour": "red"})], tmp_path / "data", "jsonl")


def test_a_split_that_is_no_file_name_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="a split is a plain word"):
        _io.write([sample(split="../x")], tmp_path / "data", "parquet")
    assert os.listdir(tmp_path) == []


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r'pip install "mmroute\[data\]"'):
        _io.write([sample()], tmp_path / "data", "parquet")
    assert _io.write([sample()], tmp_path / "data", "jsonl") == 1


def test_missing_difficulty_is_unknown_not_null(tmp_path):
    _io.write([sample(difficulty={})], tmp_path / "data", "jsonl")
    (read,) = _io.read(tmp_path / "data")
    assert read.difficulty["grid"] == -1
    assert read.difficulty["level"] == ""


def test_the_schema_stands_first_in_every_row(folder):
    assert all(next(iter(row)) == "schema" and row["schema"] == SCHEMA for row in _lines(folder))
    assert {f.name for f in dataclasses.fields(sample())} | {"schema"} == {
        "images" if k == "file_names" else k for k in _lines(folder)[0]
    }
