"""Judges: what a model says is read strictly and asked again, debates go on as the paper's do, and rules read labelled data."""

import random

import pytest

from jaxmethods.data import reports
from jaxmethods.evals import judges
from jaxmethods.evals.answers import Failed
from jaxmethods.evals.judges import Case, Contradiction, Labelled, ModelJudge, NoContradiction, Unreadable
from jaxmethods.objectives import mmedpo

CASE = Case("1", "Is the heart enlarged?", "No.")


def saying(*answers):
    """An answerer that says these in turn, and what it was asked."""
    left, asked = list(answers), []

    def ask(prompts):
        asked.extend(prompts)
        return [left.pop(0) for _ in prompts]

    return ask, asked


def test_a_pick_is_a_number_or_none():
    ask, asked = saying("2", "None.", '"1"', "3")
    picked = ModelJudge(ask, retries=0).pick([CASE] * 4, [["a", "b"]] * 4)
    assert picked[:3] == [1, None, 0] and isinstance(picked[3], Unreadable)
    (message,) = asked[0]
    assert message["role"] == "user" and "1. a\n2. b" in message["content"] and "True answer: No." in message["content"]
    assert message["content"].endswith("Answer with the number of the candidate alone, 1 to 2, or with the word none.")


@pytest.mark.parametrize("nonsense", ["", "0", "3", "-1", "1 or 2", "Candidate 1", "1.5", "²", "no", "9" * 5000])
def test_what_is_no_pick_is_not_taken_for_one(nonsense):
    (found,) = ModelJudge(saying(nonsense)[0], retries=0).pick([CASE], [["a", "b"]])
    assert isinstance(found, Unreadable) and "neither a number from 1 to 2 nor the word none" in found.reason


@pytest.mark.parametrize(
    ("text", "previous", "score"),
    [
        ("0.7", None, 0.7),
        ("1", None, 1.0),
        ("0", 0.3, 0.0),
        (".25", None, 0.25),
        ("1.0.", None, 1.0),
        ("Agree.", 0.4, 0.4),
    ],
)
def test_scores_that_can_be_read(text, previous, score):
    assert ModelJudge(saying(text)[0]).relevance([CASE], ["Yes."], [previous]) == [score]


@pytest.mark.parametrize(
    "nonsense", ["", "agree", "1.1", "-0.5", "70%", "0.7 or 0.8", "nan", "inf", "1e-1", "Score: 0.7", "true"]
)
def test_what_is_no_score_is_not_taken_for_one(nonsense):
    (found,) = ModelJudge(saying(nonsense)[0], retries=0).relevance([CASE], ["Yes."], [None])
    assert isinstance(found, Unreadable) and "no number from 0 to 1" in found.reason


def test_a_written_answer_is_marked_and_is_not_the_true_one():
    judge = lambda text: ModelJudge(saying(text)[0], retries=0).write([CASE])[0]
    assert judge("Answer: Yes, it is.") == "Yes, it is." and judge("ANSWER:\nYes:\nboth") == "Yes:\nboth"
    for nonsense in ("", "Yes, it is.", "Answer:", "Sure! Answer: yes", "Answer: no"):
        assert isinstance(judge(nonsense), Unreadable)


def test_what_cannot_be_read_is_asked_again_in_the_same_conversation():
    ask, asked = saying("hm", "1", "  ", "2")
    assert ModelJudge(ask).pick([CASE, CASE], [["a", "b"]] * 2) == [1, 0]
    question, said, mend = asked[2]
    assert (said["role"], said["content"]) == ("assistant", "hm") and question == asked[0][0]
    assert mend["content"].startswith("This cannot be read: it is neither") and "1 to 2" in mend["content"]
    assert len(asked[3]) == 5 and asked[3][3]["content"] == "(nothing)"

    ask, asked = saying(*["hm"] * 9)
    (found,) = ModelJudge(ask, retries=3).pick([CASE], [["a"]])
    assert isinstance(found, Unreadable) and "'hm' cannot be read" in found.reason and len(asked) == 4

    ask, asked = saying("hm", Failed("gone"))
    assert ModelJudge(ask).pick([CASE], [["a"]]) == [Failed("gone")] and len(asked) == 2


