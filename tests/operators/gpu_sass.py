"""Reads machine code of an NVIDIA GPU: how much of a kernel's loop is arithmetic."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path


def disassembler() -> str | None:
    """nvdisasm, on the PATH or from the package nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if Path(folder, "cu13", "bin", "nvdisasm").exists():
            return str(Path(folder, "cu13", "bin", "nvdisasm"))
    return shutil.which("nvdisasm")


def longest_loop(cubin: Path) -> list[str]:
    """Opcodes of the longest loop, in order."""
    text = subprocess.run([disassembler(), "-c", cubin], check=True, capture_output=True, text=True).stdout
    labels, instructions, loops = {}, [], []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_.]*)(.*)", line)
        if instruction:
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1].startswith("BRA") and target and target[0] in labels:
                loops.append((labels[target[0]], len(instructions)))
            instructions.append(instruction[1])
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return instructions[start : end + 1]


def arithmetic_share(cubin: Path) -> float:
    """FADD and FFMA among the instructions of the longest loop."""
    loop = longest_loop(cubin)
    return sum(opcode.startswith(("FADD", "FFMA")) for opcode in loop) / len(loop)
