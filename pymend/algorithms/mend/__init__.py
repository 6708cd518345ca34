"""MEND: the algorithm, its network, its running moments."""
