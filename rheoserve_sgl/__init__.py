"""RheoServe: an SGLang extension with a two-tier KV cache and hybrid sparse attention."""

__version__ = "0.1.0"

BACKEND_NAME = "rheoserve"
SGLANG_VERSION = "0.5.17"
# Tokens of a page, and so of a block (one page of one layer and one KV head).
PAGE_TOKENS = 64
