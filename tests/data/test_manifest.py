"""Manifests: formats, and every kind of bad row named with its reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile

from medalign_jax.core.errors import UserError
from medalign_jax.data import tables
from medalign_jax.data.recordings.manifest import (
    ManifestError,
    Problem,
    check,
    problem_table,
    read_manifest,
    write_problems,
)
from medalign_jax.evaluate.embedding_table import read_table as read_embeddings
from tests.data import manifests

ROOT = Path(__file__).resolve().parent.parent.parent


def fatal(problems):
    return {p.row: p.reason for p in problems if p.fatal}


def notes(problems):
    return [p.reason for p in problems if not p.fatal]


def read_text(tmp_path, text, name="m.csv", **options):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(path, **options)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(tmp_path, delimiter, encoding):
    row = {"audio_path": "a.wav", "report": "S1, S2; «clair»\nno murmur", "subject_id": "7",
           "split": "dev", "label": "N", "age": "4"}  # fmt: skip
    path = manifests.write_csv(tmp_path / "m.csv", [row], delimiter=delimiter, encoding=encoding)
    (found,), problems = read_manifest(path, targets=["age"])
    assert problems == []
    assert found.row == 1
    assert found.audio_path == str(tmp_path / "a.wav")
    assert found.report == row["report"]
    assert (found.subject_id, found.split, found.label) == ("7", "valid", "N")
    assert found.targets == {"age": "4"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_excels_first_line_tells_the_separator(tmp_path, delimiter):
    columns, cells = ("audio_path", "report"), ("a.wav", "A murmur, soft; early")
    quoted = [delimiter.join(f'"{cell}"' for cell in line) for line in (columns, cells)]
    path = tmp_path / "m.csv"
    path.write_bytes("\r\n".join([f"sep={delimiter}", *quoted, ""]).encode("utf-8-sig"))
    (row,), _ = read_manifest(path)
    assert (row.row, row.audio_path.rpartition("/")[2], row.report) == (1, *cells)
    path.write_text(f'sep={delimiter}\n{quoted[0]}\n{quoted[1]}\n"a"b\n')
    with pytest.raises(ManifestError, match="line 4: not a CSV file"):
        read_manifest(path)


def test_jsonl_and_parquet_agree_with_csv(tmp_path):
    rows = [
        {"audio_path": "a.wav", "diagnosis": "mitral stenosis", "split": "train", "age": 3},
        {"audio_path": "b.wav", "diagnosis": "normal", "split": "test", "age": None},
    ]
    (tmp_path / "m.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    manifests.write_csv(tmp_path / "m.csv", rows)
    found = [read_manifest(tmp_path / f"m.{s}", ["age"]) for s in ("csv", "jsonl", "parquet")]
    assert found[0] == found[1] == found[2]
    assert [row.targets for row in found[0][0]] == [{"age": "3"}, {}]
    assert found[0][0][0].metadata == {"diagnosis": "mitral stenosis"}
    assert found[0][0][0].report is None


def test_published_column_names_are_known(tmp_path):
    text = "audio_path,Murmur,Systolic murmur timing\na.wav,Present,Holosystolic\n"
    (row,), _ = read_text(tmp_path, text)
    assert row.metadata == {"murmur": "Present", "systolic_murmur_timing": "Holosystolic"}


def test_unused_columns_are_named_and_typos_explained(tmp_path):
    _, problems = read_text(tmp_path, "audio_path,report,seconds,diagnosys\na.wav,x,3,MR\n")
    assert "column 'seconds' is not used; name it in targets to use it" in notes(problems)
    assert any("'diagnosys'" in note and "did you mean 'diagnosis'" in note
               for note in notes(problems))  # fmt: skip


@pytest.mark.parametrize(
    "missing", ["", "nan", "NaN", "None", "  ", "NA", "N/A", "n/a", "null", "<NA>", "#N/A"]
)
def test_missing_values(tmp_path, missing):
    text = (
        f"audio_path,report,label,split,age,subject_id\na.wav,{missing},N,train,1,s\n"
        f"b.wav,heard,{missing},train,{missing},{missing}\n{missing},heard,N,train,1,s\n"
        f"c.wav,heard,N,{missing},1,s\n"
    )
    rows, problems = read_text(tmp_path, text, targets=["age"])
    assert fatal(problems) == {
        1: "no report, and no metadata to make one from",
        3: "no audio_path",
        4: "no split; write one of train, valid, test",
    }
    assert rows[0].label is None
    assert rows[0].targets == {}
    assert rows[0].subject_id == "b.wav"  # of its own, not shared with others that have none
    assert "no subject_id" in notes(problems)[0]


def test_none_in_words_is_neither_a_report_nor_a_person(tmp_path):
    """But an answer where there are findings: crackles, and labels of which there are none."""
    text = (
        "audio_path,report,subject_id,label,found,crackles,murmur\n"
        "a.wav,none,none,none,none,none,none\nb.wav,heard,s,x,None,None,None\n"
    )
    rows, problems = read_text(tmp_path, text, targets=["found"])
    assert [(r.subject_id, r.label, r.report) for r in rows] == [
        ("a.wav", "none", None), ("s", "x", "heard")
    ]  # fmt: skip
    assert [r.targets for r in rows] == [{"found": "none"}, {}]
    assert [r.metadata for r in rows] == [{"crackles": "none"}, {}]
    assert "column 'report': 'none' (1 rows) counts as a missing value" in notes(problems)
    assert "column 'crackles': 'None' (1 rows) counts as a missing value" in notes(problems)
    assert not any("column 'label'" in note for note in notes(problems))


def test_headers_are_read_whatever_their_case(tmp_path):
    text = "Audio_Path;Split;Subject ID;LABEL;Report\na.wav;Test;s1;x;heard\n"
    (row,), problems = read_text(tmp_path, text, targets=["LABEL"])
    assert (row.split, row.subject_id, row.label, row.report) == ("test", "s1", "x", "heard")
    assert row.targets == {"LABEL": "x"}
    assert notes(problems) == []
    jsonl = '{"Audio_Path": "a.wav", "Split": "dev", "report": "x", "subject_id": "s"}'
    (row,), _ = read_text(tmp_path, jsonl, "m.jsonl")
    assert (row.split, row.subject_id) == ("valid", "s")
    with pytest.raises(ManifestError, match="the columns Split, split all mean 'split'; keep one"):
        read_text(tmp_path, "audio_path,report,Split,split\na.wav,x,train,test\n")


def test_cells_that_nobody_reads_condemn_no_row(tmp_path):
    """A date, a list and a byte that is not text; of a column that is read they do."""
    import datetime

    day = datetime.date(2026, 1, 2)
    table = pa.Table.from_pylist(
        [{"audio_path": "a.wav", "report": "x", "day": day, "peaks": [1, 2], "by": {"n": 1}},
         {"audio_path": "b.wav", "report": "y", "day": None, "peaks": None, "by": None}]
    )  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    rows, problems = read_manifest(tmp_path / "m.parquet")
    assert [row.report for row in rows] == ["x", "y"] and fatal(problems) == {}
    rows, problems = read_manifest(tmp_path / "m.parquet", targets=["day"])
    assert [row.row for row in rows] == [2]
    assert fatal(problems) == {1: "column 'day' holds a date32[day], not a text or number"}
    jsonl = '{"audio_path": "a.wav", "report": "x", "peaks": [1, 2]}\n'
    rows, problems = read_text(tmp_path, jsonl, "m.jsonl")
    assert len(rows) == 1 and fatal(problems) == {}
    _, problems = read_text(tmp_path, jsonl, "m.jsonl", targets=["peaks"])
    assert fatal(problems) == {1: "column 'peaks' holds a list, not a text or number"}
    for name, content in (
        ("m.csv", "audio_path,report,by\na.wav,x,André\n".encode("latin-1")),
        ("m.jsonl", b'{"audio_path": "a.wav", "report": "x", "by": "Andr\xe9"}\n'),
    ):
        rows, problems = read_text(tmp_path, content, name)
        assert len(rows) == 1 and fatal(problems) == {}


def test_cells_have_a_longest_length_in_every_format(tmp_path):
    long = "x" * ((1 << 20) + 1)
    rows = [{"audio_path": "a.wav", "report": long}, {"audio_path": "b.wav", "report": "y"}]
    _, problems = read_text(tmp_path, "\n".join(map(json.dumps, rows)), "m.jsonl")
    words = "column 'report' holds 1048577 characters, more than 1048576; shorten the text"
    assert fatal(problems) == {1: words}
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    _, problems = read_manifest(tmp_path / "m.parquet")
    assert fatal(problems) == {1: words}
    bomb = pa.table({"audio_path": ["a.wav"], "report": ["x" * (1 << 23)]})
    pyarrow.parquet.write_table(bomb, tmp_path / "m.parquet", compression="zstd")
    assert (tmp_path / "m.parquet").stat().st_size < 10_000
    with pytest.raises(ManifestError, match=r"column 'report' holds 83\d+ bytes in 1 rows"):
        read_manifest(tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="not a CSV file"):
        read_text(tmp_path, f"audio_path,report\na.wav,{long}\n")


def test_a_parquet_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_UNPACKED", 1 << 20)
    path = tmp_path / "m.parquet"
    names = [f"{n}.wav" for n in range(100)]
    bomb = pa.table({"audio_path": names, "report": ["x" * 100_000] * 100})
    pyarrow.parquet.write_table(bomb, path, compression="zstd", use_dictionary=False)
    for read in (read_manifest, read_embeddings):
        with pytest.raises(UserError, match=r"would unpack to 10\d+ bytes from \d+;"):
            read(path)
    pyarrow.parquet.write_table(bomb, path, compression="none", use_dictionary=False)
    assert len(read_manifest(path)[0]) == 100


def test_home_in_a_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    rows, _ = read_text(tmp_path, "audio_path,report\n~/a.wav,x\n~b/c.wav,x\nd/~/e.wav,x\n")
    assert [row.audio_path for row in rows] == [
        str(tmp_path / name) for name in ("home/a.wav", "~b/c.wav", "d/~/e.wav")
    ]


def test_rows_need_no_report_where_none_is_used(tmp_path):
    rows, problems = read_text(tmp_path, "audio_path\na.wav\n", reports_required=False)
    assert len(rows) == 1
    assert fatal(problems) == {}


def test_metadata_that_says_nothing(tmp_path):
    rows, problems = read_text(tmp_path, "audio_path,murmur\na.wav,banana\nb.wav,Present\n")
    assert [row.row for row in rows] == [2]
    assert "murmur" in fatal(problems)[1]


def test_bytes_that_are_not_utf8_name_their_row(tmp_path):
    csv = "audio_path,report\na.wav,souffle\nb.wav,souffle dié\n".encode("latin-1")
    rows, problems = read_text(tmp_path, csv)
    assert [row.row for row in rows] == [1]
    assert "column 'report' is not UTF-8 text (byte 0xe9)" in fatal(problems)[2]
    jsonl = b'{"audio_path": "a.wav", "report": "x"}\n{"audio_path": "b\xff", "report": "x"}\n'
    rows, problems = read_text(tmp_path, jsonl, "m.jsonl")
    assert [row.row for row in rows] == [1]
    assert "not UTF-8 text (byte 0xff)" in fatal(problems)[2]


def test_parquet_bytes_that_are_not_utf8(tmp_path):
    raw = pa.array([b"ok", b"di\xe9"], pa.binary())
    bad = pa.StringArray.from_buffers(2, *raw.buffers()[1:])
    table = pa.table({"audio_path": ["a.wav", "b.wav"], "report": bad})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    rows, problems = read_manifest(tmp_path / "m.parquet")
    assert [row.row for row in rows] == [1]
    assert "column 'report' is not UTF-8 text" in fatal(problems)[2]


_FLIPS = """
import sys
from pathlib import Path
from medalign_jax.data.recordings.manifest import ManifestError, read_manifest
path = Path(sys.argv[1])
whole = path.read_bytes()
footer = int.from_bytes(whole[-8:-4], "little") + 8
for place in range(len(whole) - footer, len(whole)):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
    try:
        read_manifest(path)
    except ManifestError:
        print("refused")
