"""Manifests as they come and as they are written, splits that keep together what belongs together.

Oracles: pyarrow and csv read and write the files by themselves; small divisions are compared with
all that there are.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import itertools
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifactnet_jax.data import manifest
from artifactnet_jax.data.manifest import (
    ManifestError,
    Row,
    read_manifest,
    write_manifest,
)
from artifactnet_jax.data.splits import assign_splits, check_rows
from artifactnet_jax.text import SOME_FAILED, CommandError

PARTS = {"train": 0.7, "validation": 0.15, "test": 0.15}


def row(path: str, label: int = 0, **changes: Any) -> Row:
    kind = ("real", "ai")[label]
    return dataclasses.replace(Row(path, label, kind, kind, "", f"{kind}/{path}", ""), **changes)


def tracks(source: str, label: int, n: int, **changes: Any) -> list[Row]:
    changes = {"source": source} | changes
    rows = [row(f"{source}-{label}-{i}.wav", label, **changes) for i in range(n)]
    return rows if "group" in changes else [dataclasses.replace(r, group=r.path) for r in rows]


def write_text(folder: Path, text: str | bytes, name: str = "m.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path, *words: str) -> None:
    """The manifest is refused in one line that names it and says these words."""
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    for word in words:
        assert word in text


# --- reading ---------------------------------------------------------------------------------


def test_a_row_with_all_columns_and_one_with_the_least(tmp_path):
    text = (
        "path,label,kind,source,model,group,split,residual,weight,bpm\n"
        "a/b.mp3,1,codec-recon,dac,DAC 44k,song7,test,r/b.npy,2.5,120.50\n"
        "/abs/c.wav,0,,,,,,,,\n"
    )
    full, least = read_manifest(write_text(tmp_path, text))
    assert full == Row(
        path=f"{tmp_path}/a/b.mp3",
        label=1,
        kind="codec-recon",
        source="dac",
        model="DAC 44k",
        group="song7",
        split="test",
        residual=f"{tmp_path}/r/b.npy",
        weight=2.5,
        extra=(("bpm", "120.50"),),
    )
    assert least == Row(
        "/abs/c.wav", 0, "real", "real", "", "real//abs/c.wav", "", "", 1.0, (("bpm", ""),)
    )


def test_source_defaults_to_kind_and_group_to_the_row(tmp_path):
    text = "path,label,kind\nx.wav,1,codec-recon\ny.wav,1,codec-recon\n"
    x, y = read_manifest(write_text(tmp_path, text))
    assert (x.source, x.group) == ("codec-recon", "codec-recon/x.wav")
    assert y.group == "codec-recon/y.wav"


def test_relative_paths_are_those_of_the_manifest_not_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.wav").write_bytes(b"here")
    write_text(tmp_path, "path,label\n../x.wav,0\n", "sub/m.csv")
    monkeypatch.chdir(tmp_path)
    (one,) = read_manifest("sub/m.csv")
    assert Path(one.path).read_bytes() == b"here"
    monkeypatch.chdir(tmp_path / "sub")
    (one,) = read_manifest("m.csv")
    assert Path(one.path).read_bytes() == b"here"


@pytest.mark.parametrize(
    ("label", "texts"),
    [
        (1, ["1", "1.0", "AI", "Fake", " synthetic ", "generated"]),
        (0, ["0", "0.0", "Real", "HUMAN"]),
    ],
)
def test_spellings_of_labels(tmp_path, label, texts):
    lines = "".join(f"{i}.wav,{text}\n" for i, text in enumerate(texts))
    rows = read_manifest(write_text(tmp_path, f"Path, LABEL\n{lines}"))
    assert [r.label for r in rows] == [label] * len(texts)


def test_bom_line_ends_blank_lines_and_quotes(tmp_path):
    text = '\ufeffpath,label\r\n\r\n"a,b ""c"".wav",1\r\n"two\nlines.wav",0\r\n,\r\n'
    a, b = read_manifest(write_text(tmp_path, text))
    assert a.path == f'{tmp_path}/a,b "c".wav'
    assert b.path == f"{tmp_path}/two\nlines.wav"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_name_that_is_not_utf8_opens(tmp_path, suffix):
    name = os.fsdecode(b"caf\xe9.wav")
    Path(tmp_path, name).write_bytes(b"sound")
    write_text(tmp_path, b"path,label,note\ncaf\xe9.wav,0,na\xefve\n", "in.csv")
    rows = read_manifest(tmp_path / "in.csv")
    out = tmp_path / f"out.{suffix}"
    write_manifest(out, rows)
    (one,) = read_manifest(out)
    assert Path(one.path).read_bytes() == b"sound"
    assert one == rows[0]
    assert os.fsencode(dict(one.extra)["note"]) == b"na\xefve"


def test_parquet_with_types_of_its_own(tmp_path):
    columns = {
        "path": pyarrow.array(["a.wav", "b.wav", "c.wav"]),
        "label": pyarrow.array([1, 0, 1], pyarrow.int8()),
        "source": pyarrow.array(["x", None, "x"]).dictionary_encode(),
        "model": pyarrow.array([None, None, None]),
        "split": pyarrow.array([None, "test", "train"]),
        "weight": pyarrow.array([2.0, None, float("nan")]),
        "bpm": pyarrow.array([0.1, None, 3.0]),
        "year": pyarrow.array([1999, 2001, None]),
        "clean": pyarrow.array([True, False, None]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "m.parquet")
    a, b, c = read_manifest(tmp_path / "m.parquet")
    assert [r.label for r in (a, b, c)] == [1, 0, 1]
    assert [r.source for r in (a, b, c)] == ["x", "real", "x"]
    assert [r.model for r in (a, b, c)] == ["", "", ""]
    assert [r.split for r in (a, b, c)] == ["", "test", "train"]
    assert [r.weight for r in (a, b, c)] == [2.0, 1.0, 1.0]
    assert a.extra == (("bpm", "0.1"), ("year", "1999"), ("clean", "True"))
    assert b.extra == (("bpm", ""), ("year", "2001"), ("clean", "False"))
    floats = {"path": ["a.wav"], "label": [1.0]}
    pyarrow.parquet.write_table(pyarrow.table(floats), tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet")[0].label == 1


def test_numbers_go_back_into_parquet_as_they_were(tmp_path):
    columns = {
        "path": ["a.wav", "b.wav"],
        "label": [1, 0],
        "bpm": [0.1, None],
        "single": pyarrow.array([0.1, 1e-30], pyarrow.float32()),
        "year": [None, -3],
        "zip": ["007", "12"],
        "big": ["99999999999999999999", "1"],
        "odd": ["nan", "1.5"],
        "empty": ["", ""],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    write_manifest(tmp_path / "b.parquet", read_manifest(tmp_path / "a.parquet"))
    back = pyarrow.parquet.read_table(tmp_path / "b.parquet").to_pydict()
    assert back["path"] == ["a.wav", "b.wav"]
    assert back["label"] == [1, 0]
    assert back["bpm"] == [0.1, None]
    assert np.array_equal(np.array(back["single"], np.float32), np.array([0.1, 1e-30], np.float32))
    assert back["year"] == [None, -3]
    assert [back[name] for name in ("zip", "big", "odd", "empty")] == [
        columns[name] for name in ("zip", "big", "odd", "empty")
    ]


def test_what_is_wrong_with_a_csv_is_said_with_its_line(tmp_path):
    head = "path,label,weight\n"
    refused(write_text(tmp_path, head + 'a.wav,1,\n"b\nc.wav",0,\nd.wav,maybe,\n'), "line 5: label")
    refused(write_text(tmp_path, head + "a.wav,1,\n\nb.wav,2,\n"), "line 4: label '2' is neither")
    refused(write_text(tmp_path, head + "a.wav,true,\n"), "line 2", "neither 1 (ai, fake) nor 0")
    refused(write_text(tmp_path, head + ",1,\n"), "line 2: its path is empty")
    refused(write_text(tmp_path, head + "a\0.wav,1,\n"), "line 2")
    refused(write_text(tmp_path, head + "a.wav,1\n"), "line 2 has 2 fields, the first line 3")
    refused(write_text(tmp_path, head + "a,b.wav,1,\n"), "line 2 has 4 fields", "quotes")
    refused(write_text(tmp_path, head + 'a.wav,1,\n"b.wav,0,\n'), "line 3")
    for weight in ("0", "-1", "nan", "inf", "much"):
        refused(write_text(tmp_path, head + f"a.wav,1,{weight}\n"), "line 2: weight")
    several = "a.wav,x,\nb.wav,1,\nc.wav,y,\nd.wav,z,\n"
    refused(write_text(tmp_path, head + several), "line 2", "2 more rows are bad", "line 4")


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    refused(write_text(tmp_path, ""), "empty")
    refused(write_text(tmp_path, "\n\n"), "empty")
    refused(write_text(tmp_path, "path,label\n"), "no rows")
    refused(write_text(tmp_path, "file,label\na.wav,1\n"), "no column 'path' among 'file', 'label'")
    refused(write_text(tmp_path, "path;label\na.wav;1\n"), "no column 'path' among 'path;label'")
    refused(write_text(tmp_path, "path,kind\na.wav,ai\n"), "no column 'label'")
    refused(write_text(tmp_path, "path,label,Label\na.wav,1,1\n"), "'label' is there twice")
    refused(write_text(tmp_path, "path,label\na.wav,1\n".encode("utf-16")), "UTF-16")
    refused(tmp_path / "none.csv", "No such file")
    refused(tmp_path / "none.parquet", "No such file")
    refused(tmp_path / "m.xlsx", ".csv or .parquet")
    (tmp_path / "d.csv").mkdir()
    refused(tmp_path / "d.csv", "directory")
    (tmp_path / "d.parquet").mkdir()
    refused(tmp_path / "d.parquet", "directory")


def test_a_repeated_path_is_refused_unless_the_rows_say_the_same(tmp_path):
    text = "path,label\na.wav,1\n./x/../a.wav,0\n"
    refused(write_text(tmp_path, text), "line 3: it has the path of line 2, but not its values")
    rows = read_manifest(write_text(tmp_path, "path,label\na.wav,1\nb.wav,0\na.wav,1\n"))
    assert [os.path.basename(r.path) for r in rows] == ["a.wav", "b.wav"]


def test_a_parquet_file_that_is_none(tmp_path):
    refused(write_text(tmp_path, b"", "m.parquet"), "cannot be read")
    refused(write_text(tmp_path, b"path,label\na.wav,1\n", "m.parquet"), "cannot be read")
    table = pyarrow.table({"path": ["a.wav", "b.wav"] * 50, "label": [1, 0] * 50})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    data = (tmp_path / "m.parquet").read_bytes()
    refused(write_text(tmp_path, data[: len(data) // 2], "m.parquet"), "cannot be read")
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(),
        1,
        [None, pyarrow.py_buffer(np.array([0, 1], np.int32)), pyarrow.py_buffer(b"\xff")],
    )
    pyarrow.parquet.write_table(pyarrow.table({"path": bad, "label": [1]}), tmp_path / "u.parquet")
    refused(tmp_path / "u.parquet", "cannot be read as parquet")
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a.wav"]}), tmp_path / "n.parquet")
    refused(tmp_path / "n.parquet", "no column 'label'")
    pyarrow.parquet.write_table(table[:0], tmp_path / "e.parquet")
    refused(tmp_path / "e.parquet", "no rows")
    pyarrow.parquet.write_table(
        pyarrow.table({"path": ["a.wav", None], "label": [1, 1]}), tmp_path / "r.parquet"
    )
    refused(tmp_path / "r.parquet", "row 2: its path is empty")


# --- writing ---------------------------------------------------------------------------------

names = st.text(
    st.characters(exclude_characters="\0/", exclude_categories=["Cs"])
    | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF),
    min_size=1,
    max_size=8,
).filter(lambda name: name.strip() and name not in (".", ".."))
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
plain = words.map(str.strip)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_what_is_written_comes_back(tmp_path, suffix, data):
    paths = data.draw(st.lists(names, min_size=1, max_size=4, unique=True))
    columns = data.draw(st.lists(plain.filter(str.isidentifier), max_size=2, unique_by=str.lower))
    columns = [name for name in columns if name.lower() not in manifest._COLUMNS]
    rows = [
        Row(
            f"{tmp_path}/{name}",
            data.draw(st.sampled_from((0, 1))),
            kind=data.draw(plain.filter(bool)),
            source=data.draw(plain.filter(bool)),
            model=data.draw(plain),
            group=data.draw(plain.filter(bool)),
            split=data.draw(plain),
            residual=data.draw(st.sampled_from(("", f"{tmp_path}/r.npy", "/elsewhere/r.npy"))),
            weight=data.draw(st.floats(1e-9, 1e9)),
            extra=tuple((column, data.draw(words)) for column in columns),
        )
        for name in paths
    ]
    write_manifest(tmp_path / f"m.{suffix}", rows)
    assert read_manifest(tmp_path / f"m.{suffix}") == rows


def test_paths_below_the_manifest_are_relative_and_others_absolute(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = [row("out/a.wav"), row("b.wav"), row("/x/c.wav"), row(f"{tmp_path}/out/..d/e.wav")]
    write_manifest("out/m.csv", rows)
    with open("out/m.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [line["path"] for line in written] == [
        "a.wav",
        f"{tmp_path}/b.wav",
        "/x/c.wav",
        "..d/e.wav",
    ]
    assert list(written[0]) == ["path", "label", "kind", "source", "model", "group", "split"]
    (tmp_path / "out").rename(tmp_path / "moved")
    assert read_manifest("moved/m.csv")[0].path == "moved/a.wav"


def test_a_path_through_a_link_and_up_again_names_the_same_file(tmp_path, monkeypatch):
    (tmp_path / "far" / "data").mkdir(parents=True)
    (tmp_path / "far" / "x.wav").write_bytes(b"far")
    (tmp_path / "x.wav").write_bytes(b"near")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "data")
    write_text(tmp_path, "path,label\n../x.wav,0\n", "far/data/m.csv")
    (one,) = read_manifest(tmp_path / "link" / "m.csv")
    assert Path(one.path).read_bytes() == b"far"
    write_manifest(tmp_path / "out.csv", [one])
    (one,) = read_manifest(tmp_path / "out.csv")
    assert Path(one.path).read_bytes() == b"far"


def test_rows_with_different_other_columns_are_written_together(tmp_path):
    rows = [row("/a.wav", extra=(("x", "1"),)), row("/b.wav", extra=(("y", "2"),), weight=3.0)]
    write_manifest(tmp_path / "m.csv", rows)
    a, b = read_manifest(tmp_path / "m.csv")
    assert (a.extra, a.weight) == ((("x", "1"), ("y", "")), 1.0)
    assert (b.extra, b.weight) == ((("x", ""), ("y", "2")), 3.0)


def test_where_a_manifest_cannot_be_written(tmp_path, monkeypatch):
    for name, word in (("m.txt", ".csv or"), ("no/m.csv", "create it"), ("d.csv", "regular file")):
        (tmp_path / "d.csv").mkdir(exist_ok=True)
        with pytest.raises(ManifestError, match=word):
            write_manifest(tmp_path / name, [row("a.wav")])

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifest, "replace_file", full)
    with pytest.raises(CommandError, match=r"write to .*m\.csv: No space left .*; free") as error:
        write_manifest(tmp_path / "m.csv", [row("a.wav")])
    assert error.value.code == SOME_FAILED


# --- splits ----------------------------------------------------------------------------------


def dataset(seed: int, sources: int = 40) -> list[Row]:
    """Sources of 1 to 30 tracks, some of whose groups have reconstructions in other sources."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for s in range(sources):
        rows += tracks(f"s{s}", int(rng.integers(2)), int(rng.integers(1, 31)), model=f"m{s % 7}")
    for i in rng.choice(len(rows), 10, replace=False):
        made = dataclasses.replace(
            rows[i], path=f"re-{i}.wav", label=1, kind="codec-recon", source=f"codec{i % 3}"
        )
        rows.append(made)
    return rows


