"""Small tasks of our own for lm-evaluation-harness, as files."""

import json

QUESTIONS = [
    {"question": "What colour is the mat?", "choices": ["red", "as blue as the log", "green"], "answer": 0},
    {"question": "Who sat on the log, and why?", "choices": ["the cat", "the dog, since it liked logs"], "answer": 1},
    {
        "question": "How many cats are there?",
        "choices": ["three", "four", "none", "three cats on one mat"],
        "answer": 0,
    },
    {"question": "Is the heart normal?", "choices": ["yes", "no"], "answer": 0},
]
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
fewshot_split: test
num_fewshot: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["cat", "."], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[answer]}} {{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


def write_tasks(folder):
    """Task files as a user writes them, and their documents."""
    rows = folder / "questions.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, text in TASKS.items():
        head = (
            f"task: tiny_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test"
        )
        (folder / f"{name}.yaml").write_text(head + text)
    return folder
