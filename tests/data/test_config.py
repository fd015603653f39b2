"""Configs are plain values: coerced, checked, and the same after a trip through JSON."""

import dataclasses
import json

import pytest

from jaxmethods.data import Data, Source


def test_a_path_is_a_source_is_several():
    one = (Source("a.jsonl"),)
    for given in ("a.jsonl", Source("a.jsonl"), ("a.jsonl",), ["a.jsonl"], one):
        assert Data(train=given).train == one
    assert Data(train=["a.jsonl", Source("b.jsonl", weight=2.0)]).train == (*one, Source("b.jsonl", weight=2.0))
    assert Data().train == () == Data().evaluation


def test_json_round_trip():
    data = Data(train=["a.jsonl", Source("b", weight=0.5, prompt="q", form="answer")], evaluation="e.json", seed=3)
    fields = json.loads(json.dumps(dataclasses.asdict(data)))
    for name in ("train", "evaluation"):
        fields[name] = [Source(**source) for source in fields[name]]
    assert Data(**fields) == data
    assert hash(data) == hash(dataclasses.replace(data))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Source(""), "needs a path"),
        (lambda: Source("a", weight=0.0), "a: weight=0.0 must be a positive number"),
        (lambda: Source("a", weight=float("nan")), "weight=nan"),
        (lambda: Source("a", form="chats"), "form='chats' is none of auto, answer, chat, text"),
        (lambda: Source("a", prompt=""), "the name of the prompt field is empty"),
        (lambda: Data(evaluation=Source("a", weight=2.0)), "weight=2.0 has no meaning in evaluation"),
        (lambda: Data(sequence_length=1), "sequence_length=1 must be at least 2"),
        (lambda: Data(evaluation_rows=0), "evaluation_rows=0 must be positive"),
        (lambda: Data(seed=-1), "seed=-1 must not be negative"),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()
