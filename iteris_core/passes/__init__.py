"""Runs a job's rows through a model: micro-batches, the memory budget, sweeps and iterations."""
