"""Dense linear algebra that knows nothing of sites: precision, and low-rank cuts."""
