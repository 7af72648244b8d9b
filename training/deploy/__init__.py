"""Use of a trained run: loading it without its data, predictions for videos, pages that explain them."""
