"""
    python -m tests.faults.soak_quantizer --cycles 500 --json soak.json

quantizes, saves and reloads a model again and again, and records memory and open files after each cycle.
"""

import argparse
import gc
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.faults.quantizer import digest, quantized, reference, tokenizer
from trl_gopd.d2quant.hf_quantizer import save_quantized


def cycles(count: int, folder: Path) -> list[dict[str, Any]]:
    """
    One dictionary a cycle: its number, resident memory in MiB, and how many files are open. Every cycle quantizes with
    a work folder, saves, and reloads; what comes back is compared.
    """
    from transformers import AutoModelForCausalLM

    rows = []
    for cycle in range(count):
        work, packed = folder / "work", folder / "packed"
        save_quantized(quantized(work_dir=str(work)), packed, tokenizer=tokenizer())
        model = AutoModelForCausalLM.from_pretrained(packed)
        assert digest(model) == reference()[1]
        del model
        shutil.rmtree(work)
        shutil.rmtree(packed)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGESIZE") / 2**20
        rows.append({"cycle": cycle, "memory_mib": round(memory, 2), "open_files": len(os.listdir("/proc/self/fd"))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = cycles(args.cycles, Path(folder))
    for row in rows[:: max(1, len(rows) // 20)]:
        print(row)
    if args.json:
        args.json.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
