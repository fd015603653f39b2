"""Questions of facts out of BIG-bench's archive: relations, subjects, all answers of the same words, disjoint parts."""

import collections
import io
import json
import tarfile

import pytest

from jaxmethods.data import wikidata

SUBJECTS = [f"Person {i}" for i in range(200)]
EXAMPLES = [
    *({"input": f"The country of citizenship of {name} is", "target": "France"} for name in SUBJECTS),
    *({"input": f"The native language of {name} is", "target": ["French", "Occitan"]} for name in SUBJECTS),
    *({"input": f"The country of Town {i} is", "target": ["Peru"]} for i in range(40)),
    {"input": "The country of citizenship of Person 0 is", "target": ["France", "Italy"]},
    {"input": "The country of citizenship of the Duke of York is", "target": "Britain"},
    {"input": "The favourite dish of Person 1 is", "target": "soup"},  # too rare to be known
    {"input": "Sussex shares a border with", "target": "Kent"},
]


def test_rows():
    rows = wikidata.questions(EXAMPLES)
    assert rows[0] == {
        "prompt": "What is the country of citizenship of Person 0?", "answer": "France", "answers": ["France", "Italy"],
        "kind": "country of citizenship",
    }  # fmt: skip
    kinds = collections.Counter(row["kind"] for row in rows)
    assert kinds == {"country of citizenship": 201, "native language": 200, "country": 40}
    assert rows[-1]["prompt"] == "What is the country of citizenship of the Duke of York?"


def test_parts_are_disjoint_and_shifted_ones_ask_for_languages():
    rows = wikidata.questions(EXAMPLES)
    sizes = {"calibration": 60, "test": 60, "source": 60, "shifted": 60, "target": 60}
    parts = wikidata.split(rows, **sizes)
    assert {name: len(some) for name, some in parts.items()} == sizes
    assert len({row["prompt"] for some in parts.values() for row in some}) == 300
    share = lambda name: sum(row["kind"] in wikidata.LANGUAGE for row in parts[name]) / 60
    assert min(share("shifted"), share("target")) > 0.6 > max(share("calibration"), share("test"), share("source"))
    assert wikidata.split(rows, **sizes) == parts != wikidata.split(rows, **sizes, seed=1)
    for wrong in ({"test": 0}, {"shifted": 200}, {"source": 900}):
        with pytest.raises(ValueError, match="rows"):
            wikidata.split(rows, **sizes | wrong)


def test_archive(tmp_path):
    file = tmp_path / "bigbench.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, held in (("other.json", b"{}"), (wikidata.MEMBER, json.dumps({"examples": EXAMPLES}).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(held)
            archive.addfile(member, io.BytesIO(held))
    assert wikidata.read_archive(file) == EXAMPLES
    with tarfile.open(tmp_path / "none.tar.gz", "w:gz"):
        pass
    (tmp_path / "no.tar.gz").write_bytes(b"text")
    for name in ("none.tar.gz", "no.tar.gz"):
        with pytest.raises(ValueError, match=r"download bigbench==1\.0\.0 as its source archive"):
            wikidata.read_archive(tmp_path / name)
