"""Three domains of pictures with reports and questions, for retrieval: easy-VQA's shapes, and Tux Paint's animals and other things.

A report is what its source tells of a picture: a shape's colour and form by easy-VQA's own answers, a stamp's sentence. Shapes are
asked for their colour or their form, with all of these as options; stamps for what they show, which is to be answered with their
sentence. Pictures to be found, to ask about and held out are disjoint; sentences of stamps that are held out are in no report.

    python -m jaxmethods.data.picture_reports --to build/picture_reports --stamps build/stamps
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxmethods.data import vqa
from jaxmethods.data.sources import one_line_errors, write_all
from jaxmethods.data.vqa import Row

DOMAINS = ("shapes", "animals", "things")


class Part(NamedTuple):
    """One domain: reports to be found, questions to learn from, and held-out questions."""

    reports: list[Row]
    questions: list[Row]
    held_out: list[Row]


def told(row: Row) -> tuple[str | None, str | None]:
    """(colour, shape) of one of `vqa.easy_vqa`'s pictures, by its questions and answers; None where these do not tell."""
    colour = shape = None
    for asked, said in zip(row["messages"][::2], row["messages"][1::2], strict=True):
        words, answer = set(re.findall(r"\w+", asked["content"].casefold())), said["content"]
        affirmed = (answer == "yes") != bool(words & {"no", "not"}) if answer in ("yes", "no") else True
        named = words | ({answer} if answer not in ("yes", "no") else set())
        if affirmed:
            colour = next(iter(named & vqa.COLOURS), colour)
            shape = next(iter(named & vqa.SHAPES), shape)
    return colour, shape


def shapes(
    train: Sequence[Row], test: Sequence[Row], *, reports: int, questions: int, held_out: int, seed: int
) -> Part:
    """The first domain: reports of `vqa.easy_vqa("train")`, questions of ("test"), which no model has been trained on."""
    known = [(row, told(row)) for row in vqa.shuffled(train, seed)]
    found = [
        {"images": row["images"], "report": f"A {colour} {shape}."}
        for row, (colour, shape) in known
        if colour and shape
    ]
    others = vqa.shuffled(test, seed)

    def asked(rows: Sequence[Row], count: int) -> list[Row]:
        made = []
        for row in rows:
            (one,) = vqa.shuffled([x for x in vqa.single_questions([row]) if x["kind"] != "yes or no"], seed)[:1] or (
                None,
            )
            if one is not None:
                options = sorted(vqa.COLOURS if one["kind"] == "colour" else vqa.SHAPES)
                question = one["prompt"].removeprefix(f"{vqa.MARKER}\n")
                made.append(
                    {"images": row["images"], "question": question, "answer": one["answer"], "domain": DOMAINS[0],
                     "options": options}
                )  # fmt: skip
        return made[:count]

    half = len(others) // 2
    return Part(found[:reports], asked(others[:half], questions), asked(others[half:], held_out))


def stamps(rows: Sequence[Row], domain: str, *, share: float, seed: int) -> Part:
    """One of the others, from rows of `vqa.stamps`: this share of the sentences is asked about, and as many are held out."""
    others, held_out = vqa.split_by_caption(rows, share, seed)
    reports, asked = vqa.split_by_caption(others, share / (1 - share), seed + 1)

    asking = vqa.CAPTION.removeprefix(f"{vqa.MARKER}\n")
    questions = lambda part: [
        {"images": row["images"], "question": asking, "answer": row["answer"], "domain": domain} for row in part
    ]
    bases = [{"images": row["images"], "report": row["answer"]} for row in reports]
    return Part(bases, questions(asked), questions(held_out))


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Writes reports_DOMAIN.jsonl, questions.jsonl and questions_heldout.jsonl; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxmethods.data.picture_reports", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write the JSONL files to")
    parser.add_argument("--stamps", type=Path, metavar="DIR", help="where tuxpaint-stamps-default was unpacked")
    parser.add_argument("--reports", type=int, default=400, help="pictures of shapes with reports (default 400)")
    parser.add_argument("--questions", type=int, default=120, help="about shapes, to learn from (default 120)")
    parser.add_argument("--held-out", type=int, default=100, help="held-out questions about shapes (default 100)")
    parser.add_argument(
        "--share", type=float, default=0.2, help="of the stamps' sentences to ask about, and to hold out"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every choice (default 0)")
    options = parser.parse_args(arguments)
    drawn = vqa.stamps(options.stamps)
    living = [row for row in drawn if "/stamps/animals/" in row["images"]]
    things = [row for row in drawn if "/stamps/animals/" not in row["images"]]
    parts = (
        shapes(
            vqa.easy_vqa("train"), vqa.easy_vqa("test"), reports=options.reports, questions=options.questions,
            held_out=options.held_out, seed=options.seed,
        ),
        stamps(living, DOMAINS[1], share=options.share, seed=options.seed),
        stamps(things, DOMAINS[2], share=options.share, seed=options.seed),
    )  # fmt: skip
    files = {f"reports_{name}.jsonl": part.reports for name, part in zip(DOMAINS, parts, strict=True)}
    files["questions.jsonl"] = [row for part in parts for row in part.questions]
    files["questions_heldout.jsonl"] = [row for part in parts for row in part.held_out]
    write_all(options.to, files)


if __name__ == "__main__":
    raise SystemExit(main())
