"""Llama-3-8B-Instruct tuned on preference pairs by DPO, with LoRA on every linear map, for a pod slice of 16 chips or more.

    jaxmethods plan  configs/dpo_llama3_8b.py --topology v5p:4x4x4
    jaxmethods train configs/dpo_llama3_8b.py --data gs://BUCKET/pairs.jsonl --workdir gs://BUCKET/runs/dpo_llama3_8b
    jaxmethods train configs/dpo_llama3_8b.py --objective.cache gs://BUCKET/reference.parquet   # scores each pair once

The reference is the model with its adapters off: nothing is held twice. A pair is two rows of the batch.
"""

from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.objectives import Preference
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        data=Data(train="data/pairs.jsonl", sequence_length=4096, pack=False),
        workdir="runs/dpo_llama3_8b",
        adapters={"(q|k|v|o|gate|up|down)_proj": LoRA(rank=64, alpha=128)},
        objective=Preference(beta=0.1),
        optimizer=Optimizer(learning_rate=5e-6, schedule="cosine", warmup=0.1),
        steps=500,
        batch_size=64,
        compute_dtype="bfloat16",
        param_dtype="bfloat16",
        remat="full",
        checkpoint_every=100,
    )
