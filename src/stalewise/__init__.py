"""Train deep networks over devices of uneven speed with Diversely Stale Parameters (arXiv:1909.02625)."""
