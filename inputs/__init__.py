"""Raw input becomes what a model reads: tokenizers, templates, images, records and mixtures; also safe file writing.
Everything may call it; it calls no other room."""
