"""A byte-level tokenizer of some 370 tokens, special ones and others that were added."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def main() -> None:\n    print('hello, world')\n",
    "Ünïcödé: 你好，世界 🎉👩‍👩‍👧 привет",
]


def byte_level() -> Tokenizer:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(TEXT, trainer)
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.add_tokens([AddedToken("<think>", normalized=False), AddedToken(" mööse", normalized=False)])
    return library
