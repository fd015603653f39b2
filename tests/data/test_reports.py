"""The chest X-ray reports: on small archives written here, and on the real one where it is installed."""

import gzip
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import tarfile

import pytest

from jaxmethods.data import reports


def document(name, findings, impression, *headings):
    def part(label, text):
        return f'<AbstractText Label="{label}">{text}</AbstractText>' if text else f'<AbstractText Label="{label}"/>'

    body = part("INDICATION", "cough") + part("FINDINGS", findings) + part("IMPRESSION", impression)
    mesh = "".join(f"<major>{heading}</major>" for heading in headings)
    body = f"<Abstract>{body}</Abstract><MeSH>{mesh}</MeSH>"
    return f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="{name}"/>{body}</eCitation>'


def archive(path, documents):
    with tarfile.open(path, "w:gz") as file:
        for number, text in enumerate(documents):
            data = text.encode()
            member = tarfile.TarInfo(f"reports/{number}.xml")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def test_rows_of_an_archive_by_hand(tmp_path):
    path = archive(
        tmp_path / "a.tgz",
        [
            document("CXR10", "Heart   normal.\n Lungs <b>clear</b> &amp; wide.", "Normal\tchest."),
            document("CXR2", "Effusion.", "No change."),
            document("CXR3", "", "No findings here."),
            document("CXR4", "No impression here.", ""),
            document(
                "CXR11", "heart normal. lungs clear &amp; wide", "Normal chest .."
            ),  # CXR10 again, spelt otherwise
            document("CXR12", "Effusion.", "Small effusion."),  # the findings of CXR2, another impression
            document("CXR13", "...", "Nothing but dots."),
        ],
    )
    found = reports.read_archive(path)
    assert found.rows == [
        {"id": "CXR2", "prompt": reports.INSTRUCTION + "Effusion.", "answer": "No change."},
        {"id": "CXR10", "prompt": reports.INSTRUCTION + "Heart normal. Lungs clear & wide.", "answer": "Normal chest."},
        {"id": "CXR12", "prompt": reports.INSTRUCTION + "Effusion.", "answer": "Small effusion."},
    ]
    assert str(found) == "3 rows of 7 reports: 3 lack findings or impression, 1 repeat the words of an earlier one"


def test_pairs_contradict_by_label(tmp_path):
    """Normal reports and those that state what they are labelled with, each other's; the rest in no pair."""
    path = archive(
        tmp_path / "a.tgz",
        [
            document("CXR1", "Clear lungs.", "Normal chest.", "normal"),
            document("CXR2", "Big heart.", "Stable cardiomegaly.", "Cardiomegaly/severe", "Aorta/tortuous"),
            document("CXR3", "An old granuloma.", "No acute disease.", "Calcified Granuloma/lung"),
            document("CXR4", "Fluid gone.", "No cardiomegaly, no effusion.", "Pleural Effusion"),
            document("CXR5", "Blunted.", "Clear heart. Small right effusion.", "Pleural Effusion/right/small"),
            document("CXR6", "Poor picture.", "Repeat.", "Technical Quality of Image Unsatisfactory "),
        ],
    )
    found = reports.read_archive(path)
    assert found.labels["CXR2"] == {"Cardiomegaly", "Aorta"} and found.labels["CXR1"] == {"normal"}
    pairs = reports.contradicted_pairs(found.rows, found.labels)
    assert [pair["id"] for pair in pairs] == ["CXR1", "CXR2", "CXR5"]
    assert [pair["chosen"] for pair in pairs] == [
        "Normal chest.",
        "Stable cardiomegaly.",
        "Clear heart. Small right effusion.",
    ]
    assert pairs[0]["rejected"] in ("Stable cardiomegaly.", "Clear heart. Small right effusion.")
    assert pairs[1]["rejected"] == pairs[2]["rejected"] == "Normal chest."
    assert pairs[0]["prompt"] == reports.INSTRUCTION + "Clear lungs."
    chosen_for_one = {reports.contradicted_pairs(found.rows, found.labels, seed)[0]["rejected"] for seed in range(9)}
    assert len(chosen_for_one) == 2
    assert reports.contradicted_pairs(found.rows[:1], found.labels) == []


