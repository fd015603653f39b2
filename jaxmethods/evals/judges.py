"""Judges of answers: which one contradicts the truth, a new one that does, and how much that matters clinically.

These are the parts of MMedPO's data making that a person or a large model does (https://arxiv.org/abs/2412.06141, section 3):
`contradictions` finds the dispreferred answer to each question, `debates` its relevance. Judges see no pictures, as in the paper.

`ModelJudge` asks a model (any `Answerer`). Its prompts are ours: the paper has its own only as pictures. `Labelled` needs no model:
it reads labelled chest X-ray reports and answers from closed sets by rules, and says the same whenever it is asked.

>>> case = Case("7", "Is there a pneumothorax?", "no")
>>> contradictions(Labelled(), [case], [["No.", "Yes, on the left."]])[0]
Contradiction(answer='Yes, on the left.', origin='sampled')
>>> debates([Labelled()], [case], ["Yes, on the left."])[0].score
1.0
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxmethods.data.vqa import COLOURS, SHAPES
from jaxmethods.evals.answers import Answerer, Failed, Message
from jaxmethods.evals.completion import plain
from jaxmethods.evals.yes_no import says_yes
from jaxmethods.objectives import mmedpo
from jaxmethods.objectives.mmedpo import Debate

T = TypeVar("T")


class Case(NamedTuple):
    """A question and its true answer, as judges see them."""

    id: str
    question: str
    answer: str
    labels: frozenset[str] = frozenset()
    """MeSH headings of a chest X-ray report, as of `data.reports`; {"normal"} where nothing was found."""
    choices: tuple[str, ...] = ()
    """All answers that there are, for questions with a closed set."""


class Contradiction(NamedTuple):
    """An answer that contradicts the true one."""

    answer: str
    origin: str
    """Whose it is: "sampled", one of the candidates, or "written" by the judge."""


@dataclasses.dataclass(frozen=True)
class Unreadable(Failed):
    """A judge answered, and not in a form that can be read."""


@dataclasses.dataclass(frozen=True)
class NoContradiction(Failed):
    """Nothing was found that contradicts an answer."""


@runtime_checkable
class Judge(Protocol):
    """What a judge does, for many cases at once; in the order of the cases. None of it raises for one case."""

    def pick(self, cases: Sequence[Case], candidates: Sequence[Sequence[str]]) -> Sequence[int | Failed | None]:
        """Which candidate, from 0, contradicts the true answer most strongly and clearly; None: none of them does."""
        ...

    def write(self, cases: Sequence[Case]) -> Sequence[str | Failed | None]:
        """A new answer that contradicts the true one; None: it knows none."""
        ...

    def relevance(
        self, cases: Sequence[Case], answers: Sequence[str], previous: Sequence[float | None]
    ) -> Sequence[float | Failed | None]:
        """How much wrong answers matter clinically, in [0, 1]: `previous` (what was said before, None at first) to agree."""
        ...


def contradictions(
    judge: Judge, cases: Sequence[Case], candidates: Sequence[Sequence[str]]
) -> list[Contradiction | Failed]:
    """The dispreferred answer to each question: the candidate that the judge picks, or one that it writes.

    Candidates in the words of the true answer, empty ones and repetitions are not shown to the judge.
    """
    shown = [_distinct(some, case.answer) for some, case in zip(candidates, cases, strict=True)]
    found: list[Contradiction | Failed | None] = [None] * len(cases)
    some = [i for i, of_case in enumerate(shown) if of_case]
    for i, picked in zip(some, judge.pick([cases[i] for i in some], [shown[i] for i in some]), strict=True):
        if picked is not None:
            found[i] = picked if isinstance(picked, Failed) else Contradiction(shown[i][picked], "sampled")
    none = [i for i, one in enumerate(found) if one is None]
    for i, written in zip(none, judge.write([cases[i] for i in none]), strict=True):
        found[i] = NoContradiction("no candidate contradicts the answer, and the judge can write none that does")
        if written is not None:
            found[i] = written if isinstance(written, Failed) else Contradiction(written, "written")
    return [one for one in found if one is not None]


def debates(
    judges: Sequence[Judge], cases: Sequence[Case], answers: Sequence[str], *, rounds: int = 5
) -> list[Debate | Failed]:
    """`mmedpo.debate` of every answer; what is asked of a judge at one time is asked for all answers together.

    A judge whose answer failed is passed over; `Failed` where no judge had a score.
    """
    told: list[list[float | None]] = [[] for _ in cases]
    reasons: list[Failed | None] = [None] * len(cases)
    done: dict[int, Debate | Failed] = {}
    while len(done) < len(cases):
        asked: dict[int, list[tuple[int, float | None]]] = {}
        for i in range(len(cases)):
            if i in done:
                continue
            try:
                debate = mmedpo.debate(_heard(told[i], len(judges)), answers[i], rounds=rounds)
            except _Question as question:
                asked.setdefault(question.judge, []).append((i, question.previous))
            else:
                done[i] = debate if debate.score is not None else reasons[i] or Failed("no judge has a score")
        for number, rows in asked.items():
            places, previous = zip(*rows, strict=True)
            scores = judges[number].relevance([cases[i] for i in places], [answers[i] for i in places], previous)
            for i, score in zip(places, scores, strict=True):
                told[i].append(None if isinstance(score, Failed) else score)
                reasons[i] = score if isinstance(score, Failed) else reasons[i]
    return [done[i] for i in range(len(cases))]


class _Question(Exception):
    """What a debate has to be told to go on."""

    def __init__(self, judge: int, previous: float | None):
        self.judge, self.previous = judge, previous


def _heard(told: Iterable[float | None], judges: int) -> list[mmedpo.Judge]:
    """Judges who repeat in turn what was said, and then ask."""
    said = iter(told)

    def of(number: int) -> mmedpo.Judge:
        def judge(answer: str, previous: float | None) -> float | None:
            for score in said:
                return score
            raise _Question(number, previous)

        return judge

    return [of(number) for number in range(judges)]


def _distinct(candidates: Iterable[str], answer: str) -> list[str]:
    first: dict[str, str] = {}
    for candidate in candidates:
        if candidate.strip() and plain(candidate) != plain(answer):
            first.setdefault(plain(candidate), candidate.strip())
    return list(first.values())


# A model as judge

PICK = """\
You look for hallucinations in answers to a question about a medical picture, by comparing them with the true answer.

