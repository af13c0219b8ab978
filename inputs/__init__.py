"""How raw input becomes something a model can read: tokenizers, templates, images, records and mixtures, and safe
files; anything may call it, and it calls no other room."""
