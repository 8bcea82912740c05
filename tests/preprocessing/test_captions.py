"""The user's captions reach their pictures word for word, wherever they were written, and none is lost silently."""

import json
from pathlib import Path

import pytest

from preprocessing.archive import SourceFile
from preprocessing.captions import UserCaptions, read_captions
from preprocessing.errors import UserError
from preprocessing.limits import Limits


def read(folder: Path, files: dict[str, str | bytes], limits: Limits | None = None) -> UserCaptions:
    """read_captions over these files; pictures may be empty, for only names matter here."""
    sources = []
    for number, (name, content) in enumerate(files.items()):
        path = folder / str(number)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        sources.append(SourceFile(name, path))
    return read_captions(sources, limits or Limits())


def texts(found: UserCaptions) -> dict[str, str]:
    return {name: caption.text for name, caption in found.captions.items()}


def test_text_beside_its_picture(tmp_path):
    found = read(
        tmp_path,
        {"a.png": "", "a.txt": "one", "deep/a.png": "", "deep/a.txt": "two", "b.v1.jpg": "", "b.v1.txt": "three",
         "c.png": "", "c.png.txt": "four", "D.JPG": "", "d.TXT": "five", "e.png": "", "e.jpg": "", "e.txt": "six",
         "none.png": ""},
    )  # fmt: skip
    assert texts(found) == {
        "a.png": "one", "deep/a.png": "two", "b.v1.jpg": "three", "c.png": "four", "D.JPG": "five",
        "e.png": "six", "e.jpg": "six",
    }  # fmt: skip
    assert found.rejects == ()
    assert len(found.pictures) == 8


def test_case_decides_where_both_spellings_are_there(tmp_path):
    found = read(tmp_path, {"x.png": "", "X.png": "", "x.txt": "small", "X.txt": "large"})
    assert texts(found) == {"x.png": "small", "X.png": "large"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfa caf\xc3\xa9", "a café"),
        (b"two\r\nlines\r\n", "two\r\nlines\r\n"),
        (b"", ""),
        (b"  spaced  ", "  spaced  "),
        ("TOK «中文» 🙂".encode(), "TOK «中文» 🙂"),
    ],
)
def test_words_are_kept_as_written(tmp_path, content, expected):
    assert texts(read(tmp_path, {"a.png": "", "a.txt": content})) == {"a.png": expected}


@pytest.mark.parametrize("content", [b"caf\xe9", b"\xff\xfea\0", bytes(range(128, 256))])
@pytest.mark.parametrize("name", ["a.txt", "captions.csv", "metadata.jsonl"])
def test_other_encodings_are_named(tmp_path, content, name):
    with pytest.raises(UserError, match=f"{name} is not UTF-8.*save it as UTF-8"):
        read(tmp_path, {"a.png": "", name: content})


def test_a_stray_text_is_listed_and_need_not_be_utf8(tmp_path):
    found = read(tmp_path, {"a.png": "", "readme.txt": b"\xff", "labels.csv": "a,b", "data.jsonl": "{}"})
    assert [reject.source for reject in found.rejects] == ["readme.txt", "labels.csv", "data.jsonl"]
    assert found.captions == {}


@pytest.mark.parametrize("name", ["captions.csv", "my_Captions_final.CSV", "sub/captions.csv"])
def test_captions_csv(tmp_path, name):
    table = 'caption,image_file\r\n"a toy, red",x.png\r\n"he said ""hi""",sub/y.png\r\n,z.png\r\n'
    found = read(tmp_path, {name: table, "x.png": "", "sub/y.png": "", "z.png": ""})
    assert texts(found) == {"x.png": "a toy, red", "sub/y.png": 'he said "hi"', "z.png": ""}
    assert found.rejects == ()


@pytest.mark.parametrize("separator", [";", "\t"])
def test_separators_of_other_spreadsheets_and_columns_in_any_order(tmp_path, separator):
    table = f"\ufeffimage_file {separator} Caption{separator}note\nx.png{separator}a toy, red{separator}\n"
    assert texts(read(tmp_path, {"captions.csv": table, "x.png": ""})) == {"x.png": "a toy, red"}


