"""The lock of a run's folder ends with the process that holds it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.config.errors import UserError
from megatron_rl.runs.directory import lock

HOLD = """
import sys, time
from pathlib import Path
from megatron_rl.runs.directory import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_named_and_its_death_frees_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGATRON_RL_ATTEMPT_LOGS", raising=False)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"{tmp_path}: in use by process {holder.pid} on \S+, since \d{{4}}-"):
            lock(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    lock(tmp_path).close()
