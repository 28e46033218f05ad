"""The inputs and outputs of a model's sites while it runs, for reference rows and merged rows at
once."""
