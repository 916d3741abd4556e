"""Exports a language model as a folder for transformers. Training and inference don't need it."""
