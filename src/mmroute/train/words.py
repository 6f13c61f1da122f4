"""Tokenizers of whole words, for the small models and their closed vocabulary."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmroute.tasks._texts import BOS, EOS, PAD, UNK

__all__ = ["word_tokenizer"]

_MARKS = r"[,?;()]|\.(?!\d)|(?<!\d)\."
"""Stand alone even where they touch a word; a colon belongs to mode words and `answer:`, a point to a number."""


def word_tokenizer(
    vocabulary: Sequence[str],
    special: Sequence[str],
    pairs: tuple[Sequence[str], Sequence[str]] | None = None,
    **named: Any,
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: split at spaces and marks, unknown words become `<unk>`.

    Args:
        vocabulary: the words; their index is the token id.
        special: those that no text holds by chance, the four below among them.
        pairs: words of the first kind stay together with one of the second kind behind them; the vocabulary holds such
            pairs with a space between.
        named: further tokens by their role, such as `sep_token`.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK))
    spaces: Any = pre_tokenizers.WhitespaceSplit()
    if pairs is not None:
        first, second = ("|".join(words) for words in pairs)
        spaces = pre_tokenizers.Split(Regex(rf"(?<!\b(?:{first}))\s+|\s+(?!(?:{second})\b)"), "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex(_MARKS), "isolated")])
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        **named,
    )
