"""
AutoRound on given windows, for `d2quant_accuracy.py`, under a Python that has auto-round:

    python benchmarks/autoround_peer.py MODEL FOLDER BITS SEED GROUP_SIZE ITERATIONS BATCH_SIZE THREADS

reads `FOLDER/windows.pt`, integer `(n, tokens)`, and writes `FOLDER/weights.pt`, the state dict of the dense model.
Its format "fake" is not used: it puts the original weights back when it saves.
"""

import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


path, folder = sys.argv[1:3]
bits, seed, group_size, iterations, batch_size, threads = map(int, sys.argv[3:])
torch.set_num_threads(threads)
windows = torch.load(Path(folder, "windows.pt"))
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
quantizer = AutoRound(
    model,
    AutoTokenizer.from_pretrained(path),
    bits=bits,
    group_size=group_size,
    sym=False,
    iters=iterations,
    batch_size=batch_size,
    nsamples=len(windows),
    seqlen=windows.shape[1],
    dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows],
    seed=seed,
    device_map="cpu",
)
model, _ = quantizer.quantize()
torch.save({name: value.float() for name, value in model.state_dict().items()}, Path(folder, "weights.pt"))