def together(rows: list[Row], by: str) -> list[set[int]]:
    """Sets of rows that share a group or a value of `by`, however indirectly: by merging sets."""
    sets: list[set[int]] = []
    shared: dict[Any, set[int]] = defaultdict(set)
    for i, r in enumerate(rows):
        shared["group", r.group].add(i)
        shared[by, getattr(r, by)].add(i)
    for members in shared.values():
        touching = [s for s in sets if s & members]
        sets = [s for s in sets if not s & members] + [members.union(*touching)]
    return sets


@pytest.mark.parametrize("by", ["source", "model", "group"])
@pytest.mark.parametrize("seed", range(4))
def test_what_belongs_together_stays_together(by, seed):
    rows = dataset(seed)
    done = assign_splits(rows, by, PARTS, (), seed)
    assert [dataclasses.replace(r, split="") for r in done] == rows
    for members in together(rows, by):
        assert len({done[i].split for i in members}) == 1
    check_rows(done, by=by)


def test_shares_are_met_for_each_label():
    rows = [r for s in range(60) for r in tracks(f"s{s}", s % 3 // 2, 5 + s % 7)]
    done = assign_splits(rows, "source", PARTS, (), 0)
    total = Counter(r.label for r in rows)
    for (part, label), n in Counter((r.split, r.label) for r in done).items():
        assert n / total[label] == pytest.approx(PARTS[part], abs=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_few_units_are_divided_as_well_as_can_be(seed):
    """Against every division there is, by the sum over parts and labels of miss^2 / share."""
    n = np.random.default_rng(seed).integers(1, 40, 8)
    done = assign_splits(
        [r for s in range(8) for r in tracks(f"s{s}", s % 2, int(n[s]))], "source", PARTS, (), seed
    )
    of = {r.source: list(PARTS).index(r.split) for r in done}
    every = np.array([*itertools.product(range(3), repeat=8), [of[f"s{s}"] for s in range(8)]])
    misses = np.zeros(len(every))
    for label in (0, 1):
        sizes = np.where(np.arange(8) % 2 == label, n, 0)
        for part, share in enumerate(PARTS.values()):
            filled = (every == part) @ sizes / sizes.sum()
            misses += np.where(filled == 0, np.inf, (filled - share) ** 2 / share)
    assert misses[-1] <= misses.min() + 1e-9


def test_no_part_goes_without_a_label_though_one_source_has_nearly_all():
    rows = tracks("big", 0, 100) + tracks("a", 0, 1) + tracks("b", 0, 1)
    rows += [r for s in range(10) for r in tracks(f"ai{s}", 1, 10)]
    done = assign_splits(rows, "source", PARTS, (), 0)
    assert {r.split for r in done if r.source == "big"} == {"train"}
    assert {r.split for r in done if r.label == 0} == set(PARTS)


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does():
    rows = dataset(1)
    split = {r.path: r.split for r in assign_splits(rows, "source", PARTS, (), 5)}
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert {r.path: r.split for r in assign_splits(shuffled, "source", PARTS, (), 5)} == split
    others = [
        {r.path: r.split for r in assign_splits(rows, "source", PARTS, (), s)} for s in range(4)
    ]
    assert any(other != split for other in others)


def test_without_a_model_a_row_goes_by_its_source():
    rows = tracks("x", 1, 3, model="M") + tracks("y", 1, 3, model="M")
    rows += tracks("p", 0, 4) + tracks("q", 0, 4) + tracks("z", 1, 6, model="N")
    done = assign_splits(rows, "model", {"a": 0.5, "b": 0.5}, (), 0)
    of = {r.source: r.split for r in done}
    assert len({(r.source, r.split) for r in done}) == 5
    assert of["x"] == of["y"] != of["z"]
    assert of["p"] != of["q"]


def test_put_fixes_values_and_joined_ones_follow():
    rows = [r for s in range(10) for r in tracks(f"s{s}", s % 2, 10)]
    rows += [dataclasses.replace(rows[0], path="re.wav", label=1, source="codec")]
    put = [("s1", "test"), ("codec", "validation"), ("s8*", "extra")]
    done = assign_splits(rows, "source", PARTS | {"extra": 0.0}, put, 0)
    of = {r.source: r.split for r in done}
    assert of["s1"] == "test"
    assert of["s0"] == of["codec"] == "validation"
    assert [source for source, part in of.items() if part == "extra"] == ["s8"]
    everything = assign_splits(rows, "source", {"a": 1.0}, [("s*", "a"), ("codec", "a")], 0)
    assert {r.split for r in everything} == {"a"}


def test_units_put_apart_are_refused_with_what_joins_them():
    rows = [
        row("1.wav", 0, source="a", group="g1"),
        row("2.wav", 1, source="mid", group="g1"),
        row("3.wav", 1, source="mid", group="g2"),
        row("4.wav", 0, source="b", group="g2"),
        row("5.wav", 0, source="c", group="g3"),
    ]
    with pytest.raises(ManifestError) as caught:
        assign_splits(rows, "source", PARTS, [("a", "train"), ("b", "test")], 0)
    text = str(caught.value)
    assert "--put a=train and --put b=test" in text
    assert "joined by group 'g1', source 'mid', group 'g2'" in text


def test_splits_that_cannot_be():
    rows = tracks("a", 0, 5) + tracks("b", 1, 5) + tracks("c", 1, 5) + tracks("d", 1, 5)

    def fails(match: str, parts: dict[str, float] = PARTS, put: Any = ()) -> None:
        with pytest.raises(ManifestError, match=match):
            assign_splits(rows, "source", parts, put, 0)

    fails(r"real tracks make 1 unit\(s\) by source and group: nothing is left for")
    fails("there is no part 'tset': use one of train, validation, test", put=[("a", "tset")])
    fails("--put nobody=test: no source of that name", put=[("nobody", "test")])
    fails("source 'a' is put in train too", put=[("a", "train"), ("*", "test")])
    fails("sum to 0.9", {"train": 0.7, "test": 0.2})
    fails("make them sum to 1", {"train": 1.2, "test": -0.2})


@settings(max_examples=60)
@given(
    st.lists(st.tuples(*(st.integers(0, 6), st.integers(0, 9), st.integers(0, 1))), min_size=1),
    st.integers(0, 3),
)
def test_any_rows_are_divided_or_refused(members, seed):
    rows = [
        row(f"{i}.wav", label, source=f"s{s}", group=f"g{g}")
        for i, (s, g, label) in enumerate(members)
    ]
    try:
        done = assign_splits(rows, "source", PARTS, (), seed)
    except ManifestError:
        units = together(rows, "source")
        # Refused only if there are fewer units than parts for a label (single moves find the rest).
        assert any(
            0 < sum(any(rows[i].label == label for i in unit) for unit in units) < 2 * len(PARTS)
            for label in (0, 1)
        )
        return
    for unit in together(rows, "source"):
        assert len({done[i].split for i in unit}) == 1
    assert len({(r.split, r.label) for r in done}) == 3 * len({r.label for r in rows})


# --- leaks -----------------------------------------------------------------------------------


def test_leaks_are_named():
    rows = tracks("a", 0, 2, split="train") + tracks("b", 1, 2, split="train")
    check_rows(rows)
    leak = [*rows, row("new.wav", 0, source="a", group="new", split="test")]
    with pytest.raises(ManifestError, match=r"leaks: source 'a' is in train \(2, e.g. a-0-0.wav\)"):
        check_rows(leak)
    check_rows(leak, by="group")
    leak = [*rows, row("re.wav", 1, source="z", group="a-0-0.wav", split="validation")]
    for by in ("source", "model", "group"):
        with pytest.raises(ManifestError, match=r"group 'a-0-0.wav' is in train .* validation"):
            check_rows(leak, by=by)
    models = tracks("x", 1, 1, model="M", split="train")
    models += tracks("y", 1, 1, model="M", split="test")
    check_rows(rows + models)
    with pytest.raises(ManifestError, match=r"model 'M' is in train .* and test .*split"):
        check_rows(rows + models, by="model")


def test_many_leaks_are_counted():
    rows = [r for s in range(5) for r in tracks(f"s{s}", s % 2, 1, split="train")]
    rows += [
        dataclasses.replace(r, path=f"b{r.path}", group=f"b{r.group}", split="test") for r in rows
    ]
    with pytest.raises(ManifestError, match=r"'s0' .*'s1' .*'s2' .*; and 2 more") as caught:
        check_rows(rows)
    assert "'s3'" not in str(caught.value)


def test_an_unknown_model_and_an_unknown_part_are_no_leak():
    rows = tracks("a", 0, 2, split="train") + tracks("b", 1, 2, split="train")
    rows += tracks("c", 0, 2, split="test") + tracks("a", 1, 1, split="")
    check_rows(rows, by="model")
    check_rows(rows)


def test_one_class_to_train_on_is_refused():
    for label, lacking in ((0, "add ai ones .*rvq"), (1, "add real ones$")):
        with pytest.raises(ManifestError, match=f"all 3 tracks .*{lacking}"):
            check_rows(tracks("a", label, 3))
        rows = tracks("a", label, 3, split="train") + tracks("b", 1 - label, 3, split="test")
        with pytest.raises(ManifestError, match=f"all 3 tracks .*{lacking}"):
            check_rows(rows)
        check_rows(rows, one_class=True)
    check_rows(tracks("a", 0, 1) + tracks("b", 1, 1))
    with pytest.raises(ManifestError, match="no row is in the part 'train', but in dev, test"):
        check_rows(tracks("a", 0, 1, split="test") + tracks("b", 1, 1, split="dev"))


# --- the verb --------------------------------------------------------------------------------


def test_split_writes_the_column_and_shows_a_table(command, tmp_path):
    rows = [r for s in range(40) for r in tracks(f"s{s}", s % 2, 5)]
    write_manifest(tmp_path / "in.csv", rows)
    done = command("split", tmp_path / "in.csv", "-o", tmp_path / "out.parquet", "--put", "s3=test")
    assert (done.code, done.err) == (0, "")
    back = read_manifest(tmp_path / "out.parquet")
    assert [(r.group, r.label) for r in back] == [(r.group, r.label) for r in rows]
    assert {r.split for r in back if r.source == "s3"} == {"test"}
    head, *lines = done.out.splitlines()
    assert head.split() == ["part", "label", "sources", "groups", "tracks", "share"]
    cells = Counter((r.split, ("real", "ai")[r.label]) for r in back)
    shown = {(line.split()[0], line.split()[1]): line.split()[2:] for line in lines}
    assert {key: int(n) for key, (_, _, n, _) in shown.items()} == dict(cells)
    assert [shown["test", "ai"][i] for i in (0, 1, 3)] == ["3", "15", "0.150"]
    assert list(shown) == [(p, kind) for p in PARTS for kind in ("real", "ai")]


def test_split_warns_of_shares_that_are_far_off(command, tmp_path):
    rows = tracks("big", 0, 90) + tracks("s", 0, 10) + tracks("x", 1, 50) + tracks("y", 1, 50)
    write_manifest(tmp_path / "in.csv", rows)
    arguments = ("--parts", "train=0.5, test=0.5", "-o", tmp_path / "in.csv")
    done = command("split", tmp_path / "in.csv", *arguments)
    assert done.code == 0
    big, small = ("train", "test") if "train has 90.0%" in done.err else ("test", "train")
    assert f"warning: {big} has 90.0% of the real tracks, not 50.0%: " in done.err
    assert f"warning: {small} has 10.0% of the real tracks, not 50.0%: " in done.err
    assert done.err.count("warning") == 2
    assert len(read_manifest(tmp_path / "in.csv")) == 200


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--parts", "train=0.7,test=0.2"], "sum to 0.9"),
        (["--parts", "train=0.7,train=0.3"], "each name once"),
        (["--parts", "train"], "NAME=SHARE"),
        (["--parts", "train=x"], "NAME=SHARE"),
        (["--put", "s1"], "VALUE=PART"),
        (["--put", "s1=nowhere"], "there is no part 'nowhere'"),
        (["--put", "zz*=test"], "no source of that name"),
        (["-o", "no/where.csv"], "its folder does not exist"),
        (["-o", "out.txt"], "end it with .csv or .parquet"),
    ],
)
def test_split_refuses_in_one_line(command, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    write_manifest("in.csv", [r for s in range(20) for r in tracks(f"s{s}", s % 2, 2)])
    done = command("split", "in.csv", "-o", "out.csv", *arguments)
    assert (done.code, done.out) == (2, "")
    assert word in done.err
    assert len(done.err.splitlines()) == 1
    assert sorted(os.listdir()) == ["in.csv"]


def test_parquet_without_pyarrow_names_the_extra(command, tmp_path, monkeypatch):
    import sys

    write_manifest(tmp_path / "in.csv", tracks("a", 0, 4))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = command("split", tmp_path / "in.csv", "-o", tmp_path / "out.parquet")
    assert done.code == 3
    assert 'pip install "artifactnet-jax[train]"' in done.err
    done = command("split", tmp_path / "in.csv", "-o", tmp_path / "o.csv", "--by", "group")
    assert done.code == 0
