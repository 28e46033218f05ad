"""What the tokens of one site are reduced to, and the closed form that is solved from it."""
