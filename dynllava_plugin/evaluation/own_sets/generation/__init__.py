"""The paper's generation sets: built from LVIS-Instruct4V and ShareGPT4V, read by both harnesses."""
