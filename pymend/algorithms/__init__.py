"""The algorithms that MEND is compared with, behind the same calls."""
