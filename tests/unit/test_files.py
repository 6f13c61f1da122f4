"""What is written is whole or not there, and nothing is left beside it."""

import pytest

from mmroute.errors import InputError
from mmroute.files import replacing, replacing_folder, write_text


class Killed(BaseException):
    """What a process that is told to go raises."""


def _write_half(opened, write):
    with opened as beside:
        write(beside)
        raise Killed


def test_a_file_takes_its_name_only_when_its_block_ends_well(tmp_path):
    path = tmp_path / "new" / "a.json"
    with replacing(path) as beside:
        assert beside.suffix == ".json"
        beside.write_text("1")
        assert not path.exists()
    assert path.read_text() == "1"
    with pytest.raises(Killed):
        _write_half(replacing(path), lambda beside: beside.write_text("2"))
    assert path.read_text() == "1"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("1")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "1"


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    path = tmp_path / "model"
    for text in ("old", "new"):
        with replacing_folder(path) as beside:
            assert list(beside.iterdir()) == []
            (beside / f"{text}.txt").write_text(text)
    assert [p.name for p in path.iterdir()] == ["new.txt"]
    with pytest.raises(Killed):
        _write_half(replacing_folder(path), lambda beside: (beside / "half.txt").write_text("half"))
    assert [p.name for p in path.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_where_no_file_can_be_is_named(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        write_text(tmp_path, "x")
    with pytest.raises(InputError, match="no folder"):
        write_text(tmp_path / "absent" / "a.txt", "x")
    write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"
