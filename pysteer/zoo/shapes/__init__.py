"""Captioned coloured shapes: captions, renderer, tokenizer, classifier and evaluation of the bundled generator."""
