"""Dense linear algebra that knows nothing of sites: precision, Cholesky factors, low-rank cuts."""