def test_contradictions_are_picked_or_written_and_repetitions_are_not_shown():
    ask, asked = saying("2", "none", "Answer: Yes.", "Answer: Maybe.")
    candidates = [["no", "Maybe", " ", "maybe!", "It is"], ["Well"], ["NO", ""]]
    found = judges.contradictions(ModelJudge(ask), [CASE] * 3, candidates)
    assert found == [
        Contradiction("It is", "sampled"),
        Contradiction("Yes.", "written"),
        Contradiction("Maybe.", "written"),
    ]
    assert "1. Maybe\n2. It is\n\nWhich" in asked[0][0]["content"]


def test_failures_of_one_case_leave_the_others():
    ask, _ = saying(Failed("busy"), "none", "1", "Answer: no")
    found = judges.contradictions(ModelJudge(ask, retries=0), [CASE] * 3, [["a"], ["b"], ["c"]])
    assert found[0] == Failed("busy") and isinstance(found[1], Unreadable)
    assert found[2] == Contradiction("c", "sampled")
    nothing = judges.contradictions(Labelled(), [Case("1", "Why?", "For a reason.")], [["For none."]])
    assert isinstance(nothing[0], NoContradiction)


class Scripted(Labelled):
    """A judge whose scores are drawn by who it is, the case and how often it was asked of it."""

    def __init__(self, number):
        vars(self).update(number=number, calls={}, batches=[])

    def alone(self, case):
        draw = random.Random(f"{self.number} {case.id}")

        def judge(answer, previous):
            return draw.choice([previous, 0.2, 0.4, None if self.number else 0.8])

        return judge

    def relevance(self, cases, answers, previous):
        self.batches.append(len(cases))
        alone = [self.calls.setdefault(case.id, self.alone(case)) for case in cases]
        return [judge(answer, before) for judge, answer, before in zip(alone, answers, previous, strict=True)]


def test_debates_together_are_the_debates_alone():
    cases = [CASE._replace(id=str(i)) for i in range(40)]
    alone = [mmedpo.debate([Scripted(n).alone(case) for n in range(3)], "Yes.") for case in cases]
    scripted = [Scripted(n) for n in range(3)]
    together = judges.debates(scripted, cases, ["Yes."] * 40)
    assert together == alone
    assert {one.agreed for one in alone} == {True, False} and len({len(one.history) for one in alone}) > 3
    assert all(len(judge.batches) <= 5 for judge in scripted)  # one call a round for all rows


def test_a_judge_that_fails_is_passed_over_in_a_debate():
    silent, sure = ModelJudge(lambda prompts: [Failed("gone")] * len(prompts)), Labelled()
    (found,) = judges.debates([silent, sure], [CASE], ["Yes."])
    assert found == (0.6, True, (0.6,))  # cardiomegaly's urgency
    assert judges.debates([silent], [CASE, CASE], ["Yes.", "Yes."]) == [Failed("gone")] * 2


@pytest.mark.parametrize(
    ("text", "stated", "denied"),
    [
        ("Stable cardiomegaly without edema.", {"cardiomegaly"}, {"edema"}),
        (
            "No effusion, pneumothorax or focal consolidation",
            set(),
            {"pleural effusion", "pneumothorax", "airspace opacity"},
        ),
        ("No effusion but a small pneumothorax", {"pneumothorax"}, {"pleural effusion"}),
        ("Effusions have resolved; new nodule.", {"nodule"}, {"pleural effusion"}),
        ("Right effusion. No left effusion.", {"pleural effusion"}, set()),
        ("Heart size is normal. Lungs are clear.", set(), set()),
        ("Dextroscoliosis; note pneumothoraces", {"scoliosis", "pneumothorax"}, set()),
        ("massive", set(), set()),
    ],
)
def test_findings_are_read_by_words(text, stated, denied):
    assert judges.read_findings(text) == (stated, denied)


def test_what_is_normal_denies_all_and_what_is_not_acute_denies_what_is():
    acute = {name for name, finding in judges.FINDINGS.items() if finding.acute}
    for text in ("Normal chest.", "No abnormality", "Unremarkable chest x-ray", "The examination is normal"):
        assert judges.read_findings(text).denied == set(judges.FINDINGS)
    assert judges.read_findings("No acute cardiopulmonary abnormality.").denied == acute
    assert judges.read_findings("No active disease. Stable edema.") == ({"edema"}, acute - {"edema"})


