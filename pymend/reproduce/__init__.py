"""The tables of Mitchell et al. (ICLR 2022) on models of any size: ``pymend reproduce``."""
