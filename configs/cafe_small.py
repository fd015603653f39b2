"""CAFe on a small model that sees (`make vlm` makes it): captions of real pictures, embedded and written by the same weights.

    jaxmethods train configs/cafe_small.py
    jaxmethods evaluate retrieval runs/cafe_small --against-base --sheet retrieval.png
    jaxmethods evaluate completion runs/cafe_small

`--objective.alpha-con 0` and `--objective.alpha-lm 0` are the study's other two arms (benchmarks/cafe_study.py, docs/cafe.md).
"""

from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.objectives import CAFe
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model="build/small_vlm",
        data=Data(
            train="build/pictures/captions.jsonl",
            evaluation="build/pictures/captions_heldout.jsonl",
            sequence_length=80,
            pack=False,
        ),
        workdir="runs/cafe_small",
        adapters={"model/layers/.*_proj": LoRA(rank=16)},
        trained="projector/|/adapter/",
        objective=CAFe(temperature=0.05, embedding_length=64),
        optimizer=Optimizer(learning_rate=1e-3, warmup=5),
        steps=60,
        batch_size=16,
        evaluation_batch_size=27,
        evaluate_every=30,
        checkpoint_every=60,
    )
