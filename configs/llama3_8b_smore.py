"""Llama-3-8B-Instruct with S'MoRE on the MLP's three maps, for a pod slice of 16 chips or more.

    jaxmethods plan  configs/llama3_8b_smore.py
    jaxmethods train configs/llama3_8b_smore.py --data gs://BUCKET/train.jsonl --workdir gs://BUCKET/runs/llama3_8b_smore

The hub asks you to accept Meta's licence before it gives the weights; `--model FOLDER` takes a local copy.
"""

from jaxmethods.adapters import SMoRE
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        data=Data(train="data/train.jsonl", sequence_length=4096),
        workdir="runs/llama3_8b_smore",
        # The shape that the paper counts as 104 M trained parameters: 4-4, ranks 4 and 8 (its table of LLaMA-3-8B runs).
        adapters={
            "mlp/(gate|up|down)_proj": SMoRE(experts=(4, 4), fanout=(2, 2), ranks=(4, 8), router_dim=24, gate_dim=32)
        },
        optimizer=Optimizer(learning_rate=1e-4, warmup=0.1),
        steps=1000,
        batch_size=128,
        compute_dtype="bfloat16",
        param_dtype="bfloat16",
        remat="full",
        checkpoint_every=100,
    )
