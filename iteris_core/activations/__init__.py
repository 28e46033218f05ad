"""Observes the inputs and outputs of a model's sites while it runs reference and merged rows at
once."""