Question: {question}
True answer: {answer}

Candidates:
{candidates}

Which candidate contradicts the true answer most strongly and clearly: by something that is not there, by denying what is there, \
by a wrong place or side, or by a wrong diagnosis? Other words for the same are no contradiction, nor is what is only left out.

{form}"""

WRITE = """\
You write wrong answers to questions about medical pictures, for the training of models that must learn to tell them from true ones.

Question: {question}
True answer: {answer}

Write an answer that a careless reader would believe and that clearly contradicts the true one, in one of these ways: it misreads \
the picture; it misleads about the patient's condition; it makes a wrong diagnosis. Keep to the true answer's style and length.

{form}"""

SCORE = """\
You are a clinician. Below is a wrong answer to a question about a medical picture. How relevant is its error clinically? 0 means \
that it could harm nobody; 1 means that it could mislead diagnosis or treatment gravely.

Question: {question}
Wrong answer: {answer}
{before}
{form}"""

BEFORE = "\nAnother clinician gave it {previous:g}. Think for yourself: agree, or give a score of your own.\n"


@dataclasses.dataclass(frozen=True)
class ModelJudge:
    """A model as a judge, told in each prompt in what form it must answer; where it does not, it is asked again.

    Asking again goes on with the conversation, and says what was wrong. After that the case is `Unreadable`. The judge of
    relevance sees the question as well as the wrong answer ("no" alone has no relevance), and not the true one.

    Args:
        ask: a model.
        retries: how often it is asked again.
    """

    ask: Answerer
    retries: int = 2

    def pick(self, cases: Sequence[Case], candidates: Sequence[Sequence[str]]) -> list[int | Failed | None]:
        asked = []
        for case, some in zip(cases, candidates, strict=True):
            listed = "\n".join(f"{number}. {' '.join(text.split())}" for number, text in enumerate(some, 1))
            form = f"Answer with the number of the candidate alone, 1 to {len(some)}, or with the word none."
            asked.append((PICK.format(**_shown(case), candidates=listed, form=form), form, _reads_choice(len(some))))
        return self._read(asked)

    def write(self, cases: Sequence[Case]) -> list[str | Failed | None]:
        form = "Begin with the word Answer and a colon, and write nothing but the wrong answer after it."
        asked = [(WRITE.format(**_shown(case), form=form), form, _reads_answer(case.answer)) for case in cases]
        return self._read(asked)

    def relevance(
        self, cases: Sequence[Case], answers: Sequence[str], previous: Sequence[float | None]
    ) -> list[float | Failed | None]:
        asked = []
        for case, answer, before in zip(cases, answers, previous, strict=True):
            form = "Answer with a number from 0 to 1 alone" + (
                ", or with the word agree." if before is not None else "."
            )
            told = "" if before is None else BEFORE.format(previous=before)
            shown = _shown(case) | {"answer": " ".join(answer.split())}
            asked.append((SCORE.format(**shown, before=told, form=form), form, _reads_score(before)))
        return self._read(asked)

    def _read(self, asked: Sequence[tuple[str, str, Callable[[str], Any]]]) -> list[Any]:
        """What was read of the answers to (prompt, form, reader)."""
        conversations: list[list[Message]] = [[{"role": "user", "content": prompt}] for prompt, _, _ in asked]
        found: list[Any] = [None] * len(asked)
        waiting = list(range(len(asked)))
        for _ in range(self.retries + 1):
            answers = self.ask([tuple(conversations[i]) for i in waiting]) if waiting else []
            again = []
            for i, answer in zip(waiting, answers, strict=True):
                _, form, reader = asked[i]
                if isinstance(answer, Failed):
                    found[i] = answer
                    continue
                try:
                    found[i] = reader(answer.strip())
                except ValueError as problem:
                    said = " ".join(answer.split())[:80]
                    found[i] = Unreadable(f"the judge's answer {said!r} cannot be read: {problem}")
                    mend = f"This cannot be read: {problem}. {form}"
                    conversations[i] += [
                        {"role": "assistant", "content": answer.strip()[:500] or "(nothing)"},
                        {"role": "user", "content": mend},
                    ]
                    again.append(i)
            waiting = again
        return found


def _shown(case: Case) -> dict[str, str]:
    return {"question": case.question, "answer": " ".join(case.answer.split())}


def _reads_choice(count: int) -> Callable[[str], int | None]:
    def read(text: str) -> int | None:
        word = text.strip("\"'().: ").casefold()
        if word == "none":
            return None
        if not re.fullmatch(r"[0-9]{1,4}", word) or not 1 <= int(word) <= count:
            raise ValueError(f"it is neither a number from 1 to {count} nor the word none")
        return int(word) - 1

    return read


def _reads_answer(truth: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        begin, colon, answer = text.partition(":")
        if begin.strip().casefold() != "answer" or not colon or not answer.strip():
            raise ValueError("it does not begin with the word Answer and a colon, with an answer after them")
        if plain(answer) == plain(truth):
            raise ValueError("it is the true answer")
        return answer.strip()

    return read


def _reads_score(previous: float | None) -> Callable[[str], float]:
    def read(text: str) -> float:
        word = text.strip("\"'() ").removesuffix(".").casefold()
        if word == "agree" and previous is not None:
            return previous
        if not re.fullmatch(r"0|1|0?\.[0-9]+|0\.[0-9]+|1\.0+", word):
            raise ValueError("it is no number from 0 to 1" + ("" if previous is None else ", nor the word agree"))
        return float(word)

    return read


# Labels as judge


class Finding(NamedTuple):
    """Something that a chest X-ray may show."""

    words: str
    """A regular expression of the words for it, in lower case."""
    urgency: float
    """How much it matters whether it is there, 0..1: our ranking, in tenths, that no clinician has checked."""
    acute: bool = False
    """Whether "no acute abnormality" denies it."""


FINDINGS: Mapping[str, Finding] = MappingProxyType(
    {
        "pneumothorax": Finding(r"pneumothora(?:x|ces)", 1.0, acute=True),
        "mass": Finding(r"mass(?:es)?|neoplasms?|malignanc(?:y|ies)|tumou?rs?", 0.9),
        "edema": Finding(r"o?edema", 0.9, acute=True),
        "airspace opacity": Finding(
            r"pneumonias?|consolidations?|infiltrates?|opacit(?:y|ies)|opacifications?|airspace disease",
            0.8,
            acute=True,
        ),
        "pleural effusion": Finding(r"effusions?", 0.8, acute=True),
        "vascular congestion": Finding(r"congestion|congested|(?:heart|cardiac) failure", 0.8, acute=True),
        "nodule": Finding(r"nodules?|nodular", 0.7),
        "fracture": Finding(r"fractures?|fractured", 0.7, acute=True),
        "cardiomegaly": Finding(
            r"cardiomegaly|enlarged (?:heart|cardiac)|(?:heart|silhouette) (?:is |appears )?enlarged", 0.6
        ),
        "fibrosis": Finding(r"fibrosis|fibrotic", 0.6),
        "atelectasis": Finding(r"atelectas[ie]s|atelectatic", 0.5),
        "emphysema": Finding(r"emphysema|emphysematous|copd|chronic obstructive", 0.5),
        "hiatal hernia": Finding(r"hernias?", 0.4),
        "atherosclerosis": Finding(r"atheroscleros[ie]s|atherosclerotic", 0.3),
        "granuloma": Finding(r"granulomas?|granulomatous", 0.2),
        "scoliosis": Finding(r"\w*scoliosis", 0.2),
    }
)

_UNKNOWN = 0.5
"""The relevance of an answer about nothing in `FINDINGS`, such as a colour."""

_PARTS = r"[.;]|\b(?:but|however|although|except)\b"
_DENIES = r"\b(?:no|not|without|negative|never|absent|denies|free of)\b"
_TAKEN_BACK = r"\b(?:resolved|resolution|unlikely|excluded|ruled out)\b"
_WHOLE = r"(?:chest|exam|examination|study|films?|radiographs?|x-?ray)"
_NORMAL = rf"\b(?:normal|unremarkable) (?:\w+ ){{0,2}}{_WHOLE}\b|\b{_WHOLE} (?:is |was )?(?:normal|unremarkable)\b"
_NOTHING = rf"{_DENIES}(?P<which>[^.;]*)\b(?:abnormalit(?:y|ies)|diseases?|process(?:es)?|findings?|pathology)\b"


class Reading(NamedTuple):
    """What a text says of the `FINDINGS`."""

    stated: frozenset[str]
    denied: frozenset[str]


def read_findings(text: str) -> Reading:
    """The findings that a text states and those that it denies, by words.

    A word is denied if a denial stands before it in its part of the sentence ("no", "without"; commas do not end it, "but" does),
    or something there takes it back ("resolved"). "Normal chest", "no abnormality" and their kin deny all, "no acute abnormality"
    those that are acute. A finding that is both stated and denied counts as stated.

    >>> read_findings("Stable cardiomegaly without edema. No effusion, pneumothorax or focal consolidation.").stated
    frozenset({'cardiomegaly'})
    """
    stated: set[str] = set()
    denied: set[str] = set()
    for part in re.split(_PARTS, text.casefold()):
        denial, taken_back = re.search(_DENIES, part), re.search(_TAKEN_BACK, part)
        for name, finding in FINDINGS.items():
            for word in re.finditer(rf"\b(?:{finding.words})\b", part):
                is_denied = taken_back or (denial and denial.start() < word.start())
                (denied if is_denied else stated).add(name)
        nothing = re.search(_NOTHING, part)
        if nothing or re.search(_NORMAL, part):
            only_acute = nothing and re.search(r"\b(?:acute|active)\b", nothing["which"])
            denied |= {name for name, finding in FINDINGS.items() if finding.acute or not only_acute}
    return Reading(frozenset(stated), frozenset(denied - stated))


YES_NO = ("yes", "no")
CLOSED: tuple[tuple[str, ...], ...] = (YES_NO, tuple(sorted(COLOURS)), tuple(sorted(SHAPES)))


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A judge by rules, for data whose labels or closed answers say what contradicts what. Nothing in it is random.

    Closed answers (a case's `choices`, yes and no, the colours and shapes of `data.vqa`): another answer of the set contradicts;
    the strongest candidate says nothing else. Written is another one of the set, by a hash of the case.

    Chest X-ray reports with `labels`, read by `read_findings`: to state a finding contradicts a normal report (labelled so, and
    stating none) and one that denies it, to deny a finding one that states it. The strongest candidate does so in most findings.
    Written is the answer in `others` where that contradicts, else a sentence that states a finding (by a hash of the case), or
    denies the most urgent one. Other reports and other answers are contradicted by nothing.

    Relevance is the largest `urgency` among the findings in which wrong and true answer differ or, for closed answers, those that
    the question names; 0.5 where it is about none of them. It is its own, whatever was said before.

    Args:
        seed: of the hashes.
        others: case's id -> the contradicting answer of another report, as of `data.reports.contradicted_pairs`.
    """

    seed: int = 0
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def pick(self, cases: Sequence[Case], candidates: Sequence[Sequence[str]]) -> list[int | Failed | None]:
        picked: list[int | Failed | None] = []
        for case, some in zip(cases, candidates, strict=True):
            strength = [self._strength(case, candidate) for candidate in some]
            picked.append(strength.index(max(strength)) if max(strength, default=0) > 0 else None)
        return picked

    def write(self, cases: Sequence[Case]) -> list[str | Failed | None]:
        return [self._written(case) for case in cases]

    def relevance(
        self, cases: Sequence[Case], answers: Sequence[str], previous: Sequence[float | None]
    ) -> list[float | Failed | None]:
        scores: list[float | Failed | None] = []
        for case, answer in zip(cases, answers, strict=True):
            asked = read_findings(case.question)
            at_stake = asked.stated | asked.denied if _closed(case) else _differing(case, answer)
            scores.append(max((FINDINGS[name].urgency for name in at_stake), default=_UNKNOWN))
        return scores

    def _strength(self, case: Case, candidate: str) -> int:
        """How strongly it contradicts; 0: not."""
        choices = _closed(case)
        if not choices:
            return len(_differing(case, candidate))
        said = _said(candidate, choices)
        if said is None or said == plain(case.answer):
            return 0
        return 2 if plain(candidate) == said else 1

    def _written(self, case: Case) -> str | None:
        choices = [choice for choice in _closed(case) if plain(choice) != plain(case.answer)]
        if choices:
            return _styled(self._chosen(case, choices), case.answer)
        other = self.others.get(case.id, "")
        if _differing(case, other):
            return other
        truth = read_findings(case.answer)
        if _is_normal(case, truth):
            return f"There is evidence of {self._chosen(case, list(FINDINGS))}."
        if case.labels and truth.stated:
            return f"There is no evidence of {max(sorted(truth.stated), key=lambda name: FINDINGS[name].urgency)}."
        return None

    def _chosen(self, case: Case, among: Sequence[str]) -> str:
        digest = hashlib.blake2b(f"{self.seed} {case.id} {case.question}".encode(), digest_size=8).digest()
        return among[int.from_bytes(digest) % len(among)]


