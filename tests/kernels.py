"""Run tests under other kernels of the libraries: ``make test-kernels``, or ``python tests/kernels.py [for pytest]``.

Each processor rounds its own way, because the libraries choose their code by what it can do. Their own switches make
this one choose as others would; a switch that this processor or build does not know leaves everything as it is. Each
run is a process of its own; the last line of each, and what failed, is told.
"""

from __future__ import annotations

import os
import subprocess
import sys

SWITCHES: tuple[dict[str, str], ...] = (
    {},
    *({"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2", "avx512")),
    *({"MKL_ENABLE_INSTRUCTIONS": name} for name in ("SSE4_2", "AVX2", "AVX512")),
    *({"MKL_CBWR": name} for name in ("COMPATIBLE", "AVX2", "AVX512")),
    *({"ONEDNN_MAX_CPU_ISA": name} for name in ("SSE41", "AVX2", "AVX512_CORE")),
    *({"OPENBLAS_CORETYPE": name} for name in ("Prescott", "Haswell", "SkylakeX")),
    {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
)
NUMBERS = (
    "test_merging.py test_conformance.py test_linalg.py test_lowrank.py test_precision.py test_numerical_faults.py "
    "test_weighting.py test_pipeline.py methods spaces steps diagnostics learning evaluation report formats"
)
"""Where numbers are compared."""


def passed(switches: dict[str, str], arguments: list[str]) -> bool:
    """Whether the tests pass under ``switches``."""
    command = [sys.executable, "-m", "pytest", "--tb=line", "-rfE", *arguments]
    ended = subprocess.run(command, env={**os.environ, **switches}, capture_output=True, text=True, check=False)
    lines = ended.stdout.splitlines()
    name = " ".join(f"{k}={v}" for k, v in switches.items()) or "no switch"
    told = [f"    {line}" for line in lines if line.startswith(("FAILED", "ERROR"))]
    print(f"{name}: {lines[-1] if lines else ended.stderr[-500:]}", *told, sep="\n", flush=True)
    return ended.returncode == 0


def main(arguments: list[str]) -> int:
    given = arguments or [f"tests/{name}" for name in NUMBERS.split()]
    results = [passed(switches, given) for switches in SWITCHES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
