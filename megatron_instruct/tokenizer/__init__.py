"""Tokenizers with exact ids: text in, ids out, without special tokens; text that spells one, such as "</s>", becomes ordinary tokens.

`load_tokenizer` reads a Hugging Face folder (tokenizer.json) or a sentencepiece .model file, each through the library that it was made
for. Everything here works without torch and transformers.
"""

from megatron_instruct.tokenizer.flat import FlatTokens, token_dtype
from megatron_instruct.tokenizer.load import TOKENIZER_FILES, copy_tokenizer, load_tokenizer
from megatron_instruct.tokenizer.protocol import Tokenizer

__all__ = ["TOKENIZER_FILES", "FlatTokens", "Tokenizer", "copy_tokenizer", "load_tokenizer", "token_dtype"]
