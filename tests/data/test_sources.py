"""Records from files of every kind, and what is said about files and records that cannot be read."""

import json
import subprocess
import sys

import pytest
from etils import epath

from jaxmethods.data import open_records, records_in_memory

ROWS = [{"prompt": f"question {i}", "answer": "é" * i or "none"} for i in range(7)]


def write_lines(path, rows=ROWS, end="\n"):
    path.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    return str(path)


def saved(folder, kind):
    """ROWS in a file of this kind; the number of the first row as people count it."""
    path = folder / f"rows.{kind}"
    if kind in ("jsonl", "ndjson-like.json"):
        return write_lines(path)
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
        return str(path)
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=3)
    elif kind == "stream.arrow":
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif kind == "file.arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)
    return str(path)


KINDS = ["jsonl", "json", "ndjson-like.json", "parquet", "stream.arrow", "file.arrow", "datasets"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_formats_give_the_same_records(tmp_path, kind):
    path = saved(tmp_path, kind)
    records = open_records(path)
    assert len(records) == len(ROWS)
    assert list(records) == ROWS
    assert [records[i] for i in range(-7, 7)] == ROWS * 2  # backwards too
    unit = "line" if kind in ("jsonl", "ndjson-like.json") else "row"
    assert str(records.place(2)) == f"{path}, {unit} 3"
    assert [place for place, _ in records.placed()] == [records.place(i) for i in range(7)]
    with pytest.raises(IndexError, match="there is none at index 7"):
        records[7]


def test_rows_in_memory():
    records = records_in_memory(ROWS)
    assert list(records) == ROWS and records[-1] is ROWS[-1]
    assert str(records.place(0)) == "rows given in memory, row 1"
    with pytest.raises(ValueError, match=r"rows given in memory, row 2: expected an object .* found text"):
        list(records_in_memory([{}, "text"]))
    with pytest.raises(ValueError, match="empty list"):
        records_in_memory([])


def test_json_lines_as_they_come(tmp_path):
    """Byte order mark, Windows line ends, blank lines, no last line end: places still count the file's lines."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \r\n{"a": "\xe2\x80\xa8"}\r\n{"a": 3}')
    records = open_records(str(path))
    assert [row["a"] for row in records] == [1, "\u2028", 3] == [records[i]["a"] for i in range(3)]
    assert [place.number for place, _ in records.placed()] == [1, 4, 5] == [records.place(i).number for i in range(3)]


def test_a_pattern_joins_files_in_the_order_of_their_names(tmp_path):
    write_lines(tmp_path / "part-2.jsonl", ROWS[3:])
    write_lines(tmp_path / "part-1.jsonl", ROWS[:3])
    records = open_records(str(tmp_path / "part-*.jsonl"))
    assert list(records) == ROWS == [records[i] for i in range(7)]
    assert str(records.place(3)) == f"{tmp_path}/part-2.jsonl, line 1"
    assert [place for place, _ in records.placed()] == [records.place(i) for i in range(7)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', r"line 2: not a JSON object on one line \(Expecting .* at column"),
        (b"[1]", "line 2: expected a JSON object with named fields, found a list"),
        (b'"x"', "line 2: expected a JSON object with named fields, found text"),
        (b'{"a": "\xff"}', "line 2: not UTF-8 text"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n' + line + b'\n{"a": 2}\n')
    records = open_records(str(path))
    with pytest.raises(ValueError, match=f"{path}, {message}"):
        list(records)
    with pytest.raises(ValueError, match=f"{path}, {message}"):
        records[1]
    assert records[2] == {"a": 2}


def test_files_that_hold_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    (tmp_path / "a.json").write_text("[]")
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(ValueError, match=f"{name} holds no rows"):
            list(open_records(str(tmp_path / name)))
    with pytest.raises(ValueError, match=r"a.jsonl holds no rows"):
        len(open_records(str(tmp_path / "a.jsonl")))


def test_a_missing_file_suggests_its_neighbours(tmp_path):
    write_lines(tmp_path / "train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"trian.jsonl does not exist. Did you mean .*/train.jsonl\?"):
        open_records(str(tmp_path / "trian.jsonl"))
    with pytest.raises(FileNotFoundError, match="Nor does its folder"):
        open_records(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"no file matches .*part-\*.jsonl"):
        open_records(str(tmp_path / "part-*.jsonl"))


def test_what_is_no_data_is_said(tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"unknown format '.csv'; readable are .jsonl"):
        open_records(str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=r"is a folder, but not one saved by datasets.save_to_disk \(it holds a.csv\)"):
        open_records(str(tmp_path))
    (tmp_path / "a.json").write_text('[{"a": 1},\n{"a": }]')
    with pytest.raises(ValueError, match=r"a.json, line 2: not a JSON list"):
        open_records(str(tmp_path / "a.json"))
    pytest.importorskip("pyarrow")
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"not arrow at all, whatever its name")
        with pytest.raises(ValueError, match=f"{name}: pyarrow cannot read it"):
            open_records(str(tmp_path / name))


def test_a_folder_of_splits_asks_for_one(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_list(ROWS) for name in ("test", "train")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"holds several splits \(test, train\); name one, for example .*both/test"):
        open_records(str(tmp_path / "both"))
    assert list(open_records(str(tmp_path / "both" / "train"))) == ROWS


def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path, monkeypatch):
    path, folder = saved(tmp_path, "parquet"), saved(tmp_path, "datasets")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs pyarrow; pip install jaxmethods\[data\]"):
        open_records(path)
    with pytest.raises(ImportError, match=r"needs datasets; pip install jaxmethods\[data\]"):
        open_records(folder)


def test_paths_of_buckets():
    """gs:// paths through etils and fsspec, on fsspec's file system in memory in place of Google's."""
    fsspec, pa = pytest.importorskip("fsspec"), pytest.importorskip("pyarrow")
    memory = pytest.importorskip("fsspec.implementations.memory")

    class Bucket(memory.MemoryFileSystem):
        protocol = ("gs", "gcs")

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("gs://", "memory://"))

    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    bucket = epath.Path("gs://bucket")
    bucket.mkdir(parents=True, exist_ok=True)
    (bucket / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    table = pa.Table.from_pylist(ROWS)
    with (bucket / "rows.parquet").open("wb") as file:
        pytest.importorskip("pyarrow.parquet").write_table(table, file)
    with (bucket / "rows.arrow").open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.jsonl", "rows.parquet", "rows.arrow", "*.jsonl"):
        records = open_records(f"gs://bucket/{name}")
        assert list(records) == ROWS and records[5] == ROWS[5]
    with pytest.raises(FileNotFoundError, match=r"Did you mean gs://bucket/rows.jsonl"):
        open_records("gs://bucket/row.jsonl")


def test_importing_the_room_is_cheap():
    heavy = ("torch", "transformers", "datasets", "pyarrow", "tensorflow")
    code = f"import sys, jaxmethods.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
