"""Tokenizers, templates, images, records and mixtures of data sets; also safe file writing.

Every file may import it; it imports no other room."""