def test_metadata_of_image_folders(tmp_path):
    lines = [{"file_name": "x.png", "text": "one", "label": 3}, {"file_name": "y.png", "text": None}]
    found = read(
        tmp_path,
        {
            "train/metadata.jsonl": "\n".join(map(json.dumps, lines)) + "\n\n",
            "train/x.png": "",
            "train/y.png": "",
            "x.png": "",
            "test/metadata.csv": "file_name,text\nx.png,two\n",
            "test/x.png": "",
        },
    )
    assert texts(found) == {"train/x.png": "one", "test/x.png": "two"}
    assert found.rejects == ()


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("x.png", "t/x.png"),
        ("./x.png", "t/x.png"),
        ("../top.png", "top.png"),
        ("top.png", "top.png"),
        ("deep/only.png", "t/deep/only.png"),
        ("deep\\only.png", "t/deep/only.png"),
        ("only.png", "t/deep/only.png"),
        ("ONLY.PNG", "t/deep/only.png"),
        ("/home/me/t/deep/only.png", "t/deep/only.png"),
        ("/home/me/top.png", "top.png"),
        ("C:\\me\\t\\x.png", "t/x.png"),
        ("other/x.png", None),
        ("other/top.png", None),
        ("u/twice.png", "u/twice.png"),
        ("twice.png", None),
        ("missing.png", None),
        ("", None),
        ("..", None),
    ],
)
def test_how_a_table_may_name_a_picture(tmp_path, reference, expected):
    names = ["t/x.png", "top.png", "t/deep/only.png", "u/twice.png", "v/twice.png"]
    row = json.dumps({"file_name": reference, "text": "words"})
    found = read(tmp_path, dict.fromkeys(names, "") | {"t/metadata.jsonl": row})
    assert texts(found) == ({expected: "words"} if expected else {})
    if not expected:
        assert [reject.source for reject in found.rejects] == ["t/metadata.jsonl line 1"]
        assert ("several" in found.rejects[0].reason) == (reference == "twice.png")


def test_precedence_and_what_loses_is_listed(tmp_path):
    files = {
        "x.png": "",
        "y.png": "",
        "metadata.jsonl": '{"file_name": "x.png", "text": "meta"}\n{"file_name": "y.png", "text": "meta"}',
        "captions.csv": "caption,image_file\ntable,x.png\ntable,y.png\n",
        "x.txt": "beside",
    }
    found = read(tmp_path, files)
    assert texts(found) == {"x.png": "beside", "y.png": "table"}
    assert [(reject.source, reject.reason.split(",")[0]) for reject in found.rejects] == [
        ("captions.csv line 2", "its caption of x.png is not used"),
        ("metadata.jsonl line 1", "its caption of x.png is not used"),
        ("metadata.jsonl line 2", "its caption of y.png is not used"),
    ]


def test_the_same_words_twice_are_no_conflict(tmp_path):
    files = {"x.png": "", "x.txt": "a toy\n", "captions.csv": "caption,image_file\na toy,x.png\n"}
    assert read(tmp_path, files).rejects == ()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("captions.csv", "", "no column image_file"),
        ("captions.csv", "text;file\nx;y\n", "no column image_file or file_name or output_image .found: text, file"),
        ("captions.csv", "image_file,words\nx.png,y\n", "no column caption"),
        ("captions.csv", "caption,image_file\na toy, red,x.png\n", "line 2 has not as many fields"),
        ("captions.csv", "caption,image_file\na toy\n", "line 2 has not as many fields"),
        ("captions.csv", 'caption,image_file\n"a toy,x.png\n', "not sound CSV"),
        ("captions.csv", 'caption,image_file\n"a" toy,x.png\n', "not sound CSV"),
        ("captions.csv", "caption,image_file\n" + "a" * 200_000 + ",x.png\n", "not sound CSV|more than"),
        ("metadata.jsonl", "{\n", "line 1 is not JSON"),
        ("metadata.jsonl", "\n[1]\n", "line 2 is not a JSON object"),
        ("metadata.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("metadata.jsonl", "1" * 10_000, "line 1 is not JSON"),
        ("metadata.jsonl", '{"file_name": "x.png"}', "line 1 has no column caption or text"),
        ("metadata.jsonl", '{"text": "x"}', "line 1 has no column image_file or file_name"),
        ("metadata.jsonl", '{"file_name": "x.png", "text": 3}', "must be text"),
        ("metadata.jsonl", '{"file_name": ["x.png"], "text": ""}', "must be text"),
        ("metadata.jsonl", '{"file_name": "x.png", "text": "\\ud800"}', "surrogate"),
    ],
)
def test_tables_that_cannot_be_understood_are_named(tmp_path, name, content, words):
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, {"x.png": "", name: content})
    assert str(caught.value).startswith(name)


def test_limits_on_length(tmp_path):
    row = json.dumps({"file_name": "x.png", "text": "é" * 10})
    limits = Limits(caption_bytes=20, table_bytes=len(row))
    assert texts(read(tmp_path, {"x.png": "", "metadata.jsonl": row}, limits)) == {"x.png": "é" * 10}
    assert texts(read(tmp_path, {"x.png": "", "x.txt": "é" * 10}, limits)) == {"x.png": "é" * 10}
    for files in (
        {"x.txt": "é" * 11},
        {"metadata.jsonl": row + "\n"},
        {"metadata.jsonl": row.replace("\\u", "e\\u", 1)},
    ):
        with pytest.raises(UserError, match=r"longer than|more than"):
            read(tmp_path, {"x.png": ""} | files, limits)
