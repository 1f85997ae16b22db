"""Reads of what some path has not written are found in machine code."""

from portattn.backends.triton.hopper_sass import unwritten

HEAD = """
        /*0000*/                   UMOV UR4, 0x10 ;
        /*0010*/                   ISETP.GE.AND P0, PT, R2, 0x2, PT ;
        /*0020*/              @!P0 BRA 0x60 ;
"""
FIRST_LOOP = """
        /*0030*/                   UIADD3 UR8, UR4, 0x2, URZ ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R40, gdesc[UR6].tnspB, R24 ;
        /*0050*/               @P1 BRA 0x40 ;
"""
LATER = """
        /*0060*/                   UIADD3.64 UR10, UR8, 0x2, URZ ;
        /*0070*/                   EXIT ;
"""


def test_a_value_made_in_front_of_a_loop_that_may_be_jumped_over():
    # The product takes its second factor alone from registers: UR8 and UR9.
    found = unwritten(HEAD + FIRST_LOOP + LATER)
    assert [text.split()[0] for text in found] == ["HGMMA.64x64x16.F32.BF16", "UIADD3.64"]


def test_code_whose_every_path_writes():
    code = HEAD.replace("UMOV UR4, 0x10", "ULDC.64 UR4, c[0x0][0x210]")
    wide = FIRST_LOOP.replace("UIADD3 UR8, UR4, 0x2", "UIADD3.64 UR8, UR4, 0x2")
    assert unwritten(code.replace("UR4", "UR8") + wide.replace("UR4", "UR8") + LATER) == []


def test_nothing_is_nothing():
    assert unwritten("") == []
