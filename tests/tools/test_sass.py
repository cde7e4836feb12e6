"""The reading of machine code for its pipes, on lines written by hand whose counts are known."""

import pytest

from bench.gpu import sass

NONE = dict.fromkeys(sass.Pipes._fields[1:], 0.0)


def disassembly(*blocks, target=".target sm_90a"):
    """Blocks of instructions, as nvdisasm prints them."""
    lines = [f"\t{target}"]
    for number, block in enumerate(blocks):
        lines.append(f".L_x_{number}:")
        lines += [f"        /*{16 * i:04x}*/                   {each} ;  /* 0x0 */" for i, each in enumerate(block)]
    return "\n".join(lines)


def test_each_instruction_is_counted_by_what_executes_it():
    """Two logarithms: halves of the counts are of an element."""
    block = [
        "MUFU.LG2 R1, R2",
        "@!P0 MUFU.LG2 R3, R4",
        "LOP3.LUT R1, R2, R3, RZ, 0x3c, !PT",
        "@P1 ISETP.GE.U32.AND P0, PT, R1, UR4, PT",
        "@!UP0 UIADD3 UR4, UR4, 0x1, URZ",
        "@UPT UMOV UR5, 0x1",
        "R2UR UR6, R1",
        "IMAD.WIDE.U32 R4, R5, R6, RZ",
        "@P2  IMAD.HI.U32 R4, R5, R6, RZ",
        "IMAD.MOV.U32 R1, RZ, RZ, R2",
        "IMAD R1, R2, R3, R4",
        "FFMA R1, R2, R3, R4",
        "FADD.FTZ R1, R2, -R3",
        "HFMA2.MMA R1, -RZ, RZ, 0, 0",
        "LDG.E.64 R2, desc[UR6][R4.64]",
        "STS.128 [R1], R4",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
        "UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR6], tmem[UR12], idesc[UR13], UP0",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "QUUX R1",
    ]
    assert sass.read_code(disassembly(block)) == sass.Pipes(
        generation=90, issue=10, alu=1, fma=1, packed=0.5, imad=1, wide=1, mufu=1, memory=1, uniform=1.5, tensor=1,
        control=0.5, unknown=0.5,
    )  # fmt: skip


def test_counts_are_for_each_element_whatever_marks_it():
    block = ["MUFU.LG2 R1, R2"] * 4 + ["FFMA R1, R2, R3, R4"] * 6 + ["MUFU.EX2 R1, R2"] * 2
    assert sass.read_code(disassembly(block), 2) == sass.Pipes(90, **NONE | {"issue": 6, "fma": 3, "mufu": 3})
    assert sass.read_code(disassembly(block), 1, "MUFU.EX2").issue == 6
    assert sass.read_code(disassembly(block), 1, "MUFU.RCP") is None
    assert sass.read_code(disassembly()) is None


def test_the_main_block_is_the_one_with_most_logarithms_that_stores_nothing():
    most, fewer = ["MUFU.LG2 R1, R2"] * 3, ["MUFU.LG2 R1, R2"] * 2 + ["FADD R1, R2, R3"] * 20
    stores = ["MUFU.LG2 R1, R2"] * 5 + ["@P0 STG.E desc[UR6][R2.64], R1"]
    assert sass.read_code(disassembly(fewer, most, stores)).issue == 1
    # A branch ends a block without a label, too; of two with as many, the longer one counts.
    cut = [*most, "@P0 BRA `(.L_x_0)", *most, *most, "FADD R1, R2, R3", "EXIT", *most]
    assert sass.read_code(disassembly(cut)).issue == pytest.approx(8 / 6)
    longer = [*most, "FADD R1, R2, R3"]
    assert sass.read_code(disassembly(most, longer, most)).issue == pytest.approx(4 / 3)


def test_what_the_loop_makes_of_an_element_in_another_block_is_counted_too():
    """As noise before the chunks of a product: both blocks go round with the branch, and what goes round between them
    does so more often."""
    noise, chunk = ["MUFU.LG2 R1, R2"] * 4 + ["LOP3 R1, R2, R3"] * 12, ["HGMMA R1", "@P0 BRA `(.L_x_2)"]
    race = ["MUFU.LG2 R1, R2"] * 4 + ["FADD R1, R2, R3"] * 4
    few = ["MUFU.LG2 R1, R2"] + ["FADD R1, R2, R3"] * 20
    begin, loop = [*noise, *noise, "EXIT"], [noise, chunk, race, few, ["@P1 BRA `(.L_x_1)"]]
    read = sass.read_code(disassembly(race, *loop), 2)
    assert read == sass.Pipes(90, **NONE | {"issue": 6, "alu": 3, "fma": 1, "mufu": 2})
    assert sass.read_code(disassembly(begin, *loop), 2).alu == 6  # more of them elsewhere
    assert sass.read_code(disassembly(*loop[:-1]), 2).alu == 6  # no loop: the longer of two


