"""Tokenizers with exact ids: text in, ids out, without special tokens; text that spells one, such as "</s>", becomes ordinary tokens.

`load_tokenizer` reads a Hugging Face folder (tokenizer.json), a sentencepiece .model file, or a file of the tiktoken family (.tiktoken,
tekken.json), each through the library that it was made for. `with_fast_backend` puts gigatoken in the library's place once it is proved
to give the same ids. Everything here works without torch and transformers.
"""

from megatron_instruct.tokenizer.fast import fast_tokenizer
from megatron_instruct.tokenizer.fast_proof import Backend, FastChoice, with_fast_backend
from megatron_instruct.tokenizer.flat import FlatTokens, token_dtype
from megatron_instruct.tokenizer.load import TOKENIZER_FILES, copy_tokenizer, load_tokenizer
from megatron_instruct.tokenizer.protocol import Tokenizer

__all__ = [
    "TOKENIZER_FILES",
    "Backend",
    "FastChoice",
    "FlatTokens",
    "Tokenizer",
    "copy_tokenizer",
    "fast_tokenizer",
    "load_tokenizer",
    "token_dtype",
    "with_fast_backend",
]