@pytest.mark.parametrize(
    ("case", "candidates", "picked"),
    [
        (Case("1", "Is it red?", "yes"), ["It may be", "yes indeed", "No.", "not at all"], 2),
        (Case("1", "Is it red?", "No"), ["I would say yes"], 0),
        (Case("1", "Is it red?", "yes"), ["Yes, no doubt", "perhaps"], None),
        (Case("1", "What colour?", "red"), ["red or blue", "a blue one", "green"], 2),
        (Case("1", "What shape?", "circle"), ["a round circle", "square"], None),
        (Case("1", "Which side?", "left", choices=("left", "right")), ["on the left", "on the right"], 1),
        (Case("1", "?", "No acute disease.", frozenset({"normal"})), ["Clear lungs.", "Cardiomegaly and effusion", "A mass"], 1),
        (Case("1", "?", "Small effusion. No edema", frozenset({"Effusion"})), ["Small", "Edema", "No edema"], 1),
        (Case("1", "?", "Stable scoliosis", frozenset({"Scoliosis"})), ["No acute disease", "No edema"], None),
        (Case("1", "?", "Small effusion"), ["Normal chest"], None),  # no labels
        (Case("1", "?", "Small effusion", frozenset({"Effusion"})), [], None),
    ],
)  # fmt: skip
def test_rules_pick_by_closed_answers_and_labels(case, candidates, picked):
    assert Labelled().pick([case], [candidates]) == [picked]


def test_rules_write_by_a_hash_of_the_case():
    write = lambda case, **options: Labelled(**options).write([case])[0]
    assert write(Case("1", "Is it?", "Yes.")) == "No." and write(Case("1", "Is it?", "no")) == "yes"
    colours = {write(Case(str(i), "What colour?", "red")) for i in range(60)}
    assert colours == {"black", "blue", "brown", "gray", "green", "teal", "yellow"}
    assert write(Case("7", "?", "left", choices=("left", "right"))) == "right"
    report = Case("7", "?", "No acute disease.", frozenset({"normal"}))
    assert write(report) == write(report) and len({write(report, seed=seed) for seed in range(30)}) > 8
    assert judges.read_findings(write(report)).stated
    ill = Case("8", "?", "Pneumothorax and scoliosis.", frozenset({"Scoliosis"}))
    assert write(ill) == "There is no evidence of pneumothorax."
    assert write(ill, others={"8": "Normal chest."}) == "Normal chest."
    assert (
        write(ill, others={"8": "A tortuous aorta."}) == "There is no evidence of pneumothorax."
    )  # it contradicts nothing
    assert write(Case("9", "Why?", "For a reason.")) is None


def test_relevance_by_rules_is_the_urgency_of_what_differs():
    relevance = lambda case, answer, previous=None: Labelled().relevance([case], [answer], [previous])[0]
    normal = Case("1", "?", "No acute disease.", frozenset({"normal"}))
    assert relevance(normal, "Scoliosis.") == 0.2 and relevance(normal, "Scoliosis and a pneumothorax.") == 1.0
    assert relevance(Case("1", "?", "Effusion", frozenset({"x"})), "Normal chest") == 0.8
    assert relevance(Case("1", "Is there a mass?", "no"), "yes", 0.3) == 0.9
    assert relevance(Case("1", "What colour?", "red"), "blue") == relevance(normal, "A tortuous aorta.") == 0.5


def test_rules_on_the_real_reports():
    """No report contradicts itself; of normal ones under another normal's words almost none does; all that is written does."""
    try:
        found = reports.read_archive(reports.archive_path())
    except ModuleNotFoundError:
        pytest.skip("needs the package torchxrayvision: make assets")
    cases = [Case(row["id"], "Impression?", row["answer"], found.labels[row["id"]]) for row in found.rows][::4]
    assert set(Labelled().pick(cases, [[case.answer] for case in cases])) == {None}
    normal = [case for case in cases if case.labels == {"normal"}]
    shifted = [[case.answer] for case in normal[1:] + normal[:1]]
    wrong = [one for one in Labelled().pick(normal, shifted) if one is not None]
    assert len(normal) > 100 and len(wrong) <= 0.05 * len(normal)
    pairs = {pair["id"]: pair["rejected"] for pair in reports.contradicted_pairs(found.rows, found.labels)}
    judge = Labelled(others=pairs)
    written = [(case, text) for case, text in zip(cases, judge.write(cases), strict=True) if text is not None]
    assert len(written) > len(cases) // 2
    assert judge.pick([case for case, _ in written], [[text] for _, text in written]) == [0] * len(written)
