"""Small real tokenizers, trained here: a ChatML one, and ones that treat spaces and BOS in other ways."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "what is the capital of France? Paris is the capital of France.",
    "user assistant system: how many cats are there? there are three cats on the mat.",
    "the heart is normal in size. the lungs are clear. no acute disease.\n\nno pleural effusion.\n",
] * 3


def train(pre_tokenizer, decoder, specials, alphabet=()):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=specials, initial_alphabet=list(alphabet), show_progress=False
        ),
    )
    return tokenizer


def byte_level(specials):
    return train(
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        specials,
        pre_tokenizers.ByteLevel.alphabet(),
    )


@pytest.fixture(scope="session")
def chatml():
    """Byte-level BPE with a ChatML template; the end of a turn is also EOS."""
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def plain():
    """Byte-level BPE without a chat template, with EOS and no BOS."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(["<eos>"]), eos_token="<eos>")


@pytest.fixture(scope="session")
def spaced():
    """As Llama 2's: a space is put before every text, and BOS before that; no template."""
    tokenizer = train(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("\n", "isolated")]
        ),
        decoders.Metaspace(prepend_scheme="first"),
        ["<s>", "</s>"],
        "\n'ab",
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def with_template(chatml):
    """The ChatML tokenizer under another template."""

    def change(template):
        other = PreTrainedTokenizerFast(
            tokenizer_object=chatml.backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
        )
        other.chat_template = template
        return other

    return change
