"""A job's rows, run through a model: micro-batches, the memory budget, sweeps and iterations."""