def _closed(case: Case) -> tuple[str, ...]:
    """The closed set that the true answer is of; () where it is of none."""
    for choices in (case.choices, *CLOSED):
        if plain(case.answer) in map(plain, choices):
            return choices
    return ()


def _said(text: str, choices: Sequence[str]) -> str | None:
    """The one of the choices that a text names, in plain words; None: none, or several."""
    words = f" {plain(text)} "
    if set(choices) == set(YES_NO):
        first = words.split()[:1]
        yes = first == ["yes"] if first in (["yes"], ["no"]) else says_yes(text)
        return None if yes is None else YES_NO[not yes]
    named = [plain(choice) for choice in choices if f" {plain(choice)} " in words]
    return named[0] if len(named) == 1 else None


def _styled(choice: str, answer: str) -> str:
    """The choice with the capital letter and the full stop that the answer has."""
    stop = "." if answer.rstrip().endswith(".") and not choice.endswith(".") else ""
    return (choice.capitalize() if answer.strip()[:1].isupper() and choice.islower() else choice) + stop


def _is_normal(case: Case, truth: Reading) -> bool:
    return case.labels == {"normal"} and not truth.stated


def _differing(case: Case, answer: str) -> frozenset[str]:
    """The findings in which an answer contradicts a labelled report; none where there are no labels."""
    if not case.labels:
        return frozenset()
    said, truth = read_findings(answer), read_findings(case.answer)
    return (said.stated if _is_normal(case, truth) else said.stated & truth.denied) | (said.denied & truth.stated)
