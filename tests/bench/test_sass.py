"""Counts instructions in short listings written by hand."""

import pytest

from bench.sass import blocks, instructions_per_tile


def listing(*instructions: str) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/     {text} ;   /* 0x0 */" for i, text in enumerate(instructions))


LOOP_OVER_TILES = listing(
    "MOV R1, c[0x0]",
    "FADD R2, R2, R3",  # 0x10: first instruction of a tile
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24",  # 0x20: a step of the product
    "UIADD3 UR4, UR4, 0x1",
    "@!P5 BRA 0x20",
    "@!P0 BRA 0x80",  # skips the instructions for the tile of the target
    "ISETP.NE R4, R5",
    "FSEL R4, R5, R6, P0",
    "MUFU.EX2 R4, R4",  # 0x80
    "@!P1 BRA 0x10",
    "EXIT",
)


def test_the_shortest_tile_without_a_step_of_the_product():
    # A tile is FADD, HGMMA, UIADD3, BRA, BRA, MUFU, BRA (7); a step of the product is HGMMA, UIADD3, BRA (3)
    assert instructions_per_tile(LOOP_OVER_TILES) == 4
    assert [block.size for block in blocks(LOOP_OVER_TILES)] == [1, 1, 3, 1, 2, 2, 1]


def test_a_kernel_with_one_tile_per_program_is_counted_from_start_to_end():
    code = listing(
        "MOV R1, c[0x0]",
        "HMMA.16816.F32.BF16 R8, R4, R6, R8",  # 0x10
        "@P0 BRA 0x10",
        "MUFU.EX2 R4, R4",
        "STG.E R4",
        "EXIT",
    )
    assert instructions_per_tile(code) == 4


@pytest.mark.parametrize("code", [listing("MOV R1, R2", "EXIT"), listing("HMMA R1, R2", "EXIT")])
def test_a_kernel_without_products_or_exponentials_is_not_counted(code: str):
    assert instructions_per_tile(code) is None
