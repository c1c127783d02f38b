"""Online training of EAGLE-3 drafts inside a running SGLang server."""

__version__ = "0.1.0"
