"""Answers found in responses of all kinds, and prompts that can be read back."""

import pytest

from jaxmethods.evals.scylla import CUE, TASKS, benchmark, extract, probing, prompt, read_prompt
from jaxmethods.evals.scylla.prompting import second


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 7", 7),
        ("the ANSWER is: **12**.", 12),
        ("Compare 3 and 9.\nThe answer is\n`3`", 3),
        ("The answer is $\\boxed{41}$ since 99 is larger", 41),
        ("First, the answer is 5. No: the answer is 6.", 6),  # the last one
        ("Answer: 8. The answer is 9. Result: 10", 9),  # cues in their order
        ("Result: 10", 10),
        ("I see 4, then 5", 5),  # the last number anywhere
        ("The answer is -5", -5),  # a sign counts
        ("The answer is 9,812.", 9812),  # thousands
        ("The answer is 9,812,004", 9812004),
        ("The answer is 12.0", 12),
        ("The answer is 12.5", None),
        ("I do not know", None),
        ("", None),
        ("The answer is " + "9" * 400, None),
        ("```\nThe answer is 3\n```", 3),
    ],
)
def test_numbers(text, number):
    assert extract("FindMinimum", text) == number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is [1, 2, 3]", [1, 2, 3]),
        ("Steps: [9, 9]. The answer is: **[1,2,\n 3]**", [1, 2, 3]),
        ("The answer is [1, 2]. Wait, the answer is [2, 1].", [2, 1]),
        ("Sorted, [4, 5] it is; 6 comes after", [4, 5]),
        ("The answer is [[1, 2], [3]]", [1, 2]),  # the first list after the cue; no nesting
        ("The answer is [1 2 3]", [1, 2, 3]),
        ("The answer is [1, two]", None),
        ("The answer is [1, 2.0, -3]", [1, 2, -3]),
        ("The answer is []", []),
        ("The answer is 1, 2, 3", None),
        ("```python\n[5, 6]\n```", [5, 6]),
        ("[" * 3000, None),
    ],
)
def test_lists(text, found):
    assert extract("SortNumbers", text) == found


def test_prompts_are_read_back():
    for name, splits in benchmark(items=2).items():
        task = TASKS[name]
        for shots, items in splits.values():
            for count in (0, 8):
                text = prompt(task, items[0].example, shots=shots[:count])
                assert read_prompt(text) == (task, items[0].example)
                assert text.count("The answer is ") == count + 1 and text.endswith("step by step.")
                assert read_prompt(second(text, "Well, 3 is it.")) == (task, items[0].example)
    with pytest.raises(ValueError, match="is no prompt of these tasks"):
        read_prompt("What is 1 + 1?")


def test_what_is_told():
    task, example = TASKS["SubsetSumInRange"], ([1, 2, 3, 4, 5, 6], (12, 14))
    told = prompt(task, example)
    assert "$l$ = 1 2 3 4 5 6, $a$ = 12, $b$ = 14" in told and "4 to 6 entries" in told
    assert "4 to 6" not in prompt(task, example, sizes="untold") and "4 to 6" not in probing(task)
    assert "\\begin{bmatrix} 0 & 1 \\\\ 1 & 0 \\end{bmatrix}" in prompt(TASKS["TSP"], [[0, 1], [1, 0]])
    assert "$l$ = 1 2 3 4, $k$ = 2" in prompt(TASKS["FindTopk"], ([1, 2, 3, 4], 2))
    assert second("p", "r") == f"p\n\nr\n\n{CUE}"
    with pytest.raises(ValueError, match="sizes='some' is unknown"):
        prompt(task, example, sizes="some")
