"""Llama-3-8B-Instruct with every parameter trained, for a pod slice of 64 chips or more.

    jaxmethods plan  configs/llama3_8b_full.py
    jaxmethods train configs/llama3_8b_full.py --data gs://BUCKET/train.jsonl --workdir gs://BUCKET/runs/llama3_8b_full

The hub asks you to accept Meta's licence before it gives the weights; `--model FOLDER` takes a local copy.
"""

from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        data=Data(train="data/train.jsonl", sequence_length=4096),
        workdir="runs/llama3_8b_full",
        optimizer=Optimizer(learning_rate=1e-5, weight_decay=0.1, warmup=0.03),
        steps=1000,
        batch_size=128,
        compute_dtype="bfloat16",
        param_dtype="bfloat16",
        remat="full",
        checkpoint_every=100,
    )
