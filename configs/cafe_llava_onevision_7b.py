"""CAFe on LLaVA-OneVision-7B (single-image stage), all three parts trained, as published but for the contrastive batch.

    jaxmethods plan configs/cafe_llava_onevision_7b.py --topology v5p:4x4x4
    jaxmethods train configs/cafe_llava_onevision_7b.py --distributed      # on every host of the slice

The released code has 2 rows a GPU, and so a few hundred negatives; here 4096 rows are one contrastive batch, of which each chip
encodes one at a time (`objective.chunk`). `data/captions.jsonl` stands for rows with "images" and "messages", such as the caption
subsets of LLaVA-OneVision-Data that the paper names. Where a published run on W devices had `con_weight` c, `alpha_con` is c / W.
"""

from jaxmethods.data import Data
from jaxmethods.launch import Mesh, Run
from jaxmethods.objectives import CAFe
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model="llava-hf/llava-onevision-qwen2-7b-si-hf",
        # Five crops: the whole picture and 2 x 2 of it, which is what photographs of about 640 x 480 pixels make.
        data=Data(train="data/captions.jsonl", sequence_length=4096, pack=False, crops=5),
        workdir="runs/cafe_llava_onevision_7b",
        objective=CAFe(temperature=0.05, chunk=64, embedding_length=4096),
        optimizer=Optimizer(learning_rate=1e-5, schedule="cosine", warmup=0.03, groups=(("vision_tower/", 0.2),)),
        steps=1000,
        batch_size=4096,
        mesh=Mesh(fsdp=-1),
        compute_dtype="bfloat16",
        param_dtype="bfloat16",
        remat="full",
        checkpoint_every=100,
    )
