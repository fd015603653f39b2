"""Llama-3-70B-Instruct with LoRA on every linear map, for a pod of 512 v5p chips.

    jaxmethods plan  configs/llama3_70b_lora.py --topology v5p:8x8x8
    jaxmethods train configs/llama3_70b_lora.py --data gs://BUCKET/train.jsonl --workdir gs://BUCKET/runs/llama3_70b_lora

The hub asks you to accept Meta's licence before it gives the weights; `--model FOLDER` takes a local copy.
"""

from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model="meta-llama/Meta-Llama-3-70B-Instruct",
        data=Data(train="data/train.jsonl", sequence_length=4096),
        workdir="runs/llama3_70b_lora",
        adapters={"(q|k|v|o|gate|up|down)_proj": LoRA(rank=64, alpha=128)},
        optimizer=Optimizer(learning_rate=1e-4, warmup=0.03),
        steps=1000,
        batch_size=512,
        compute_dtype="bfloat16",
        param_dtype="bfloat16",
        remat="full",
        checkpoint_every=100,
    )
