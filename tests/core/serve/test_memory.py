import ctypes
import platform
import subprocess
import sys

import pytest

from gymlink.serve.memory import return_large_buffers

LEAVES_HOLES = """
import sys
from pathlib import Path
from gymlink.serve.memory import return_large_buffers

def held():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1])

if sys.argv[1] == "set":
    assert return_large_buffers()
before, kept = held(), []
for size in range(70, 120, 2):  # each too large for where the last one was, with something small behind it
    kept += [bytes(1000) for buffer in [bytes(size * 1024) for _ in range(40)]]
print(held() - before - sum(map(len, kept)) // 1024)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_large_buffers_leave_no_holes() -> None:
    def kilobytes(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", LEAVES_HOLES, how], capture_output=True, check=True).stdout)

    assert kilobytes("set") < 1_000


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert return_large_buffers() is False
