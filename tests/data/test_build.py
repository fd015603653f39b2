"""From files to rows: nothing lost, everything counted."""

import json

import numpy as np
import pytest

from jaxmethods.data import Data, Mixture, Report, Source, batches, build, evaluation_batches, render


def pairs(count, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "log", "is", "no"]
    return [
        {
            "prompt": f"{i} " + " ".join(rng.choice(words, rng.integers(1, longest))),
            "answer": " ".join(rng.choice(words, 3)),
        }
        for i in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def segments(rows):
    """(tokens, targets) of every example found in the rows."""
    found = []
    for row in (rows[i] for i in range(len(rows))):
        for segment in range(1, row["segment_ids"].max() + 1):
            at = row["segment_ids"] == segment
            found.append((tuple(row["tokens"][at].tolist()), tuple(row["target_mask"][at].tolist())))
    return sorted(found)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_the_rendered_examples(chatml, tmp_path, pack):
    given = pairs(50)
    data = Data(train=write(tmp_path / "a.jsonl", given), sequence_length=128, pack=pack)
    rows, report = build(data, chatml)
    rendered = [render(row, chatml) for row in given]
    assert segments(rows) == sorted((tuple(one.tokens.tolist()), tuple(one.target_mask.tolist())) for one in rendered)
    assert report == Report(
        128,
        examples=50,
        tokens=sum(len(one.tokens) for one in rendered),
        target_tokens=sum(int(one.target_mask.sum()) for one in rendered),
        rows=len(rows),
    )
    assert len(rows) == 50 if not pack else len(rows) < 25 and report.fill > 0.85
    in_memory, again = build(Data(sequence_length=128, pack=pack), chatml, rows=given)
    assert again == report and segments(in_memory) == segments(rows)


def test_what_is_cut_and_dropped_is_counted(chatml, plain):
    given = [
        {"prompt": "cat", "answer": "sat"},
        {"prompt": "cat " * 50, "answer": "sat"},  # loses its beginning
        {"prompt": "cat", "answer": "sat " * 50},  # loses its end, and what it may of the prompt
    ]
    rows, report = build(Data(sequence_length=32), chatml, rows=given)
    assert (report.examples, report.dropped, report.prompts_cut, report.answers_cut) == (3, 0, 2, 1)
    assert all(any(mask) for _, mask in segments(rows))
    assert str(report).startswith("3 examples (2 prompts cut, 1 answers cut), ") and "\n" not in str(report)
    rows, report = build(
        Data(sequence_length=8), plain, rows=[{"text": "the cat sat on the mat " * 4}, {"text": "the"}]
    )
    assert report.texts_split == 1 and report.dropped == 0
    whole = len(render({"text": "the cat sat on the mat " * 4}, plain).tokens)
    assert report.target_tokens == whole - 1 + 1  # of the second, EOS
    assert report.tokens <= report.rows * 8


def test_rows_without_a_target_are_dropped(plain, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer)  # no EOS to predict
    _, report = build(Data(), endless, rows=[{"text": "the"}, {"text": "the cat"}])
    assert (report.examples, report.dropped) == (1, 1)
    with pytest.raises(ValueError, match="no row has a token to predict; all 1 were dropped"):
        build(Data(), endless, rows=[{"text": "the"}])


def test_reports_add_up():
    one = Report(8, examples=2, prompts_cut=1, tokens=10, target_tokens=4, rows=2)
    two = Report(8, examples=1, tokens=6, target_tokens=2, rows=1)
    assert one + two == Report(8, examples=3, prompts_cut=1, tokens=16, target_tokens=6, rows=3)
    assert (one + two).fill == 16 / 24
    assert str(one) == "2 examples (1 prompts cut), 10 tokens (4 targets), 2 rows of 8 (62% full)"
    with pytest.raises(ValueError, match="sequence_length 8 and 16"):
        one + Report(16)


def test_training_sources_are_mixed_by_weight(chatml, tmp_path):
    a = write(tmp_path / "a.jsonl", pairs(40))
    b = write(
        tmp_path / "b.jsonl",
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "dog"}]}] * 9,
    )
    rows, report = build(Data(train=[Source(a, weight=3.0), b], sequence_length=64, pack=False), chatml)
    assert isinstance(rows, Mixture) and rows.weights == (3.0, 1.0)
    assert report.examples == 49
    for number in range(5):
        batch = batches(rows, batch_size=32, seed=0)[number]
        texts = [chatml.decode(row[real > 0]) for row, real in zip(batch["tokens"], batch["segment_ids"], strict=True)]
        assert sum(text.endswith("assistant\ndog<|im_end|>") and "user\nq<|im_end|>" in text for text in texts) == 8


def test_evaluation_reads_every_row_of_every_source_once(chatml, tmp_path):
    a, b = write(tmp_path / "a.jsonl", pairs(13)), write(tmp_path / "b.jsonl", pairs(6, seed=1))
    data = Data(evaluation=[a, b], sequence_length=96)
    rows, report = build(data, chatml, split="evaluation")
    assert report.examples == 19
    targets = sum(int(batch["target_mask"].sum()) for batch in evaluation_batches(rows, 4))
    assert targets == report.target_tokens
    limited = Data(evaluation=[a, b], sequence_length=96, evaluation_rows=5)
    assert build(limited, chatml, split="evaluation")[1].examples == 10  # the first five of each


def test_a_broken_row_is_named_by_file_and_line(chatml, tmp_path):
    path = write(tmp_path / "a.jsonl", [*pairs(3), {"prompt": "a", "respnse": "b"}, *pairs(2)])
    with pytest.raises(ValueError, match=f"^{path}, line 4: no field 'answer'; its fields are prompt, respnse"):
        build(Data(train=path), chatml)
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist([*pairs(2), {"prompt": "a", "answer": None}])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 3: field 'answer' must be text, not null"):
        build(Data(train=str(tmp_path / "a.parquet")), chatml)
    with pytest.raises(ValueError, match="rows given in memory, row 2: field 'answer' is empty"):
        build(Data(), chatml, rows=[*pairs(1), {"prompt": "a", "answer": ""}])


def test_chat_rows_of_arrow_may_have_null_fields(chatml, tmp_path):
    """A column of messages gives every message all fields that any has."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "q", "name": "ann"}, {"role": "assistant", "content": "a"}]
    parquet.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    rows, _ = build(Data(train=str(tmp_path / "a.parquet")), chatml)
    expected, _ = build(Data(), chatml, rows=[{"messages": messages}])
    assert segments(rows) == segments(expected)


def test_data_come_from_one_place(chatml):
    with pytest.raises(ValueError, match=r"no train data: set Data\(train='FILE.jsonl'\)"):
        build(Data(), chatml)
    with pytest.raises(ValueError, match="no evaluation data"):
        build(Data(train="a.jsonl"), chatml, split="evaluation")
    with pytest.raises(ValueError, match=r"train data come both from a.jsonl and from rows in memory"):
        build(Data(train="a.jsonl"), chatml, rows=pairs(1))
