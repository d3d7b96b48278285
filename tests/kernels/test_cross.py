"""The NEON kernels, cross-compiled and run in an emulator: Debian's g++-aarch64-linux-gnu and qemu-user."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cross"
SOURCE = Path(__file__).parents[2] / "src/lissom/kernels/csrc"
CXX, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def build(folder, compiler, sets):
    """check_ops for the instruction ``sets``: name → flags."""
    base = [compiler, "-std=c++20", "-O1", "-fopenmp-simd", "-ffp-contract=off", "-static", f"-I{SOURCE}"]
    objects = []
    for name, flags in sets.items():
        want = [] if name == "portable" else [f"-DLISSOM_WANT_{name.split('_')[0].upper()}"]
        names = [f"-DLISSOM_OPS=ops_{name}", f'-DLISSOM_OPS_NAME="{name}"', *want]
        out = folder / f"{name}.o"
        objects.append(out)
        subprocess.run([*base, *flags, *names, "-c", str(SOURCE / "ops.cpp"), "-o", str(out)], check=True)
    program = folder / "check"
    rest = [
        str(SOURCE / "matrix.cpp"),
        str(SOURCE / "decode.cpp"),
        str(SOURCE / "linear.cpp"),
        str(HERE / "check_ops.cpp"),
        "-pthread",
    ]
    subprocess.run([*base, *map(str, objects), *rest, "-o", str(program)], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(CXX) and shutil.which(EMULATOR)), reason=f"needs {CXX} and {EMULATOR}")
def test_neon_equals_plain_code(tmp_path):
    sets = {"portable": [], "neon": ["-march=armv8-a"], "neon_dot": ["-march=armv8.2-a+dotprod"]}
    program = build(tmp_path, CXX, sets)
    for processor, best in (("cortex-a53", "neon"), ("max", "neon_dot")):
        done = subprocess.run([EMULATOR, "-cpu", processor, str(program)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(f"{best}: ") and "portable: " in done.stdout