def test_a_whole_loop_is_all_that_goes_round_once_a_tile():
    """Products, exponentials and loads in blocks of their own: but what goes round within is left out."""
    exponentials, chunk = ["MUFU.EX2 R1, R2"] * 4 + ["FADD R1, R2, R3"] * 4, ["HGMMA R1", "@P0 BRA `(.L_x_2)"]
    loop = [["LDGSTS [R1], [R2]"] * 4, chunk, exponentials, ["LOP3 R1, R2, R3"] * 3 + ["@P1 BRA `(.L_x_1)"]]
    outside = ["MUFU.EX2 R1, R2"] * 3 + ["LOP3 R1, R2, R3"] * 20
    code = disassembly(outside, *loop, outside)
    expected = {"issue": 4, "memory": 1, "mufu": 1, "fma": 1, "alu": 0.75, "control": 0.25}
    assert sass.read_code(code, 1, "MUFU.EX2", whole_loop=True) == sass.Pipes(90, **NONE | expected)
    assert sass.read_code(code, 1, "MUFU.EX2") == sass.Pipes(90, **NONE | {"issue": 2, "mufu": 1, "fma": 1})


def test_of_two_loops_one_after_the_other_the_first_counts():
    """A sweep's plain tiles, whichever loop is longer; not two rounds of one loop, nor one around the other."""
    plain = ["MUFU.LG2 R1, R2", "FADD R1, R2, R3", "@P0 BRA `(.L_x_1)"]
    rest = ["MUFU.LG2 R1, R2", *["LOP3 R1, R2, R3"] * 5, "@P0 BRA `(.L_x_2)"]
    begin = ["MUFU.LG2 R1, R2", *["FADD R1, R2, R3"] * 9]
    assert sass.read_code(disassembly(begin, plain, rest)).issue == 3
    assert sass.read_code(disassembly(begin, [*rest[:-1], plain[-1]], [*plain[:-1], rest[-1]])).issue == 7
    assert sass.read_code(disassembly(begin, plain)).issue == 10
    around = ["MUFU.LG2 R1, R2", *["LOP3 R1, R2, R3"] * 5, "@P0 BRA `(.L_x_0)"]
    assert sass.read_code(disassembly(begin, plain, around)).issue == pytest.approx(20 / 3)  # all go round


@pytest.mark.parametrize(
    ("target", "generation"),
    [(".target\tsm_90a", 90), (".target sm_100a", 100), ('.headerflags @"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(80)"', 80)],
)
def test_the_generation_is_read_too(target, generation):
    assert sass.read_code(disassembly(["MUFU.LG2 R1, R2"], target=target)).generation == generation


@pytest.mark.parametrize(
    ("generation", "counts", "binding", "cycles"),
    [
        (90, {"issue": 20, "alu": 9, "mufu": 1, "fma": 4, "wide": 3}, "issue", 20),
        (90, {"issue": 20, "alu": 11, "mufu": 1, "fma": 4, "wide": 3}, "ALU", 22),
        (90, {"issue": 20, "alu": 9, "mufu": 3, "fma": 4, "wide": 3}, "MUFU", 24),
        (90, {"issue": 20, "alu": 9, "mufu": 1, "memory": 6}, "load/store", 24),
        (90, {"issue": 20, "imad": 3, "wide": 4}, "multiply", 22),
        (90, {"issue": 20, "fma": 12, "imad": 1, "wide": 4}, "FMA", 21),
        (100, {"issue": 20, "fma": 2, "packed": 10, "wide": 0}, "FMA", 22),
        (80, {"issue": 20, "fma": 8, "imad": 1, "wide": 1}, "FMA", 22),
        (80, {"issue": 20, "alu": 11, "fma": 8}, "ALU", 22),
        (90, {"issue": 20, "uniform": 19, "control": 19, "tensor": 19, "unknown": 19}, "issue", 20),
    ],
)
def test_the_pipe_that_needs_most_cycles_binds(generation, counts, binding, cycles):
    read = sass.Pipes(generation, **NONE | counts)
    assert (read.binding, read.cycles) == (binding, cycles)
    assert read.limits[binding] == cycles == max(read.limits.values())


def test_seconds_of_all_schedulers():
    """2^30 elements are 2^25 warps of 32, over 132 x 4 schedulers of 1.7 GHz."""
    read = sass.Pipes(90, **NONE | {"issue": 24.5, "alu": 14.25})
    assert sass.seconds(read, 2**30) == pytest.approx(2**25 * 28.5 / (132 * 4 * 1.7e9))
    assert sass.seconds(read, 32, multiprocessors=1, clock_hz=4.0) == pytest.approx(28.5 / 16)


def test_an_opcode_has_one_kind():
    opcodes = [opcode for kind in sass.KINDS.values() for opcode in kind.split()]
    assert len(opcodes) == len(set(opcodes))
    assert set(sass.KINDS) | {"unknown"} == set(sass.Pipes._fields[2:])
    charged = {kind for limits in sass.LIMITS.values() for costs in limits.values() for kind in costs}
    assert charged == {"issue", *sass.KINDS} - {"uniform", "tensor", "control"}
