"""Trains a byte-level BPE from text.

Special tokens have the first ids, in this order: begin, end, padding, the roles of a chat, the recipe's own.
"""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llm.errors import InputError
from llm.text.selection import in_batches
from llm.tokenizer.chat_template import BEGIN, CHAT_TEMPLATE, END, PADDING, SPECIAL_TOKENS
from llm.tokenizer.pretokenizers import WHOLE_WORDS_FIRST, PreTokenizerName, pre_tokenizer
from llm.tokenizer.tokenizer import TextTokenizer

_BATCH = 1000  # texts whose words the trainer counts on all cores at once


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    min_frequency: int,
    pre_tokenizer_name: PreTokenizerName,
    special_tokens: Sequence[str] = (),
    allow_smaller: bool = False,
) -> TextTokenizer:
    """A BPE of `vocab_size` tokens, special tokens included, trained on `texts`; `special_tokens` come after the usual ones.

    A pair of tokens is merged only if it occurs `min_frequency` times. InputError if the text has too few such pairs for the
    vocabulary, unless `allow_smaller`. Source: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909
    """
    specials = [*SPECIAL_TOKENS, *special_tokens]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(pre_tokenizer_name)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(in_batches(texts, _BATCH), trainer=trainer)
    tokenizer.model.ignore_merges = pre_tokenizer_name in WHOLE_WORDS_FIRST
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, begin)]
    )
    if (found := tokenizer.get_vocab_size()) < vocab_size and not allow_smaller:
        raise InputError(
            f"vocab_size: expected at most {found:,}, got {vocab_size:,}: no further pair of tokens occurs {min_frequency} "
            "times in the text; lower vocab_size or min_frequency, or add text"
        )
    named = {"bos_token": BEGIN, "eos_token": END, "pad_token": PADDING}
    return TextTokenizer(tokenizer, named, CHAT_TEMPLATE)
