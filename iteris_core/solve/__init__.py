"""Reductions of the tokens of one site, and the closed form that is solved from them."""
