"""Strings live here: tokenizer, chat templates, incremental detokenizer, stop strings."""