def test_archives_that_are_not_reports_are_refused(tmp_path):
    bomb = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]>' + document("CXR1", "&c;", "x")[38:]
    for documents, message in (
        ([bomb], "declares a document type or entities"),
        (["<a><b></a>"], "0.xml: not an XML report"),
        (["<a/>"], "the report has no uId"),
        ([document("CXR1", "x" * (1 << 20), "y")], "are too many for a report"),
    ):
        with pytest.raises(ValueError, match=message):
            reports.read_archive(archive(tmp_path / "a.tgz", documents))
    (tmp_path / "b.tgz").write_bytes(gzip.compress(b"no archive" * 100))
    with pytest.raises(tarfile.TarError):
        reports.read_archive(tmp_path / "b.tgz")


def rows(count):
    return [{"id": f"CXR{i}", "prompt": f"Findings: number {i % 400}.", "answer": f"answer {i}"} for i in range(count)]


def test_a_split_keeps_equal_findings_together_and_is_about_the_share():
    train, held_out = reports.split_by_report(rows(600), 0.2, seed=1)
    assert sorted(row["id"] for row in train + held_out) == sorted(row["id"] for row in rows(600))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert 0.13 < len(held_out) / 600 < 0.27
    assert reports.split_by_report(rows(600), 0.0).held_out == [] == reports.split_by_report(rows(600), 1.0).train


def test_a_split_depends_on_the_seed_and_the_report_alone():
    held_out = reports.split_by_report(rows(400), 0.2, seed=1).held_out
    assert reports.split_by_report(rows(400), 0.2, seed=2).held_out != held_out
    fewer = reports.split_by_report(rows(400)[::-2], 0.2, seed=1).held_out  # other rows gone, another order
    kept = {row["id"] for row in rows(400)[::-2]}
    assert sorted(row["id"] for row in fewer) == sorted(row["id"] for row in held_out if row["id"] in kept)
    shouted = [{**row, "prompt": row["prompt"].upper() + "!"} for row in rows(400)]
    assert [row["id"] for row in reports.split_by_report(shouted, 0.2, seed=1).held_out] == [
        row["id"] for row in held_out
    ]
    with pytest.raises(ValueError, match=r"held_out=1.5 is a share"):
        reports.split_by_report(rows(3), 1.5)


@pytest.fixture(scope="module")
def installed():
    try:
        return reports.read_archive(reports.archive_path())
    except ModuleNotFoundError:
        pytest.skip("torchxrayvision is not installed")


def test_the_real_reports(installed):
    """The counts of this release of the collection, and text as it stands in it."""
    assert installed.reports == 3955 and installed.incomplete == 536
    assert len(installed.rows) + installed.repeated == 3419
    assert 2600 < len(installed.rows) < 2712  # 2712 differ if case and punctuation count
    first = installed.rows[0]
    assert first["id"] == "CXR1" and first["answer"] == "Normal chest x-XXXX."
    assert first["prompt"].startswith(reports.INSTRUCTION + "The cardiac silhouette and mediastinum size are within")
    assert len({row["id"] for row in installed.rows}) == len(installed.rows)
    assert all(row["answer"] and not re.search(r"\s\s|[\n\t]", row["answer"]) for row in installed.rows)
    train, held_out = reports.split_by_report(installed.rows)
    assert 0.08 < len(held_out) / len(installed.rows) < 0.12
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_the_real_pairs(installed):
    pairs = reports.contradicted_pairs(installed.rows, installed.labels)
    of = {row["id"]: row for row in installed.rows}
    normal = [pair for pair in pairs if installed.labels[pair["id"]] == {"normal"}]
    assert 500 < len(normal) < len(pairs) < 1500 and len(pairs) - len(normal) > 300
    for pair in pairs:
        assert pair["chosen"] == of[pair["id"]]["answer"] != pair["rejected"]


def test_the_command_writes_all_files(installed, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "jaxmethods.data.reports", "--to", str(tmp_path / "new" / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    folder = tmp_path / "new" / "folder"
    names = "heldout.jsonl", "pairs_heldout.jsonl", "pairs_train.jsonl", "train.jsonl"
    assert tuple(sorted(path.name for path in folder.iterdir())) == names  # and nothing half-written
    expected = reports.split_by_report(installed.rows)
    for name, part in (("train.jsonl", expected.train), ("heldout.jsonl", expected.held_out)):
        assert [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()] == part
        assert f"{folder / name}: {len(part):,} rows of " in done.stdout
        pairs = [json.loads(line) for line in (folder / f"pairs_{name}").read_text(encoding="utf-8").splitlines()]
        assert pairs == reports.contradicted_pairs(part, installed.labels)


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps torchxrayvision==1.5.7"):
        reports.chest_xray_reports()
    assert reports.main(["--to", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
