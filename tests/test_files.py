"""Files appear whole or not at all; JSON that is not an object is one line."""

import pytest

from errors import UserError
from files import AppendedFile, publish, read_json, replacing, write_json, write_text
from tests.full_disk import small_files


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole(tmp_path, durable):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": 1}, durable=durable)
    write_json(path, {"a": 2}, durable=durable)
    assert read_json(path) == {"a": 2}
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "directory"
    for name in ("old", "new"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "newer").touch()
        raise ZeroDivisionError
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_where_nothing_can_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", tmp_path / "file" / "further" / "below"):
        with pytest.raises(UserError, match="below: cannot write: "):
            write_text(path, "")


def test_a_record_is_appended_whole_or_not_at_all(tmp_path):
    file = AppendedFile(tmp_path / "new" / "log")
    file.append(b"first\n")
    with small_files(10), pytest.raises(UserError, match="log: cannot write: File too large"):
        file.append(b"second\n")
    assert file.path.read_bytes() == b"first\n"
    file.append(b"third\n")
    file.close()
    again = AppendedFile(file.path)
    again.append(b"fourth\n")
    again.close()
    assert file.path.read_bytes() == b"first\nthird\nfourth\n"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="log: cannot write: "):
        AppendedFile(tmp_path / "file" / "log")


def test_publish_renames(tmp_path):
    (tmp_path / "temporary").write_text("x")
    publish(tmp_path / "temporary", tmp_path / "name")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("name", "x")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "x.json: no such file"),
        ("{", r"x.json: cannot be read as JSON \("),
        ("[" * 100_000, r"x.json: cannot be read as JSON \("),
        ("[1]", "x.json: must be a JSON object, not a list"),
    ],
)
def test_what_is_no_json_object_is_one_line(tmp_path, text, words):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)
