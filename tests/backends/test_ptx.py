"""The PTX inside csrc/cuda/tile_walk.cuh, which no emulator of C++ sees: evaluated here, a few instructions of it, and
held against what stands beside it for a CPU."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "tile_walk.cuh"
F = np.float32


def blocks():
    """(instructions, operands in the order of %0, %1 .. : C's expressions) of each asm statement."""
    found = []
    for text in re.findall(r"\basm(?: volatile)?\(((?:[^()]|\([^()]*\))*)\);", SOURCE.read_text()):
        text = re.sub(r"//[^\n]*", "", text)
        strings, *operands = re.split(r"\n\s*:", text)
        code = "".join(re.findall(r'"(.*?)"', strings)).replace("\\n", "\n")
        found.append(([line for line in re.split(r"[;\n{}]", code) if line.strip()],
                      re.findall(r"\((\w+)\)", " ".join(operands))))  # fmt: skip
    return found


def value(word, registers):
    return F(struct.unpack(">f", bytes.fromhex(word[2:]))[0]) if word.startswith("0f") else registers[word]


def evaluate(instructions, registers):
    """As the PTX manual says of these instructions; ``registers`` by their names, changed."""
    for line in instructions:
        guard, opcode, rest = re.match(r"\s*(?:@(\w+)\s+)?(\S+)\s*(.*)", line).groups()
        if opcode == ".reg" or (guard and not registers[guard]):
            continue
        to, *names = (name.strip() for name in rest.split(","))
        a, b = [*(value(name, registers) for name in names), None][:2]
        if opcode == "setp.lt.f32":
            registers[to] = bool(a < b)  # of NaN: false
        elif opcode == "max.f32":
            registers[to] = np.fmax(a, b)  # of a number and NaN: the number
        elif opcode == "add.f32":
            registers[to] = F(a + b)
        elif opcode == "mov.b32":
            registers[to] = a
        elif opcode == "mul.sat.f32":
            registers[to] = F(0) if np.isnan(a * b) else np.clip(F(a * b), F(0), F(1))
        elif opcode == "lg2.approx.ftz.f32":
            registers[to] = np.log2(a)
        else:
            raise AssertionError(f"an instruction that is not known here: {line}")


def test_a_step_of_the_walk():
    instructions, operands = next(block for block in blocks() if "recent" in block[1])
    assert operands == ["threshold", "score", "recent", "threshold_", "score_", "number_"]
    numbers = [F(x) for x in (-np.inf, -3.0, -0.0, 0.0, 1.5, 2.0, np.inf, np.nan)]
    for threshold, score, threshold_, score_ in itertools.product(numbers[:-2], numbers[:-2], numbers, numbers):
        registers = {"%0": threshold, "%1": score, "%2": -1, "%3": threshold_, "%4": score_, "%5": 7}
        evaluate(instructions, registers)
        moves = score < threshold_
        expected = np.fmax(threshold, threshold_), score_ if moves else score, 7 if moves else -1
        found = registers["%0"], registers["%1"], registers["%2"]
        assert [np.asarray(x).tobytes() for x in found] == [np.asarray(x).tobytes() for x in expected]


def test_a_draw_is_clamped_and_its_factor_taken_back():
    instructions, operands = next(block for block in blocks() if "scaled" in block[1])
    assert operands == ["scaled", "u"]
    factor = re.search(r"fmaf\(scaled, (\S+)f \* 0.6931471805599453f, score\)", SOURCE.read_text())[1]
    for u in (2.0**-24, 1e-3, 0.5, 1 - 2.0**-24, 1 + 2.0**-20):  # the last as if the logarithm came out above 0
        registers = {"%1": F(u)}
        evaluate(instructions, registers)
        assert registers["%0"] * float(factor) == F(max(0.0, -np.log2(F(u))))
