"""Data: records on disk to batches of tokens.

data = Data(train="train.jsonl", evaluation="heldout.jsonl", sequence_length=1024)
rows, report = build(data, tokenizer)
print(report)
stream = iter(batches(rows, batch_size=8, seed=data.seed))
batch = next(stream)  # tokens, target_mask, segment_ids, positions
"""

from jaxmethods.data.build import Report, build
from jaxmethods.data.chat import Renderer, prompt_tokens, render
from jaxmethods.data.config import Data, Source
from jaxmethods.data.examples import Example, Examples, split_text, truncate
from jaxmethods.data.packing import Batch, PackedRows, Plan, best_fit, one_each
from jaxmethods.data.pictures import MARKER, blank, located
from jaxmethods.data.pipeline import Batches, BatchIterator, Mixture, batches, evaluation_batches
from jaxmethods.data.prompts import prompt_batch
from jaxmethods.data.sources import Place, Records, open_records, records_in_memory
from jaxmethods.data.views import Conversation, Number, Pair, View, Views, batch_shapes

__all__ = [
    "MARKER",
    "Batch",
    "BatchIterator",
    "Batches",
    "Conversation",
    "Data",
    "Example",
    "Examples",
    "Mixture",
    "Number",
    "PackedRows",
    "Pair",
    "Place",
    "Plan",
    "Records",
    "Renderer",
    "Report",
    "Source",
    "View",
    "Views",
    "batch_shapes",
    "batches",
    "best_fit",
    "blank",
    "build",
    "evaluation_batches",
    "located",
    "one_each",
    "open_records",
    "prompt_batch",
    "prompt_tokens",
    "records_in_memory",
    "render",
    "split_text",
    "truncate",
]
