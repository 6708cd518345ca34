"""Other people's formats: adapters of PEFT to write, editors of the paper's code to read."""
