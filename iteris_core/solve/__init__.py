"""Reductions of one site's tokens, and the closed-form solutions from them."""
