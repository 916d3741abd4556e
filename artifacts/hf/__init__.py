"""A trained language model as a folder of files that transformers loads. Nothing here is needed to train or to answer."""
