"""Llama-3-70B-Instruct with every parameter trained, for a pod of 512 v5p chips.

    jaxmethods plan  configs/llama3_70b_full.py --topology v5p:8x8x8
    jaxmethods train configs/llama3_70b_full.py --data gs://BUCKET/train.jsonl --workdir gs://BUCKET/runs/llama3_70b_full

The hub asks you to accept Meta's licence before it gives the weights; `--model FOLDER` takes a local copy.
"""

from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model="meta-llama/Meta-Llama-3-70B-Instruct",
        data=Data(train="data/train.jsonl", sequence_length=4096),
        workdir="runs/llama3_70b_full",
        optimizer=Optimizer(learning_rate=5e-6, weight_decay=0.1, warmup=0.03),
        steps=1000,
        batch_size=512,
        compute_dtype="bfloat16",
        param_dtype="bfloat16",
        remat="full",
        checkpoint_every=100,
    )