"""


def test_a_flipped_bit_in_a_parquet_footer_is_refused_or_nothing(tmp_path):
    """In a process of its own: pyarrow ends one over some of them."""
    table = pa.table({"audio_path": ["a.wav", "b.wav"], "report": ["x", "y"], "age": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    command = [sys.executable, "-c", _FLIPS, str(tmp_path / "m.parquet")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.count("refused") > 300


def test_records_that_are_not_records(tmp_path):
    rows, problems = read_text(tmp_path, "audio_path,report\na.wav,x,y\nb.wav\nc.wav,x\n")
    assert [row.row for row in rows] == [3]
    assert fatal(problems) == {
        1: "has 3 cells where the header has 2",
        2: "has 1 cells where the header has 2",
    }
    deep = '{"audio_path": ' + "[" * 100_000
    text = f'{{"audio_path": "a", "report": "x"}}\n[1]\n{{"audio_path": {{}}}}\n{deep}\nx\n'
    rows, problems = read_text(tmp_path, text, "m.jsonl")
    assert [row.row for row in rows] == [1]
    assert fatal(problems)[2] == "not a JSON object but list"
    assert "column 'audio_path' holds a dict" in fatal(problems)[3]
    assert "not a JSON object" in fatal(problems)[4]
    assert "not a JSON object" in fatal(problems)[5]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", b"audio_pth,report\na,b\n", "no column 'audio_path' .did you mean 'audio_pth'"),
        ("m.csv", b"audio_path,report\n", "has no rows"),
        ("m.csv", b"", "has no rows"),
        ("m.csv", b"audio_path,report,report\na,b,c\n", "column.s. report more than once"),
        ("m.csv", b'audio_path,report\na,"b\n', "line 2: not a CSV file"),
        ("m.csv", "audio_path,report\na,b\n".encode("utf-16"), "not UTF-8 text .UTF-16"),
        ("m.csv", b"audio_path,Murmur,murmur\na,Absent,Absent\n", "all mean 'murmur'"),
        ("m.jsonl", b"{bad\n{worse\n", "none of its 2 rows can be read; the first is not a JSON"),
        ("m.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("m.xlsx", b"PK", "a manifest ends in one of"),
    ],
)
def test_files_that_are_not_a_manifest(tmp_path, name, content, words):
    with pytest.raises(ManifestError, match=words):
        read_text(tmp_path, content, name)


def test_no_file_and_no_target(tmp_path):
    with pytest.raises(ManifestError, match="no manifest file"):
        read_manifest(tmp_path / "absent.csv")
    with pytest.raises(ManifestError, match=r"no target column 'weigth' .did you mean 'weight'"):
        read_text(tmp_path, "audio_path,report,weight\na,b,c\n", targets=["weigth"])


def test_unknown_split(tmp_path):
    rows, problems = read_text(tmp_path, "audio_path,report,split\na,b,trian\nb,b,Validation\n")
    assert "unknown split 'trian' (did you mean 'train'?)" in fatal(problems)[1]
    assert rows[0].split == "valid"


def bad_recordings(folder):
    """Rows, each unusable for one reason, as {file name: words of the reason}."""
    good = manifests.write_wav(folder / "good.wav")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "truncated.wav").write_bytes(good.read_bytes()[:2000])
    (folder / "text.wav").write_text("not audio at all")
    for name, wave in {
        "silent": np.zeros(4000), "one": np.array([0.5]),
        "nan": np.where(np.arange(4000) == 7, np.nan, 0.1), "header": np.zeros(0),
    }.items():  # fmt: skip
        soundfile.write(folder / f"{name}.wav", wave, 8000, subtype="FLOAT")
    os.link(good, folder / "link.wav")
    (folder / "copy.wav").write_bytes(good.read_bytes())
    return {
        "absent.wav": "no such file", "empty.wav": "empty", "truncated.wav": "truncated",
        "text.wav": "not audio", "silent.wav": "silence", "one.wav": "single sample",
        "nan.wav": "nan", "header.wav": "no samples", ".": "not a file",
        "../{}/good.wav": "the same file as row 1", "link.wav": "the same file as row 1",
        "copy.wav": "sample for sample the recording of row 1",
    }  # fmt: skip


def test_every_bad_recording_is_named(tmp_path):
    expected = bad_recordings(tmp_path)
    names = ["good.wav", *(name.format(tmp_path.name) for name in expected)]
    path = manifests.write_csv(
        tmp_path / "m.csv", [{"audio_path": name, "report": "x"} for name in names]
    )
    rows, problems = read_manifest(path)
    checked = check(rows, problems, max_bad_fraction=1)
    assert [row.row for row in checked.rows] == [1]
    found = fatal(checked.problems)
    assert sorted(found) == list(range(2, len(names) + 1))
    for number, words in enumerate(expected.values(), start=2):
        assert words in found[number], (names[number - 1], found[number])


def test_long_recordings_are_a_note(tmp_path):
    manifests.write_wav(tmp_path / "a.wav", samples=48_000)
    rows, problems = read_text(tmp_path, "audio_path,report,split,subject_id\na.wav,x,train,s\n")
    checked = check(rows, problems, max_seconds=2)
    assert len(checked.rows) == 1
    assert notes(checked.problems) == ["lasts 3.0 s: only the first 2 s are read"]


def test_subject_in_two_splits_stops(tmp_path):
    rows = manifests.rows_of(tmp_path, 10)
    rows[9]["subject_id"] = "s0"
    path = manifests.write_csv(tmp_path / "m.csv", rows)
    with pytest.raises(
        ManifestError, match=r"subject 's0' is in .*train \(row 1\), test \(row 10\)"
    ):
        check(*read_manifest(path), max_bad_fraction=1)


def test_share_of_unusable_rows(tmp_path):
    rows = manifests.rows_of(tmp_path, 10)
    rows[2]["audio_path"] = "absent.wav"
    rows[5]["report"] = ""
    path = manifests.write_csv(tmp_path / "m.csv", rows)
    with pytest.raises(ManifestError, match=r"2 of 10 rows .20.0%. cannot be used") as stopped:
        check(*read_manifest(path), max_bad_fraction=0.19)
    assert sorted(fatal(stopped.value.problems)) == [3, 6]
    assert "absent.wav" in str(stopped.value) and "no report" in str(stopped.value)
    with pytest.raises(ManifestError, match=r"1\.0% that max_bad_fraction allows"):
        check(*read_manifest(path))
    checked = check(*read_manifest(path), max_bad_fraction=0.2)
    assert [row.row for row in checked.rows] == [1, 2, 4, 5, 7, 8, 9, 10]


def test_no_row_left(tmp_path):
    rows, problems = read_text(tmp_path, "audio_path,report\nabsent.wav,x\n")
    with pytest.raises(ManifestError, match="no row is left: 1 of 1"):
        check(rows, problems, max_bad_fraction=1)


def test_checking_without_decoding_and_progress(tmp_path):
    rows = manifests.rows_of(tmp_path, 5)
    path = manifests.write_csv(tmp_path / "m.csv", rows)
    soundfile.write(tmp_path / "audio/0.wav", np.zeros(100), 16000)
    seen = []
    checked = check(*read_manifest(path), check_audio=False, progress=lambda *n: seen.append(n))
    assert len(checked.rows) == 5
    assert seen == [(i, 5) for i in range(1, 6)]


def test_problem_table_and_file(tmp_path):
    problems = [Problem(12, "a.wav", "is empty", True), Problem(None, "", "no column", False),
                Problem(3, "b.wav", "gone", True)]  # fmt: skip
    table = problem_table(problems, limit=2).splitlines()
    assert table == [
        "row  what      why",
        " 12  a.wav     is empty",
        "  -  manifest  note: no column",
        "... and 1 more",
    ]
    write_problems(problems, tmp_path / "unusable_rows.jsonl")
    lines = (tmp_path / "unusable_rows.jsonl").read_text().splitlines()
    assert [Problem(**json.loads(line)) for line in lines] == problems
    assert [p.name for p in tmp_path.iterdir()] == ["unusable_rows.jsonl"]


@pytest.mark.parametrize(
    ("one", "other"),
    [("P01", "p1"), ("1.0", "1"), ("007", "7"), ("Patient 3", "patient3"), ("a10", "A010.0"),
     ("Zo\u00eb", "Zoe\u0308")],
)  # fmt: skip
def test_subjects_that_may_be_one_are_noted(tmp_path, one, other):
    text = f"audio_path,report,subject_id,split\na.wav,x,{one},train\nb.wav,x,{other},test\n"
    rows, problems = read_text(tmp_path, text)
    for row in rows:
        manifests.write_wav(tmp_path / row.audio_path, row.row)
    checked = check(rows, problems)
    assert len(checked.rows) == 2
    (note,) = notes(checked.problems)
    assert f"'{one}' in train (row 1), '{other}' in test (row 2)" in note


@pytest.mark.parametrize(
    ("one", "other"), [("p1", "p10"), ("1.5", "15"), ("1.05", "1.5"), ("100", "1"), ("", "")]
)
def test_subjects_that_are_two_are_not_noted(tmp_path, one, other):
    text = f"audio_path,report,subject_id,split\n1.wav,x,{one},train\n01.wav,x,{other},test\n"
    rows, _ = read_text(tmp_path, text)
    for row in rows:
        manifests.write_wav(tmp_path / row.audio_path, row.row)
    assert not notes(check(rows, []).problems)


def test_spellings_within_one_split_are_not_noted(tmp_path):
    rows, _ = read_text(tmp_path, "audio_path,report,subject_id\na.wav,x,P1\nb.wav,x,p1\n")
    for row in rows:
        manifests.write_wav(tmp_path / row.audio_path, row.row)
    assert not notes(check(rows, []).problems)
