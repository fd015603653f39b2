"""Llama-3-8B with S²FT as its paper trains it on arithmetic: 3% of the channels of every down projection.

    jaxmethods plan  configs/llama3_8b_s2ft.py
    jaxmethods train configs/llama3_8b_s2ft.py --data gs://BUCKET/train.jsonl --workdir gs://BUCKET/runs/llama3_8b_s2ft

56 M trained parameters (0.70%). https://arxiv.org/abs/2412.06289, appendix: three epochs of batches of 64; `steps` here are
those of Math10K. The hub asks you to accept Meta's licence before it gives the weights; `--model FOLDER` takes a local copy.
"""

from jaxmethods.adapters import S2FT
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model="meta-llama/Meta-Llama-3-8B",
        data=Data(train="data/train.jsonl", sequence_length=2048),
        workdir="runs/llama3_8b_s2ft",
        adapters={"mlp/down_proj": S2FT(side="in", fraction=0.03)},
        optimizer=Optimizer(learning_rate=1e-3, schedule="linear", warmup=100, b2=0.95),
        steps=469,
        batch_size=64,
        compute_dtype="bfloat16",
        param_dtype="bfloat16",
        remat="full",
        checkpoint_every=100,
    )
